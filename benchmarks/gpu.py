"""How near a GPU comes to its own limit: resnet50 at 224 pixels in bfloat16, channels-last.

    python -m benchmarks.gpu --arch resnet50 --img-size 224 --batch-size 256

The limit is not a number from a data sheet, but the rate at which this very GPU multiplies large bfloat16
matrices. Operations of the network are counted by torch, forward and backward. Images lie on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from benchmarks.limits import read_arguments

MATRIX = 8192


def time_steps(act: Callable[[], None], seconds: float) -> float:
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


def measure_matrix_rate(seconds: float) -> float:
    """Return operations a second in a large product of bfloat16 matrices."""
    left, right = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / time_steps(lambda: torch.mm(left, right), seconds)  # type: ignore[arg-type]


def build_step(options: argparse.Namespace, training: bool) -> Callable[[], None]:
    """Return one step: forward, or forward, backward and SGD."""
    network: nn.Module = getattr(models, options.arch)(weights=None)
    network = network.cuda().to(memory_format=torch.channels_last).train(training)
    shape = (options.batch_size, 3, options.img_size, options.img_size)
    images = torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, shape[:1], device="cuda")
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(training):
            loss = cross_entropy(network(images), labels)
        if training:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def count_operations(step: Callable[[], None]) -> int:
    """Return the floating point operations of a step: two for each multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def main() -> None:
    """Measure, and print one line."""
    options = read_arguments()
    seconds = 1.0 if options.quick else 10.0
    matrix_rate = measure_matrix_rate(seconds)
    figures: dict[str, float | str] = {"gpu": torch.cuda.get_device_name(), "matrix_rate": matrix_rate}
    for name, training in (("forward", False), ("training", True)):
        step = build_step(options, training)
        operations, took = count_operations(step), time_steps(step, seconds)
        figures[f"{name}_images_per_second"] = options.batch_size / took
        figures[f"{name}_share"] = operations / took / matrix_rate
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
