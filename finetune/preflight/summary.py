"""What a data set is, in figures: sizes, formats, modes, shapes, classes of each part."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.sample import SPLITS
from finetune.preflight.classes import compute_imbalance
from finetune.preflight.seen import Seen


def summarise(seen: Seen) -> dict[str, Any]:
    """Return plain JSON; docs/check.md describes it."""
    dataset, rows = seen.dataset, seen.looks.rows
    places = range(len(seen.samples))
    widths, heights = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    return {
        "num_images": len(dataset.samples),
        "num_classes": dataset.num_classes,
        "num_unreadable": len(seen.checked.bad),
        "num_groups": len({sample.group for sample in dataset.samples if sample.group}),
        "val_was_drawn": dataset.val_was_drawn,
        "parts": {
            split: {
                "num_images": len(dataset.of(split)),
                "classes": dict(zip(dataset.classes, dataset.counts(split), strict=True)),
                "imbalance_ratio": compute_imbalance(dataset.counts(split)),
            }
            for split in SPLITS
            if dataset.of(split)
        },
        "formats": _counted(seen.looks.format_of(place) for place in places),
        "modes": _counted(seen.looks.mode_of(place) for place in places),
        "width": _spread(widths),
        "height": _spread(heights),
        "aspect_ratio": _spread(widths / heights),
        "bytes": _spread(rows["num_bytes"].astype(np.float64)) | {"total": int(rows["num_bytes"].sum())},
    }


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: NDArray[np.float64]) -> dict[str, float | int | None]:
    """Return the smallest, the median and the largest."""
    if not len(values):
        return {"min": None, "median": None, "max": None}
    found = {"min": values.min(), "median": np.median(values), "max": values.max()}
    return {name: round(float(value), 4) for name, value in found.items()}
