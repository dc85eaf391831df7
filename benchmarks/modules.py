"""What small kernels and reductions save: parameters, multiply-adds and measured time of modules.

Two or three stacked 3x3 convolutions see as much as one of 5x5 or 7x7 (arXiv:1409.1556, section 2.3). An
inception module with 1x1 reductions does what the naive one does on fewer maps (arXiv:1409.4842, figure 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.limits import LAYOUTS, Pass, forward, forward_backward, time_layouts
from benchmarks.results import Figures, Results, spread
from benchmarks.text import number, span, table
from pretrained.graph.costs import compute_costs
from pretrained.zoo.googlenet import MODULES, Inception, NaiveInception

BATCH = 16


class ModuleSpec(NamedTuple):
    """A part of a network: what builds it, and the channels, rows and columns of its input."""

    build: Callable[[], nn.Module]
    size: tuple[int, int, int]


def stack(kernel: int, count: int, channels: int) -> nn.Sequential:
    """Return convolutions of one kernel size that keep channels and grid, with a ReLU after each."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers)


WIDTH, GRID = 64, 56
CASES: dict[str, dict[str, ModuleSpec]] = {
    "5x5": {
        "one of 5x5": ModuleSpec(partial(stack, 5, 1, WIDTH), (WIDTH, GRID, GRID)),
        "two of 3x3": ModuleSpec(partial(stack, 3, 2, WIDTH), (WIDTH, GRID, GRID)),
    },
    "7x7": {
        "one of 7x7": ModuleSpec(partial(stack, 7, 1, WIDTH), (WIDTH, GRID, GRID)),
        "three of 3x3": ModuleSpec(partial(stack, 3, 3, WIDTH), (WIDTH, GRID, GRID)),
    },
    "inception-3a": {
        "naive": ModuleSpec(partial(NaiveInception, 192, MODULES["3a"]), (192, 28, 28)),
        "reduced": ModuleSpec(partial(Inception, 192, MODULES["3a"]), (192, 28, 28)),
    },
    "inception-4e": {
        "naive": ModuleSpec(partial(NaiveInception, 528, MODULES["4e"]), (528, 14, 14)),
        "reduced": ModuleSpec(partial(Inception, 528, MODULES["4e"]), (528, 14, 14)),
    },
}


def plan(_: Bench) -> list[Case]:
    """Return a case for each comparison."""
    return [Case(f"modules-{name}", tuple(modules), name) for name, modules in CASES.items()]


def measure(turn: Turn) -> Figures:
    """Return the costs of a module, and the images a second of both passes."""
    torch.manual_seed(0)
    build, size = CASES[turn.case.network][turn.tool]
    costs = compute_costs(build(), size)
    found: Figures = {"parameters": costs.parameters, "macs": costs.macs}
    rounds, seconds = (1, 0.05) if turn.bench.quick else (7, 0.5)
    passes: tuple[Pass, ...] = (forward, forward_backward)
    for act in passes:
        found[act.__name__] = time_layouts(
            [_lay_out(build, size, one) for one in LAYOUTS], act, rounds, seconds
        )
    return found


def _lay_out(
    build: Callable[[], nn.Module], size: tuple[int, int, int], layout: torch.memory_format
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a module that ends in a vector, so that a loss can be computed, images and labels."""
    module = nn.Sequential(build(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = module.to(memory_format=layout)
    images = torch.randn(BATCH, *size).contiguous(memory_format=layout).requires_grad_()
    return module, images, torch.zeros(BATCH, dtype=torch.int64)


def write(results: Results) -> Iterator[str]:
    """Yield a row for each module; ratios are to the first of each pair, those of speeds turn by turn."""
    head = ["module", "parameters", "multiply-adds", "forward, images/s", "and backward, images/s"]
    rows = []
    for case, tool in results.measured("modules-"):
        first = next(iter(CASES[case.removeprefix("modules-")]))
        base, own = results.of(case, first)[0].figures, results.of(case, tool)[0].figures
        costs = [f"{number(own[name])} ({own[name] / base[name]:.2f}x)" for name in ("parameters", "macs")]
        speeds = [_describe_speed(results, case, tool, first, act) for act in ("forward", "forward_backward")]
        rows.append([f"{case.removeprefix('modules-')}: {tool}", *costs, *speeds])
    yield from table(head, rows)


def _describe_speed(results: Results, case: str, tool: str, first: str, act: str) -> str:
    ratios = spread(own / base for own, base in results.pairs(case, tool, first, act))
    return f"{span(results.figure(case, tool, act))} ({span(ratios, 'x')})"


QUESTION = Question("modules", plan, measure, write=write)
