"""What leaves a GPU arrives whole: snapshots, and the weights that a GPU has solved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.features.rows import MemoryRows
from finetune.features.solvers import fit
from finetune.training import state as state_module
from finetune.training.state import State

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.mark.parametrize("most", [state_module.MAX_PINNED_BYTES, 0])
def test_a_snapshot_holds_the_last_step(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(state_module, "MAX_PINNED_BYTES", most)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 256, 3)).cuda()
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, fused=True)
    network(torch.randn(8, 3, 64, 64, device="cuda")).sum().backward()
    optimizer.step()
    taken = State(network, optimizer, None, ()).take()
    for name, tensor in network.state_dict().items():
        copy = taken[f"model.{name}"]
        assert copy.device.type == "cpu" and copy.is_contiguous() and copy.is_pinned() == bool(most)
        assert copy.equal(tensor.cpu())
    assert sum(name.startswith("optimizer.") for name in taken) == 6


def test_a_gpu_solves_like_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    for width in (40, 2000):
        features = torch.randn(300, width, generator=generator)
        features[:, :5] += 2 * nn.functional.one_hot(labels, 5)
        rows, indices = MemoryRows(features), torch.arange(300)
        here = fit(rows, indices, labels, 5, "softmax", 0)
        there = fit(rows, indices, labels, 5, "softmax", 0, torch.device("cuda"))
        assert there.strength == pytest.approx(here.strength)
        assert there.weight.device.type == "cpu"
        assert (there.weight - here.weight).abs().max() < 1e-3 * here.weight.abs().max()
