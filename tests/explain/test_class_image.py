"""Class images against the solution of a linear network, and on networks that end in a ReLU."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from finetune.explain.class_image import ClassImages, compute_class_images
from finetune.explain.class_score import find_scores
from tests.explain.places import build, noise

SIZE = (3, 32, 32)
BOUNDS = torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)


def climb(network: nn.Module, index: int, size: tuple[int, int, int] = SIZE, **more: object) -> ClassImages:
    settings = {"seeds": [0], **more}
    return compute_class_images(find_scores(network, size), index, torch.zeros(size), BOUNDS, **settings)


def test_the_image_of_a_linear_network_is_its_weights() -> None:
    """The score w x minus lambda |x|^2 is highest at w / (2 lambda); lambda gives the contrast."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval()
    weight = noise((4, 3, 32), 32).reshape(4, -1).clamp(-3, 3)
    network[1].weight.data = 0.02 * weight
    found = climb(network, 2, contrast=0.6)
    decay = 0.02 * weight[2].square().mean().sqrt().item() / 1.2
    assert found.decays.item() == pytest.approx(decay, rel=1e-5)
    expected = (0.02 * weight[2] / (2 * decay)).reshape(3, 32, 32)
    assert expected.abs().max() < 2
    assert (found.pixels[0] - expected).abs().max() < 0.02
    assert found.scores.shape == (201, 1)
    assert found.scores[-1] == pytest.approx(network(expected[None])[0, 2].item(), abs=0.05)


def test_the_values_stay_those_of_an_image_file() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)).eval()
    found = climb(network, 1, contrast=5.0, num_steps=40)
    assert found.pixels.min() == -2 and found.pixels.max() == 2


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_score_rises_on_any_family(name: str) -> None:
    network = build(name)
    size = (3, 160, 160) if name == "test_vit" else SIZE
    found = climb(network, 3, size, num_steps=10, seeds=[0, 1])
    assert (found.scores[-1] > found.scores[0]).all()
    with torch.no_grad():
        assert torch.allclose(network(found.pixels)[:, 3], found.scores[-1], atol=1e-4)


def dead_squeezenet() -> nn.Module:
    """Scores before the final ReLU are negative at the mean image, so that all logits are zero there."""
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=5).eval()
    nn.init.constant_(network.classifier[1].bias, -0.5)
    return network


def test_a_final_relu_does_not_stop_the_ascent() -> None:
    network, size = dead_squeezenet(), (3, 64, 64)
    with torch.no_grad():
        assert not network(torch.zeros(1, *size)).any()
    found = climb(network, 3, size, num_steps=20)
    assert found.scores[-1] > found.scores[0]


def test_scores_before_the_final_relu() -> None:
    network, images = dead_squeezenet(), noise((3, 64, 64))
    with torch.no_grad():
        expected = network.classifier[1](network.features(images)).mean(dim=(2, 3))
        assert torch.equal(find_scores(network, (3, 64, 64))(images), expected)
    assert expected.min() < 0
    plain = build("test_resnet")
    with torch.no_grad():
        assert torch.equal(find_scores(plain, SIZE)(noise(SIZE)), plain(noise(SIZE)))


def test_every_seed_is_an_image_of_its_own() -> None:
    network = build("test_resnet")
    both = climb(network, 1, num_steps=5, seeds=[3, 4], is_smooth=True)
    again = climb(network, 1, num_steps=5, seeds=[3, 4], is_smooth=True)
    assert torch.equal(both.pixels, again.pixels)
    assert not torch.allclose(both.pixels[0], both.pixels[1], atol=0.1)
    alone = climb(network, 1, num_steps=5, seeds=[3], is_smooth=True)
    assert torch.allclose(both.pixels[:1], alone.pixels, atol=1e-3)


def roughness(pixels: Tensor) -> float:
    return float((pixels[..., 1:] - pixels[..., :-1]).square().mean() / pixels.square().mean())


def test_smooth_images_have_less_noise() -> None:
    network = build("test_resnet")
    plain, smooth = (climb(network, 1, num_steps=30, is_smooth=smooth).pixels for smooth in (False, True))
    assert roughness(smooth) < 0.7 * roughness(plain)


def test_everything_is_given_back() -> None:
    network = timm.create_model("test_resnet", num_classes=3).eval()
    network.conv1.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.inference_mode():
        climb(network, 1, num_steps=2, is_smooth=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.conv1[0].weight.requires_grad and network.fc.weight.requires_grad
    assert not any(module._forward_hooks for module in network.modules())
