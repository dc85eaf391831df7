"""fastai: ``vision_learner`` with its own head, one cycle, and rates that fall from head to stem.

What is frozen and where the last stage begins is the suite's splitter, so that it means the same for all. As
fastai does it, BatchNorm goes on learning in frozen stages (``train_bn``), the head is two linear layers over
average and maximum, and weight decay is decoupled.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from typing import Any

warnings.filterwarnings("ignore")

from fastai.vision import all as vision  # noqa: E402

from benchmarks.peers.common import (  # noqa: E402
    HEAD,
    LAST_STAGE,
    Curve,
    load_network,
    read_arguments,
    report,
)


def build_learner(options: argparse.Namespace) -> Any:
    """Return a learner with the given weights, frozen as the strategy says."""
    loaders = vision.ImageDataLoaders.from_folder(
        options.data,
        train="train",
        valid="val",
        item_tfms=vision.RandomResizedCrop(options.img_size, min_scale=0.35),
        batch_tfms=vision.Flip(),
        bs=options.batch_size,
        num_workers=options.workers,
        seed=options.seed,
        device="cpu",
    )

    def arch(**_: Any) -> Any:
        return load_network(options.arch, options.weights)

    vision.model_meta[arch] = vision.model_meta[getattr(vision.models, options.arch)]
    learner = vision.vision_learner(
        loaders,
        arch,
        metrics=vision.accuracy,
        opt_func=partial(vision.SGD, mom=0.9),
        wd=1e-4,
        splitter=partial(split, position=find_last_stage(options)),
        path=options.output,
    )
    if options.strategy == "top":
        learner.freeze_to(-2)
    elif options.strategy == "full":
        learner.unfreeze()
    return learner


def find_last_stage(options: argparse.Namespace) -> tuple[int, ...]:
    """Return where the last stage lies among the children of fastai's body."""
    if HEAD[options.arch] == "classifier":  # the body is one Sequential of one Sequential
        return 0, int(LAST_STAGE[options.arch].rpartition(".")[2])
    return (7,)  # conv1 bn1 relu maxpool layer1 layer2 layer3 layer4


def split(model: Any, position: tuple[int, ...]) -> Any:
    """Return the parameters below the last stage, of the last stage, and of the head."""
    body = model[0]
    for index in position[:-1]:
        body = body[index]
    return vision.L(body[: position[-1]], body[position[-1] :], model[1:]).map(vision.params)


class Clock(vision.Callback):  # type: ignore[misc]
    """Notes time and accuracy after every epoch."""

    order = vision.Recorder.order + 1

    def __init__(self) -> None:
        self.curve: Curve = []

    def after_epoch(self) -> None:
        """Take the last metric of the epoch, which is the accuracy."""
        self.curve.append((time.perf_counter(), float(self.learn.recorder.values[-1][-1])))


def main() -> None:
    """Train, and report."""
    options = read_arguments()
    learner, clock, began = build_learner(options), Clock(), time.perf_counter()
    lr = options.lr if options.strategy == "freeze" else slice(options.lr / 100, options.lr)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(options.epochs, lr, cbs=clock)
        learner.save("final")
    report(clock.curve, began)


if __name__ == "__main__":
    main()
