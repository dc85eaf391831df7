"""fastai with several labels an image: ``vision_learner`` and ``fine_tune`` with the library's defaults."""

from __future__ import annotations

import pandas as pd
from fastai.vision import all as vision

from benchmarks.peers.common import read_arguments
from benchmarks.peers.fastai_fine_tune import fine_tune


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
    fine_tune(options, loaders, vision.APScoreMulti())


if __name__ == "__main__":
    main()
