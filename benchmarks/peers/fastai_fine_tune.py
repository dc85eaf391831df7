"""fastai as its documentation begins: ``vision_learner`` and ``fine_tune``, with the library's defaults.

One epoch with the body frozen, then all epochs but that one with everything, at half the rate and lower in
the body. The network is timm's, by fastai's own way of building one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastai.vision import all as vision

from benchmarks.peers.common import read_arguments, report
from benchmarks.peers.fastai_peer import Clock


def main() -> None:
    """Train, and report."""
    options = read_arguments()
    loaders = vision.ImageDataLoaders.from_folder(
        options.data,
        train="train",
        valid="val",
        item_tfms=vision.Resize(options.img_size),
        bs=options.batch_size,
        num_workers=options.workers,
        seed=options.seed,
        device="cpu",
    )
    fine_tune(options, loaders, vision.accuracy)


def fine_tune(options: argparse.Namespace, loaders: Any, metric: Any) -> None:
    """Train with the library's defaults, and report the metric of each epoch as the accuracy."""
    own_weights: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(options.weights)}}
    name = options.arch.removeprefix("timm/")
    learner = vision.vision_learner(loaders, name, metrics=metric, path=options.output, **own_weights)
    clock, began = Clock(), time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(options.epochs - 1, cbs=clock)
        learner.save("final")
    report(clock.curve, began)


if __name__ == "__main__":
    main()
