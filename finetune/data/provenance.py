"""The images that a model has seen: those it was trained on, and those that selected or calibrated it.

Images are identified by content (SHA-256), from ``split.csv`` of the model's run and of the runs that it
started from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.dataset import PreparedDataset
from finetune.errors import DataError, UsageError
from finetune.recipe import Recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display
from pretrained.config import read_config

_MOST_RUNS = 100
"""Longest chain of runs, each of which started from the weights of the one before."""


@dataclass(frozen=True)
class SeenImages:
    """SHA-256 digests of the images that a model has seen.

    Attributes:
        trained: images that the weights were trained on.
        chose: images that selected the best epoch, or training over its linear floor.
        fitted: images that the temperature was fitted on.
        is_known: whether the sets are complete; otherwise there may be other images.
    """

    trained: frozenset[str] = frozenset()
    chose: frozenset[str] = frozenset()
    fitted: frozenset[str] = frozenset()
    is_known: bool = False


def find_seen(run: RunFolder | None) -> SeenImages:
    """Return the images that the model of a run has seen; unknown without a run.

    Raises:
        DataError: a split cannot be read.
    """
    if run is None:
        return SeenImages()
    own = _digests_by_split(run)
    reader = RunReader(run, tolerant=True)
    metrics = reader.metrics
    is_choosing = bool(metrics.get("epochs")) or bool(metrics.get("split_chose_checkpoint"))
    above = find_ancestors(reader.recipe)
    return SeenImages(
        trained=own["train"] | above.trained,
        chose=(own["val"] if is_choosing else frozenset()) | above.chose,
        fitted=own["val"],
        is_known=bool(metrics) and run.split.is_file() and above.is_known,
    )


def find_ancestors(recipe: Recipe | None) -> SeenImages:
    """Return the images that the backbone of a recipe has seen, if it is a run or started from one.

    Published weights count as known: they were not trained on a folder of the user.
    """
    trained: set[str] = set()
    chose: set[str] = set()
    for run in _ancestors(recipe):
        if run is None:
            return SeenImages(frozenset(trained), frozenset(chose))
        digests = _digests_by_split(run)
        trained |= digests["train"]
        chose |= digests["val"]
    return SeenImages(frozenset(trained), frozenset(chose), is_known=True)


def check_seen(dataset: PreparedDataset, recipe: Recipe, display: Display) -> dict[str, int]:
    """Count the evaluated images that a run or its backbone was trained on, for ``metrics.json``.

    Args:
        dataset: dataset of the run.
        recipe: recipe of the run: its backbone, and whether leaks are allowed.
        display: shows a warning if the backbone was trained on some of them.

    Returns:
        ``num_leaked``: images with an exact copy in the training split; ``num_seen_by_backbone``: images that
        the run of the backbone was trained on. Both count images of the split of the final metrics.

    Raises:
        DataError: the backbone was trained on validation or test images, and that is not allowed.
    """
    evaluated = [sample for sample in dataset.samples if sample.split != "train"]
    own = {dataset.digests.get(sample.path) for sample in dataset.of("train")}
    above = find_ancestors(recipe).trained
    seen = [sample for sample in evaluated if dataset.digests.get(sample.path) in above]
    if seen:
        found = (
            f"{len(seen)} of {len(evaluated)} validation and test images are among those that the backbone "
        )
        found += f"was trained on ({seen[0].path}, for example)"
        if not recipe.data.allow_leaks:
            fix = "Use the backbone's own split or other images, or continue with --allow-leaks."
            raise DataError(f"--backbone {recipe.backbone.name}", found, fix)
        display.warn(found)
    eval_samples = dataset.of(dataset.eval_split)
    return {
        "num_leaked": sum(dataset.digests.get(sample.path) in own for sample in eval_samples),
        "num_seen_by_backbone": sum(dataset.digests.get(sample.path) in above for sample in eval_samples),
    }


def _ancestors(recipe: Recipe | None) -> Iterator[RunFolder | None]:
    """Yield the runs that a recipe's backbone comes from, nearest first; None where a run is missing."""
    for _ in range(_MOST_RUNS):
        if recipe is None:
            yield None
            return
        name = (recipe.backbone.name or "").removeprefix("local-dir:")
        if recipe.strategy.starts_random or recipe.backbone.weights or not Path(name).is_absolute():
            return
        run = find_run(Path(name))
        if run is None and not _is_ours(Path(name)):
            return
        yield run
        if run is None:
            return
        recipe = RunReader(run, tolerant=True).recipe


def _is_ours(folder: Path) -> bool:
    """Return whether a run exported a folder, or it no longer exists; others hold published weights."""
    files = (folder / "config.json", folder / "model" / "config.json")
    configs = [_read_config(file) for file in files if file.is_file()]
    return not configs or any("finetune" in config for config in configs)


def find_run(folder: Path) -> RunFolder | None:
    """Return the run of a folder (itself, or the one whose ``model`` it is), or None."""
    above = folder.absolute().parent
    for run in (RunFolder(folder), RunFolder(above) if folder.name == "model" else RunFolder(folder)):
        if run.split.is_file() and run.model.is_dir():
            return run
    return None


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return a network's config; empty for anything else of that name."""
    try:
        return read_config(str(path), path)
    except UsageError:
        return {}


def _digests_by_split(run: RunFolder) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for row in RunReader(run).split:
        found.setdefault(row["split"], set()).add(row["sha256"])
    return {split: frozenset(digests) for split, digests in found.items()}
