"""``finetune check``: find the problems of a dataset before training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from finetune.data.dataset import Dataset, Issue, to_check
from finetune.data.discover import check_missing, discover_leniently
from finetune.data.prepare import check_outside
from finetune.data.quality.report import inspect_dataset
from finetune.data.quality.sheet import find_sections
from finetune.data.scan import CheckedImages, scan_images
from finetune.data.split import SplitConfig, keep_copies_together
from finetune.data.tables.config import TableConfig
from finetune.errors import DataError, UsageError, count
from finetune.plots.sheet import write_sections
from finetune.recipe import Recipe
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from pretrained.preprocessing import IMAGE_CHANNELS

CHECK, FOLDS = "check.json", "folds.csv"


def check(recipe: Recipe, output: Path, display: Display) -> dict[str, Any]:
    """Scan every image of a dataset, and write all issues that are found.

    Args:
        recipe: only ``data`` and ``seed`` are used. With folds, the first fold is the validation split.
        output: a new folder for ``check.json``, ``check.png`` and, with folds, ``folds.csv``.
        display: shows progress.

    Returns:
        The content of ``check.json``; the file is not written for a path that does not exist.

    Raises:
        FinetuneError: the output cannot be written. Problems of the data are in the result instead.
    """
    settings = recipe.data
    if not settings.path:
        raise UsageError("finetune check", "no data was named", "Name a folder, a .zip or a CSV file.")
    if missing := check_missing(settings.path):
        return missing
    with translated_errors():
        with display.count(f"reading {settings.path}") as on_progress:
            config = SplitConfig.of(recipe)
            dataset, issues = discover_leniently(
                Path(settings.path), config, settings.follow_links, on_progress, table=TableConfig.of(recipe)
            )
        _check_outside(output, dataset, Path(settings.path))
        with new_folder(output) as folder:
            found = (
                to_check(issues, {})
                if dataset is None
                else _inspect(recipe, dataset, issues, folder, display)
            )
            write_json(folder / CHECK, found)
        return found


def _check_outside(output: Path, dataset: Dataset | None, data: Path) -> None:
    if dataset is not None:
        check_outside(output, dataset)
    elif data.is_dir():
        check_outside(output, Dataset(data.absolute(), (), ()))


def _inspect(
    recipe: Recipe, dataset: Dataset, issues: tuple[Issue, ...], output: Path, display: Display
) -> dict[str, Any]:
    channels = recipe.input.channels
    number = channels if isinstance(channels, int) else IMAGE_CHANNELS
    checked = scan_images(dataset, display, "checking images", channels=number)
    if dataset.val_was_drawn:
        dataset, issues = _join_copies(dataset, checked, recipe, issues)
    report = inspect_dataset(dataset, checked, recipe.data.allow_leaks, issues)
    write_sections(RunFolder(output).check_sheet, find_sections(report))
    result = report.to_dict()
    if any(sample.fold for sample in dataset.samples):
        result["summary"]["folds"] = _write_folds(dataset, output)
    return result


def _join_copies(
    dataset: Dataset, checked: CheckedImages, recipe: Recipe, issues: tuple[Issue, ...]
) -> tuple[Dataset, tuple[Issue, ...]]:
    """Keep exact copies in one split, as a run does."""
    try:
        dataset, moved = keep_copies_together(dataset, checked.digests, SplitConfig.of(recipe))
    except DataError as error:
        return dataset, (*issues, Issue("class-copies", "error", error.found, error.fix))
    if moved:
        message = f"{count(moved, 'image')} of the drawn split moved, so that exact copies stay in one split."
        issues = (*issues, Issue("draw-moved", "note", message, "Nothing needs to be done.", moved))
    return dataset, issues


def _write_folds(dataset: Dataset, output: Path) -> dict[str, dict[str, int]]:
    """Write the fold of each image; return the number of images by fold and class."""
    samples = sorted((sample for sample in dataset.samples if sample.fold), key=lambda sample: sample.path)
    rows = [(sample.path, dataset.classes[sample.label], sample.fold) for sample in samples]
    write_csv(output / FOLDS, rows, ("path", "label", "fold"))
    counts = Counter((sample.fold, sample.label) for sample in samples)
    return {
        str(fold): {name: counts[fold, label] for label, name in enumerate(dataset.classes)}
        for fold in sorted({sample.fold for sample in samples})
    }
