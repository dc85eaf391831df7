"""The physical limit: images a second through the bare network, images in memory, nothing else.

    python -m benchmarks.limits --arch resnet18 --img-size 64 --batch-size 32 --threads 2

Both layouts in turns; the better one counts as the limit. ``forward`` is what a frozen trunk costs;
``forward_backward`` what ``full`` costs, without an optimiser's step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import models

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def read_arguments() -> argparse.Namespace:
    """Return the words that the suite gives to every measurement of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", required=True)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def forward(network: nn.Module, images: Tensor, _: Tensor) -> None:
    """One pass without gradients."""
    with torch.inference_mode():
        network(images)


def forward_backward(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One pass and its gradient."""
    cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
    network.zero_grad(set_to_none=True)


def measure(
    options: argparse.Namespace, act: Callable[[nn.Module, Tensor, Tensor], None]
) -> dict[str, float]:
    """Return images a second by layout: the median over rounds, which alternate between the layouts."""
    rounds, seconds = (3, 0.3) if options.quick else (7, 1.5)
    places = {name: place(options, layout) for name, layout in LAYOUTS.items()}
    rates: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for number in range(rounds + 1):
        for name, (network, images, labels) in places.items():
            network.train(act is forward_backward)
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                act(network, images, labels)
                steps += 1
            if number:  # the first round only warms up
                rates[name].append(steps * len(labels) / (time.perf_counter() - began))
    return {name: median(values) for name, values in rates.items()}


def place(options: argparse.Namespace, layout: torch.memory_format) -> tuple[nn.Module, Tensor, Tensor]:
    """Return network, images and labels in a layout."""
    network = getattr(models, options.arch)(weights=None).to(memory_format=layout)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size)
    labels = torch.randint(1000, (options.batch_size,))
    return network, images.contiguous(memory_format=layout), labels


def main() -> None:
    """Measure both, and print one line."""
    options = read_arguments()
    acts = {"forward": forward, "forward_backward": forward_backward}
    figures = {name: measure(options, act) for name, act in acts.items()}
    best = {name: max(rates.values()) for name, rates in figures.items()}
    sys.stdout.write(json.dumps({"layouts": figures, **best}) + "\n")


if __name__ == "__main__":
    main()
