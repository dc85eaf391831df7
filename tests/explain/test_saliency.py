"""Saliency maps against captum, and against networks whose map is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import captum.attr as captum
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from finetune.explain.attribution.gradient import compute_gradient, compute_saliency, compute_scores
from finetune.explain.attribution.integrated import compute_integrated
from finetune.explain.attribution.occlusion import compute_occlusion
from finetune.explain.attribution.smoothgrad import compute_smoothgrad

SIZE = 64
CLASSES = torch.tensor([1, 3])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.partition("/")[2], weights=None, num_classes=5).eval()
    more = {"img_size": SIZE} if "vit" in name or "swin" in name else {}
    return timm.create_model(name, num_classes=5, **more).eval()


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


FAMILIES = ("torchvision/squeezenet1_1", "test_resnet", "test_vit", "test_convnext")
"""ReLUs in place; a residual network; tokens; channels last and GELU."""


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_is_captums(name: str) -> None:
    network, images = build(name), noise()
    expected = captum.Saliency(network).attribute(images.clone(), CLASSES).amax(dim=1)
    assert expected.max() > 0
    torch.testing.assert_close(compute_saliency(network, images, CLASSES), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_integrated_gradients_are_captums(name: str) -> None:
    network, images = build(name), noise()
    oracle = captum.IntegratedGradients(network)
    expected = oracle.attribute(images.clone(), target=CLASSES, n_steps=3, method="riemann_middle")
    found = compute_integrated(network, images, CLASSES, steps=3)
    torch.testing.assert_close(found, expected.sum(dim=1).float(), rtol=1e-3, atol=1e-5)


def test_integrated_gradients_add_up_to_the_difference_of_the_logits() -> None:
    network, images = build("test_vit"), noise()
    with torch.no_grad():
        difference = compute_scores(network, images, CLASSES) - compute_scores(network, 0 * images, CLASSES)
    total = compute_integrated(network, images, CLASSES).sum(dim=(1, 2))
    torch.testing.assert_close(total, difference, rtol=0.05, atol=0.01)


def test_smoothgrad_is_the_mean_over_the_same_noise() -> None:
    network, images = build("test_resnet"), noise()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(3)]
    gradients = []
    for one in drawn:
        ranges = [0.2 * (image.max() - image.min()) for image in images]
        noisy = torch.stack([image + spread * one for image, spread in zip(images, ranges, strict=True)])
        noisy.requires_grad_()
        network(noisy).gather(1, CLASSES[:, None]).sum().backward()
        gradients.append(noisy.grad)
    expected = (sum(gradients) / 3).abs().amax(dim=1)  # type: ignore[union-attr]
    network.zero_grad()
    found = compute_smoothgrad(network, images, CLASSES, samples=3, noise=0.2)
    torch.testing.assert_close(found, expected)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    network, images = build("test_vit"), noise()
    found = compute_smoothgrad(network, images, CLASSES, samples=2, noise=0.0)
    torch.testing.assert_close(found, compute_saliency(network, images, CLASSES))


def test_occlusion_is_captums_mean_over_squares() -> None:
    network, images = build("test_resnet"), noise()
    window, stride = 16, 8
    oracle = captum.Occlusion(network)
    expected = oracle.attribute(images, (3, window, window), (3, stride, stride), target=CLASSES)
    found = compute_occlusion(network, images, CLASSES, share=SIZE // window)
    inner = (slice(None), slice(0, SIZE - window), slice(0, SIZE - window))  # captum ends with whole squares
    torch.testing.assert_close(found[inner], expected[:, 0][inner].float(), rtol=1e-3, atol=1e-5)


class Quarter(nn.Module):
    """Its class 1 reads the brightness of the top left quarter, and nothing else; in place, in the input."""

    def forward(self, images: Tensor) -> Tensor:
        images = images.relu_()
        half = images.shape[2] // 2
        score = images[:, :, :half, :half].mean(dim=(1, 2, 3))
        return torch.stack([-score, score], dim=1)


@pytest.mark.parametrize(
    "method", [compute_saliency, compute_smoothgrad, compute_integrated, compute_occlusion]
)
def test_the_map_lies_where_the_network_looks(
    method: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    network, images = Quarter().eval(), noise().abs() + 0.1
    before = images.clone()
    maps = method(network, images, torch.tensor([1, 1]))
    assert torch.equal(images, before), "an operation in place changed the caller's images"
    half, edge = SIZE // 2, SIZE // 7 + 1
    assert (maps[:, :half, :half] > 0).all()
    assert (maps[:, half + edge :].abs().max(), maps[:, :, half + edge :].abs().max()) == (0, 0)
    against = method(network, images, torch.tensor([0, 0]))
    if method in (compute_integrated, compute_occlusion):  # these know evidence against a class
        assert (against[:, :half, :half] < 0).all()


def test_an_image_has_the_same_map_alone_and_in_a_batch() -> None:
    network, images = build("test_resnet"), noise()
    few = (
        compute_saliency,
        partial(compute_smoothgrad, samples=2),
        partial(compute_integrated, steps=2),
        partial(compute_occlusion, share=2),
    )
    for method in few:
        both = method(network, images, CLASSES)
        alone = method(network, images[1:], CLASSES[1:])
        torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_one_image_does_not_mix_with_another() -> None:
    network, images = build("test_resnet"), noise()
    changed = torch.stack([images[0], images[1] * 2])
    first, second = (compute_gradient(network, one, CLASSES)[0] for one in (images, changed))
    torch.testing.assert_close(first, second)
