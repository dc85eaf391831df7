"""fastai with several labels an image: ``vision_learner`` and ``fine_tune`` with the library's defaults."""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
from fastai.vision import all as vision

from benchmarks.peers.common import read_arguments, report
from benchmarks.peers.fastai_peer import Clock


def main() -> None:
    """Train, and report the mean average precision as the accuracy."""
    options = read_arguments()
    table = pd.read_csv(options.data)
    table["is_val"] = table["split"] == "val"
    loaders = vision.ImageDataLoaders.from_df(
        table,
        options.data.parent,
        fn_col="path",
        label_col="labels",
        label_delim="|",
        valid_col="is_val",
        item_tfms=vision.Resize(options.img_size, method="squash"),
        bs=options.batch_size,
        num_workers=options.workers,
        seed=options.seed,
        device="cpu",
    )
    own_weights: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(options.weights)}}
    name = options.arch.removeprefix("timm/")
    learner = vision.vision_learner(
        loaders, name, metrics=vision.APScoreMulti(), path=options.output, **own_weights
    )
    clock, began = Clock(), time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(options.epochs - 1, cbs=clock)
        learner.save("final")
    report(clock.curve, began)


if __name__ == "__main__":
    main()
