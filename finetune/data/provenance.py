"""Which images a model has seen: those it was trained on, and those that chose or calibrated it.

Known by content, from the split of the run that made it, and of the runs that this one began from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.dataset import PreparedDataset
from finetune.errors import DataError
from finetune.recipe import Recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display

_MOST_RUNS = 100
"""In a row, each of which began from the one before."""


@dataclass(frozen=True)
class SeenImages:
    """Digests (sha256) of images.

    Attributes:
        trained: weights depend on them.
        chose: the best epoch depends on them, or the choice between a training and its floor.
        fitted: the temperature depends on them.
        is_known: these are all; otherwise there may be others.
    """

    trained: frozenset[str] = frozenset()
    chose: frozenset[str] = frozenset()
    fitted: frozenset[str] = frozenset()
    is_known: bool = False


def find_seen(run: RunFolder | None) -> SeenImages:
    """Return what the model of a run has seen; nothing is known without its run.

    Raises:
        DataError: a split cannot be read.
    """
    if run is None:
        return SeenImages()
    own = _parts(run)
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
    """Return what the backbone of a recipe has seen of images, where it is itself a run, or began from one.

    Published weights count as known: what they were trained on is nobody's folder.
    """
    trained: set[str] = set()
    chose: set[str] = set()
    for run in _ancestors(recipe):
        if run is None:
            return SeenImages(frozenset(trained), frozenset(chose))
        parts = _parts(run)
        trained |= parts["train"]
        chose |= parts["val"]
    return SeenImages(frozenset(trained), frozenset(chose), is_known=True)


def check_seen(dataset: PreparedDataset, recipe: Recipe, display: Display) -> dict[str, int]:
    """Count the judged images that a run has seen otherwise, for ``metrics.json``.

    Args:
        dataset: of the run.
        recipe: whose backbone counts, and whether leaks are allowed.
        display: is told where they are.

    Returns:
        ``num_leaked``, of which an exact copy was trained on, and ``num_seen_by_backbone``, which the run was
        trained on that the weights come from.

    Raises:
        DataError: the backbone was trained on some, and that is not allowed.
    """
    judged = [sample for sample in dataset.samples if sample.split != "train"]
    own = {dataset.digests.get(sample.path) for sample in dataset.of("train")}
    above = find_ancestors(recipe).trained
    seen = [sample for sample in judged if dataset.digests.get(sample.path) in above]
    if seen:
        found = f"{len(seen)} of {len(judged)} validation and test images are among those that the backbone "
        found += f"was trained on ({seen[0].path} for one)"
        if not recipe.data.allow_leaks:
            fix = "Use the backbone's own split or other images, or continue with --allow-leaks."
            raise DataError(f"--backbone {recipe.backbone.name}", found, fix)
        display.warn(found)
    part = dataset.of(dataset.eval_split)
    return {
        "num_leaked": sum(dataset.digests.get(sample.path) in own for sample in part),
        "num_seen_by_backbone": sum(dataset.digests.get(sample.path) in above for sample in part),
    }


def _ancestors(recipe: Recipe | None) -> Iterator[RunFolder | None]:
    """Yield the runs that a recipe began from, the nearest first; None where the trail is lost."""
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
    """A folder that a run has exported, or one that is gone; others hold published weights."""
    files = (folder / "config.json", folder / "model" / "config.json")
    configs = [_read_config(file) for file in files if file.is_file()]
    return not configs or any("finetune" in config for config in configs)


def find_run(folder: Path) -> RunFolder | None:
    """Return the run of a folder: itself, or the one whose ``model`` it is."""
    above = folder.absolute().parent
    for run in (RunFolder(folder), RunFolder(above) if folder.name == "model" else RunFolder(folder)):
        if run.split.is_file() and run.model.is_dir():
            return run
    return None


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(run: RunFolder) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for row in RunReader(run).split:
        found.setdefault(row["split"], set()).add(row["sha256"])
    return {part: frozenset(digests) for part, digests in found.items()}
