"""A snapshot is a copy: contiguous, on the CPU, and untouched by later steps (on a GPU: tests/gpu)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from finetune.training.state import State


def test_a_snapshot_is_contiguous_and_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    state = State(network, optimizer, copy.deepcopy(network), frozen=("0.bias",))
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    expected = {f"model.{name}": tensor.clone() for name, tensor in network.state_dict().items()}
    taken = state.take()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(1)
    assert "model.0.bias" not in taken and "ema.0.bias" not in taken
    assert not network[0].weight.is_contiguous()
    for name, tensor in taken.items():
        assert tensor.is_contiguous() and not tensor.requires_grad and not tensor.is_pinned(), name
        if name in expected:
            assert tensor.dtype == expected[name].dtype and tensor.equal(expected[name])
    assert {name for name in taken if name.startswith("model.")} == expected.keys() - {"model.0.bias"}
    assert taken.keys() >= {"ema.2.weight", "optimizer.0.weight:momentum_buffer"}
