"""How exactly a cut network must compute what the whole one does: as exactly as its precision allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune.data.loader import Placement
from finetune.recipe import StrategySettings
from finetune.system.device import Precision
from finetune.training.plan import build_plan
from finetune.training.trunk import CutChoice, choose_cut
from pretrained.graph.stages import find_stages


class OtherKernel(nn.Module):
    """Stands for a kernel that rounds elsewhere every second time."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values * (1 + self.error * (self.calls % 2))


def cut(error: float, precision: Precision) -> CutChoice:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*layers, nn.Flatten(), OtherKernel(error), nn.Linear(8, 4))
    stages = find_stages(network, (3, 16, 16))
    plan = build_plan(network, stages, StrategySettings(name="freeze"), 0.01, epochs=1)
    placement = Placement(torch.device("cpu"), channels_last=False)
    return choose_cut(network, plan, (3, 16, 16), placement, precision, lambda _: "")


@pytest.mark.parametrize(
    ("precision", "error", "is_kept"),
    [
        ("float32", 0.0, True),
        ("float32", 1e-4, False),
        ("bfloat16", 0.01, True),
        ("bfloat16", 0.2, False),
        ("float16", 0.002, True),
        ("float16", 0.02, False),
    ],
)
def test_the_tolerance_follows_the_precision(precision: Precision, error: float, is_kept: bool) -> None:
    choice = cut(error, precision)
    assert (choice.cut_network is not None) is is_kept, choice.reason
    if not is_kept:
        assert "every epoch runs the whole network: none of" in choice.reason
        assert choice.reason.endswith(f"reproduces the output of the whole network in {precision}")
