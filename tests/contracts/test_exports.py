"""Every family goes into every format and says the same there, or is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.errors import UsageError
from finetune.exporters.export import export, parse_export_options
from finetune.exporters.folder import export_model
from finetune.system.display import SilentDisplay
from pretrained.backbone import load_backbone
from pretrained.catalog import find_card
from tests.contracts.families import SMALLEST

FAMILIES = (
    "convnext",
    "crossvit",
    "efficientnet",
    "ghostnet",
    "hrnet",
    "levit",
    "maxxvit",
    "metaformer",
    "mobilenetv3",
    "mobilevit",
    "regnet",
    "resnet",
    "swin_transformer",
    "vision_transformer",
    "xcit",
)
ZOO = (
    *("zoo/lenet5_paper", "zoo/nin_cifar", "zoo/googlenet_2014", "zoo/cifar_resnet20", "zoo/cifar_wrn_16_4"),
    *("zoo/cifar_fractalnet_thin_c3", "zoo/cifar_shake_shake_26_2x32d", "zoo/alphago_policy_128"),
)
TORCHVISION = ("torchvision/densenet121", "torchvision/googlenet", "torchvision/shufflenet_v2_x0_5")
NAMES = (*(f"timm/{SMALLEST[family]}" for family in FAMILIES), *TORCHVISION, *ZOO)
REFUSED: dict[tuple[str, str], str] = {}
"""What a format cannot hold, and the words for it."""


def write_random(name: str, folder: Path) -> None:
    """A model folder of a network with random weights, a fifth of them other than at the start."""
    torch.manual_seed(0)
    card = find_card(name)
    backbone = load_backbone(card, classes=list("abcde"), pretrained=False)
    backbone = replace(backbone, card=replace(backbone.card, temperature=1.7))
    with torch.no_grad():
        for value in backbone.network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape))
    export_model(backbone, backbone.network, folder, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    write_random(name, tmp_path / "model")
    for format in ("timm", "torch-export", "onnx"):
        output = tmp_path / format
        wanted = parse_export_options(format, None, False, None)
        if expected := REFUSED.get((name, format)):
            with pytest.raises(UsageError, match=expected):
                export(tmp_path / "model", wanted, output, SilentDisplay())
            assert not output.exists()
            continue
        report = export(tmp_path / "model", wanted, output, SilentDisplay())
        assert report["top1_identical"]
        assert report["max_difference"] < 1e-4
        assert json.loads((output / "export.json").read_text()) == report
