"""Removed blocks against networks that were built without them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from finetune.explain.ablation import Block, find_blocks, without_block
from tests.explain.places import build, noise

SIZE = (3, 64, 64)


def names_of(network: nn.Module, size: tuple[int, int, int] = SIZE) -> list[str]:
    return [block.name for block in find_blocks(network, size)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/resnet18", [f"layer{stage}.1" for stage in (1, 2, 3, 4)]),
        ("torchvision/vgg11", ["features.8", "features.13", "features.16", "features.18", "classifier.3"]),
        ("torchvision/alexnet", ["features.10", "classifier.4"]),
    ],
)
def test_blocks_of_known_networks(name: str, expected: list[str]) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None).eval()
    if name.endswith("resnet18"):
        expected = ["layer1.0", *expected]
    assert names_of(network, (3, 224, 224)) == expected


def test_blocks_of_transformers_hold_their_residual_connections() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224").eval()
        swin = timm.create_model("swin_tiny_patch4_window7_224").eval()
    assert names_of(vit, (3, 224, 224)) == [f"blocks.{number}" for number in range(12)]
    depths = (2, 2, 6, 2)
    assert names_of(swin, (3, 224, 224)) == [
        f"layers.{stage}.blocks.{number}" for stage, depth in enumerate(depths) for number in range(depth)
    ]


def without(network: nn.Module, block: Block) -> nn.Module:
    changed = copy.deepcopy(network)
    parent, _, last = block.name.rpartition(".")
    setattr(changed.get_submodule(parent), last, nn.Identity())
    return changed


def plain() -> nn.Module:
    """Convolutions without residual connections, with ReLUs in place."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "plain", "test_convnext"])
def test_a_removed_block_is_an_identity(name: str) -> None:
    network = plain() if name == "plain" else build(name)
    for block in network.modules():  # the last normalisation starts at zero, as if the block were removed
        for norm in (getattr(block, name, None) for name in ("bn2", "bn3")):
            if norm is not None:
                nn.init.ones_(norm.weight)
    size = {"test_vit": (3, 160, 160)}.get(name, SIZE)
    images = noise(size)
    blocks = find_blocks(network, size)
    assert blocks
    with torch.no_grad():
        before = network(images)
        for block in blocks:
            with without_block(network, block):
                found = network(images)
            assert torch.equal(found, without(network, block)(images))
            assert not torch.equal(found, before)
        assert torch.equal(network(images), before)


class Eager(nn.Module):
    """A block that changes its input in place, as pre-activation blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.relu_())


def test_the_input_is_what_it_was_before_the_block() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Eager(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = noise((3, 8, 8))
    block = find_blocks(network, (3, 8, 8))[-1]
    assert block == Block("1.conv", "Conv2d", 84)
    with torch.no_grad(), without_block(network, Block("1", "Eager", 84)):
        found = network(images)
    assert torch.equal(found, network[0](images).mean(dim=(2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.once = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.shared(self.shared(self.once(images)))).mean(dim=(2, 3))


def test_shared_modules_and_normalisations_are_no_blocks() -> None:
    assert names_of(Twice().eval(), (3, 8, 8)) == ["once"]


def test_a_network_may_have_no_such_block() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    assert names_of(network, (3, 8, 8)) == []


def test_the_network_is_given_back_after_an_error() -> None:
    network = build("test_resnet")
    block = find_blocks(network, SIZE)[0]
    with pytest.raises(ZeroDivisionError), without_block(network, block):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
