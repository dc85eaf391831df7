"""One reading of all pictures, for every command but ``run``: their digests, and their final parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from finetune.data.check import Checked, check_images
from finetune.data.looks import LookStore
from finetune.data.sample import Dataset
from finetune.data.sample import Split as Part
from finetune.display import Display
from finetune.job.data import draw_copies_together
from finetune.recipe import Recipe


def read_pictures(recipe: Recipe, dataset: Dataset, display: Display) -> tuple[Dataset, Checked]:
    """Take the digest of every picture, and bring exact copies to one side of a draw, as a run does.

    Copies across parts that were given are told of: what is learnt by heart would be judged.
    """
    with display.track("reading images", len(dataset.samples)) as advance:
        done = 0

        def tell(now: int) -> None:
            nonlocal done
            advance(now - done, "")
            done = now

        store = LookStore(dataset.root)
        checked = check_images(dataset, tell, decode=False, store=store)
    if dataset.val_was_drawn and dataset.is_labelled:
        dataset = draw_copies_together(dataset, checked.digests, recipe, display)
    if shared := _count_shared(dataset, checked.digests):
        said = "1 picture lies" if shared == 1 else f"{shared} pictures lie"
        display.warn(f"{said} in more than one part, byte for byte the same (`finetune check` names them).")
    return dataset, checked


def _count_shared(dataset: Dataset, digests: Mapping[str, str]) -> int:
    """Return how many pictures lie in two parts or more."""
    parts: defaultdict[str, set[Part]] = defaultdict(set)
    for sample in dataset.samples:
        if sample.path in digests:
            parts[digests[sample.path]].add(sample.split)
    return sum(len(found) > 1 for found in parts.values())
