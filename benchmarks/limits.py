"""The physical limit: images a second through the bare network, images in memory, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import models

from benchmarks.data import Network, find_network, list_networks
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures

BARE = "bare"
LAYOUTS = (torch.contiguous_format, torch.channels_last)
Pass = Callable[[nn.Module, Tensor, Tensor], None]


def plan(bench: Bench) -> list[Case]:
    """Return a case for each network."""
    return [Case(f"limits-{name}", (BARE,), name) for name in list_networks(bench)]


def forward(network: nn.Module, images: Tensor, _: Tensor) -> None:
    """One pass without gradients: what a frozen trunk costs."""
    with torch.inference_mode():
        network(images)


def forward_backward(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One pass and its gradient: what ``full`` costs, without an optimiser's step."""
    cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
    network.zero_grad(set_to_none=True)


def measure(turn: Turn) -> Figures:
    """Return images a second of both passes, each in the faster memory layout."""
    torch.manual_seed(0)
    network = find_network(turn.case.network, turn.bench)
    rounds, seconds = (1, 0.1) if turn.bench.quick else (7, 1.5)
    return {act.__name__: time_pass(network, act, rounds, seconds) for act in (forward, forward_backward)}


def time_pass(network: Network, act: Pass, rounds: int, seconds: float) -> float:
    """Return images a second of a network of torchvision; see :func:`time_layouts`."""
    built = [build(network, layout, torch.device("cpu")) for layout in LAYOUTS]
    return time_layouts(built, act, rounds, seconds)


def time_layouts(
    built: Sequence[tuple[nn.Module, Tensor, Tensor]], act: Pass, rounds: int, seconds: float
) -> float:
    """Return images a second in the faster layout: the medians over rounds, which alternate.

    Args:
        built: the same network, images and labels in each layout.
        act: one pass.
        rounds: how often each layout is timed, after one round to warm up.
        seconds: of each.
    """
    rates: list[list[float]] = [[] for _ in built]
    for number in range(rounds + 1):
        for place, (module, images, labels) in enumerate(built):
            module.train(act is forward_backward)
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                act(module, images, labels)
                steps += 1
            if number:  # the first round only warms up
                rates[place].append(steps * len(labels) / (time.perf_counter() - began))
    return max(median(values) for values in rates)


def build(
    network: Network, layout: torch.memory_format, device: torch.device
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return network, images and labels in a layout."""
    module = getattr(models, network.arch)(weights=None).to(device, memory_format=layout)
    images = torch.randn(network.batch_size, 3, network.img_size, network.img_size, device=device)
    labels = torch.randint(1000, (network.batch_size,), device=device)
    return module, images.contiguous(memory_format=layout), labels


QUESTION = Question(
    "limits",
    plan,
    measure,
    {"forward, images/s": "forward", "forward and backward, images/s": "forward_backward"},
)
