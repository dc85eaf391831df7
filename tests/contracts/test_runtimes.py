"""Every family has the same features in ONNX Runtime as in torch, or is named here and runs in torch.

Real networks with random weights, on the CPU: three by default, all families with ``-m slow`` (minutes).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finetune.data.loader import Placement
from finetune.features.runtime import open_forward
from finetune.system.display import SilentDisplay
from pretrained.catalog import find_card
from pretrained.graph.layers import FeatureExtractor, Layers
from pretrained.graph.stages import find_stages
from pretrained.network import build_network
from tests.contracts.test_cut_networks import NAMES
from tests.sweeps import slow_except

IN_TORCH = {
    "timm/halonet_h1": "Unfold",
    "timm/csatv2": "adaptive_avg_pool2d",
    "timm/volo_d1_224": "col2im",
    "torchvision/vit_b_32": "_native_multi_head_attention",
    "zoo/alexnet_2012": "adaptive_avg_pool2d",  # local response normalisation
    "zoo/zfnet": "adaptive_avg_pool2d",
    "zoo/vgg11_lrn": "adaptive_avg_pool2d",
    "zoo/lenet5_paper": "kernel of unknown shape",  # partial connections
}
"""Families that run in torch, with a word of the reason that is said."""


class Said(SilentDisplay):
    """A display that keeps the last line."""

    last = ""

    def say(self, text: str, style: str = "") -> None:
        self.last = text


@pytest.mark.parametrize(
    "name", slow_except(["timm/test_efficientnet", "timm/test_vit", "torchvision/squeezenet1_0"], NAMES)
)
def test_a_family_has_the_features_that_it_has_in_torch(name: str) -> None:
    card = find_card(name)
    size = card.preprocessing.input_size
    torch.manual_seed(0)
    network = build_network(replace(card, num_classes=card.num_classes or 10), 0.0).eval()
    layers = Layers(network, find_stages(network, size), size).all
    extract = FeatureExtractor(network, layers, "auto")

    def in_torch(images: Tensor) -> Tensor:
        return torch.cat(extract(images), dim=1)

    said = Said()
    placement = Placement(torch.device("cpu"), channels_last=True)
    forward = open_forward("onnxruntime", network, in_torch, placement, size, said)
    if name in IN_TORCH:
        assert forward is in_torch and IN_TORCH[name] in said.last
        return
    assert forward is not in_torch, said.last
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))  # it was tried on 3 and on 1
    with torch.no_grad():
        rows = in_torch(images)
    scale = rows.abs().max().item()
    torch.testing.assert_close(forward(images), rows, rtol=0, atol=1e-4 * scale)
