"""How near a GPU comes to its own limit: ResNet-50 at 224 pixels in bfloat16, channels-last.

The limit is not a number from a data sheet, but the rate at which this very GPU multiplies large bfloat16
matrices. Operations of the network are counted by torch, forward and backward. Images lie on the GPU.

    python -m benchmarks.gpu --first-hour [--device cuda] [--quick] [--again] [ITEM ...]

runs what a new GPU should be tried with, in order (:mod:`benchmarks.first_hour`). What is done and as
expected is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import first_hour
from benchmarks.data import find_network
from benchmarks.first_hour_items import ITEMS
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.limits import BARE, build
from benchmarks.machine import CACHE
from benchmarks.results import Figures
from finetune.errors import FinetuneError
from finetune.system.device import resolve_device

MATRIX = 8192


def plan(bench: Bench) -> list[Case]:
    """Return the one case where there is a GPU."""
    return [Case("gpu-resnet50", (BARE,), "resnet50-gpu")] * bench.cuda


def measure(turn: Turn) -> Figures:
    """Return the matrix rate in Tflop/s, and images a second with their share of it in percent."""
    network, seconds = find_network(turn.case.network, turn.bench), 1.0 if turn.bench.quick else 10.0
    module, images, labels = build(network, torch.channels_last, torch.device("cuda"))
    left, right = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * MATRIX**3 / time_steps(lambda: torch.mm(left, right), seconds)
    figures: Figures = {"matrix_rate": rate / 1e12}
    for name, training in (("forward", False), ("training", True)):
        step = build_step(module.train(training), images, labels)
        with FlopCounterMode(display=False) as counter:
            step()
        took = time_steps(step, seconds)
        figures[f"{name}_images_per_second"] = len(labels) / took
        figures[f"{name}_percent"] = 100 * counter.get_total_flops() / took / rate
    return figures


def time_steps(act: Callable[[], object], seconds: float) -> float:
    """Return the seconds of one call, over many, after a warm-up."""
    for _ in range(5):
        act()
    torch.cuda.synchronize()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            act()
        torch.cuda.synchronize()
        steps += 5
    return (time.perf_counter() - began) / steps


def build_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one step: forward, or of a network in training mode forward, backward and SGD."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(network.training):
            loss = cross_entropy(network(images), labels)
        if network.training:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


COLUMNS = {
    "matrix rate, Tflop/s": "matrix_rate",
    "forward, images/s": "forward_images_per_second",
    "% of the matrix rate": "forward_percent",
    "training, images/s": "training_images_per_second",
    "% of it": "training_percent",
}
QUESTION = Question("gpu", plan, measure, COLUMNS)


def main(words: list[str] | None = None) -> int:
    """Run the first hour's list, or one of its items in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=first_hour.__doc__)
    parser.add_argument("items", nargs="*", metavar="ITEM", help=", ".join(item.name for item in ITEMS))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--first-hour", action="store_true", help="run the list, or the items that are named")
    what.add_argument("--item", choices=[item.name for item in ITEMS], help="run one in this process")
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:N, or cpu to try the list with small sizes"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: to see that it works")
    parser.add_argument("--again", action="store_true", help="start over instead of going on")
    parser.add_argument("--cache", type=Path, default=CACHE, help="images, results")
    options = parser.parse_args(words)
    if unknown := set(options.items) - {item.name for item in ITEMS}:
        parser.error(f"there is no item {', '.join(sorted(unknown))}")
    options.quick, options.cache = options.quick or options.device == "cpu", options.cache.absolute()
    if options.item:
        first_hour.act(options)
        return 0
    try:
        resolve_device(options.device)
    except FinetuneError as error:
        sys.stderr.write(f"No GPU was found. {error}\n")
        return error.exit_code
    return int(any(result.failed for result in first_hour.run_list(options, options.items)))


if __name__ == "__main__":
    sys.exit(main())
