"""Responses to transformations against shifts and turns by hand, and networks that are invariant."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from finetune.explain.invariance import AMOUNTS, IDENTITY, measure_responses, transform_images
from pretrained.graph.recorder import FeaturePoint
from tests.explain.places import build, noise

SIZE = (3, 40, 40)


@pytest.mark.parametrize("kind", AMOUNTS)
def test_amounts_hold_the_identity(kind: str) -> None:
    images = noise(SIZE)
    assert IDENTITY[kind] in AMOUNTS[kind]
    assert torch.equal(transform_images(images, kind, IDENTITY[kind]), images)


def test_a_translation_moves_down_and_fills_with_the_mean() -> None:
    images = noise(SIZE)
    moved = transform_images(images, "translation", 0.25)
    assert torch.allclose(moved[:, :, 10:], images[:, :, :-10], atol=1e-5)
    assert not moved[:, :, :10].any()
    up = transform_images(images, "translation", -0.1)
    assert torch.allclose(up[:, :, :-4], images[:, :, 4:], atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_a_rotation_is_anticlockwise(quarters: int) -> None:
    images = noise(SIZE)
    turned = transform_images(images, "rotation", 90.0 * quarters)
    assert torch.allclose(turned, torch.rot90(images, quarters, dims=(2, 3)), atol=1e-4)


def test_a_scale_grows_around_the_middle() -> None:
    image = torch.zeros(1, *SIZE)
    image[:, :, 15:25, 15:25] = 1
    grown = transform_images(image, "scale", 1.8)
    side = (grown[0, 0, 20] > 0.5).sum()
    assert side == 18 and torch.allclose(grown, grown.flip(2), atol=1e-5)


class Mean(nn.Module):
    """Scores are the mean colours, which a quarter turn does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pixels(images).mean(dim=(2, 3))


SHARES = partial(torch.softmax, dim=1)


def points(*names: str) -> list[FeaturePoint]:
    return [FeaturePoint(name, 0, False) for name in names]


def test_a_network_of_mean_colours_sees_no_quarter_turn() -> None:
    network, images = Mean().eval(), noise(SIZE)
    found = measure_responses(network, points("pixels", ""), images, torch.tensor([0, 2]), "rotation", SHARES)
    quarters = [AMOUNTS["rotation"].index(90.0 * number) for number in range(5)]
    assert found.distances.shape == (2, 2, 25) and found.answers.shape == (2, 25)
    assert torch.allclose(found.distances[1][:, quarters], torch.zeros(2, 5), atol=1e-4)
    assert (found.distances[0][:, quarters[1:4]] > 0.5).all()
    middle = found.answers[:, quarters]
    assert torch.allclose(middle, middle[:, :1].expand(2, 5), atol=1e-5)


@pytest.mark.parametrize("kind", ["translation", "scale"])
def test_distances_and_probabilities_by_hand(kind: str) -> None:
    network, images, classes = build("test_resnet"), noise(SIZE), torch.tensor([1, 4])
    names = ("layer1", "layer4")
    found = measure_responses(
        network, points(*names), images, classes, kind, lambda values: (values / 2).softmax(dim=1)
    )
    amount = len(AMOUNTS[kind]) - 2
    moved = transform_images(images, kind, AMOUNTS[kind][amount])
    with torch.no_grad():
        for row, name in enumerate(names):
            kept: list[Tensor] = []
            handle = network.get_submodule(name).register_forward_hook(
                lambda _, __, out, kept=kept: kept.append(out.clone())
            )
            network(images)
            network(moved)
            handle.remove()
            for index in range(2):
                one, other = (tensor[index].flatten() for tensor in kept)
                expected = (other - one).norm() / one.norm()
                assert found.distances[row, index, amount] == pytest.approx(expected.item(), rel=1e-4)
        shares = (network(moved) / 2).softmax(dim=1)
    assert torch.allclose(found.answers[:, amount], shares[[0, 1], classes], atol=1e-6)
    same = AMOUNTS[kind].index(IDENTITY[kind])
    assert not found.distances[:, :, same].any()


def test_everything_is_given_back() -> None:
    network = build("test_resnet")
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        measure_responses(network, points("layer1"), noise(SIZE), torch.tensor([1, 1, 1]), "scale", SHARES)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not any(module._forward_hooks for module in network.modules())
