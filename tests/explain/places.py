"""Layers of small networks, for the tests of methods that look at feature maps."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.explain.positions import MapPosition, find_position
from pretrained.graph.layers import Layers
from pretrained.graph.pooling import Form
from pretrained.graph.recorder import FeaturePoint
from tests.contracts.families import SHALLOW


def build(name: str) -> nn.Module:
    """A network of timm, or ``torchvision/NAME``, with seeded random weights for ten classes."""
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        network = torchvision.models.get_model(
            name.removeprefix("torchvision/"), num_classes=10, weights=None
        )
    else:
        network = timm.create_model(name, num_classes=10, **SHALLOW.get(name, {}))
    return network.eval()


def place(network: nn.Module, name: str, size: tuple[int, int, int]) -> MapPosition:
    """The output of a module, as the commands find it."""
    [layer] = Layers(network, (), size).select([name])
    return find_position(network, layer, size)


def plain(name: str) -> MapPosition:
    """The output of a module that gives (B, C, h, w), without looking at the network."""
    return MapPosition(FeaturePoint(name, 0, False), Form("channels_first", 0, (2, 2), 1))


def noise(size: tuple[int, int, int], count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def save_random(name: str, folder: Path, size: int) -> Path:
    """A folder in timm's format that holds a network of timm with seeded random weights for ten classes."""
    folder.mkdir()
    save_file(build(name).state_dict(), folder / "model.safetensors")
    values = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    config = {
        "architecture": name,
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, size, size], "classifier": "classifier", **values},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
