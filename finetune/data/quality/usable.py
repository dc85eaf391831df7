"""The images that a run can use: unreadable files left out, leaks refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from finetune.data.dataset import BadImage, Dataset, PreparedDataset, Sample, sample_order
from finetune.data.prepare import draw_copies_together
from finetune.data.quality.files import UNREADABLE
from finetune.data.quality.report import QualityReport, inspect_dataset
from finetune.data.samples import is_sample
from finetune.data.scan import CheckedImages, check_bad
from finetune.errors import DataError
from finetune.recipe import Recipe
from finetune.recipe.sections import DataSettings
from finetune.runs.bad_images import write_bad_images
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display, SilentDisplay

SHOWN = 5
"""Most issues that a run shows."""


def check_data(
    dataset: Dataset, checked: CheckedImages, folder: RunFolder, display: Display, recipe: Recipe
) -> PreparedDataset:
    """Return the dataset without its unreadable images, and write ``check.json`` and the list of bad images.

    Training images that an earlier attempt lost during training stay in the dataset, so that the order of
    every epoch stays the same; the loader leaves them out again.

    Raises:
        DataError: exact copies lie in two splits and that is not allowed, or too many images are unreadable.
    """
    dataset = _draw(dataset, checked, recipe, display)
    with display.busy("comparing images"):
        report = inspect_dataset(dataset, checked, recipe.data.allow_leaks, dataset.issues)
    write_json(folder.check, report.to_dict())
    _show_issues(report, folder, display, recipe.data)
    _refuse_leaks(report)
    for image in checked.bad[:10]:
        display.warn(f"{image.path} cannot be read: {image.reason}")
    lost = _lost_before(dataset, checked, folder)
    listed = _list_bad(checked, lost)
    write_bad_images(folder, [(image.path, image.split, image.reason) for image in listed])
    return _leave_out(dataset, checked, lost)


def find_usable(
    dataset: Dataset, checked: CheckedImages, folder: RunFolder, recipe: Recipe, *, forget: bool
) -> PreparedDataset:
    """Return or raise what :func:`check_data` would, without writing or showing anything.

    Args:
        dataset: the images that exist now.
        checked: result of their scan.
        folder: folder of a run that has begun.
        recipe: recipe of this attempt.
        forget: whether images that an earlier attempt lost count as any other unreadable image.
    """
    dataset = _draw(dataset, checked, recipe, SilentDisplay())
    _refuse_leaks(inspect_dataset(dataset, checked, recipe.data.allow_leaks, dataset.issues))
    return _leave_out(dataset, checked, {} if forget else _lost_before(dataset, checked, folder))


_Lost = Mapping[str, tuple[BadImage, Sample]]


def _draw(dataset: Dataset, checked: CheckedImages, recipe: Recipe, display: Display) -> Dataset:
    if not dataset.val_was_drawn:
        return dataset
    return draw_copies_together(dataset, checked.digests, recipe, display)


def _list_bad(checked: CheckedImages, lost: _Lost) -> list[BadImage]:
    bad = [image for image in checked.bad if image.path not in lost]
    return [*bad, *(image for image, _ in lost.values())]


def _leave_out(dataset: Dataset, checked: CheckedImages, lost: _Lost) -> PreparedDataset:
    """Return the dataset without its unreadable images; refuse if there are too many.

    Raises:
        DataError: see :func:`finetune.data.scan.check_bad`.
    """
    usable = check_bad(dataset.without(lost), [image for image in checked.bad if image.path not in lost])
    samples = sorted([*usable.samples, *(sample for _, sample in lost.values())], key=sample_order)
    usable = replace(usable, samples=tuple(samples))
    return usable.prepared(checked.digests, _list_bad(checked, lost), checked.find_value_range(usable))


def _show_issues(report: QualityReport, folder: RunFolder, display: Display, settings: DataSettings) -> None:
    """Warn of the first issues that reading the data has not reported already."""
    dataset = report.scanned.dataset
    reported = {issue.message for issue in dataset.issues}
    new = [issue for issue in report.issues if issue.severity != "note" and issue.message not in reported]
    # The built-in samples have no larger originals.
    ignored = {*UNREADABLE, "picture-small"} if is_sample(settings.path or "") else {*UNREADABLE}
    new = [issue for issue in new if issue.code not in ignored]
    for issue in new[:SHOWN]:
        display.warn(issue.message)
    if len(new) > SHOWN:
        display.say(f"and {len(new) - SHOWN} more issues, in {folder.check}")


def _refuse_leaks(report: QualityReport) -> None:
    """Refuse exact copies in two splits.

    Raises:
        DataError: there are some, and that is not allowed.
    """
    leaks = [issue for issue in report.errors if issue.code == "leak"]
    if leaks:
        shown = "".join(f"\n  {path}" for path in leaks[0].paths[:SHOWN])
        found = f"{' '.join(issue.message for issue in leaks)} Among them:{shown}"
        raise DataError(f"data in {report.scanned.dataset.root}", found, leaks[0].fix)


def _lost_before(
    dataset: Dataset, checked: CheckedImages, folder: RunFolder
) -> dict[str, tuple[BadImage, Sample]]:
    """Return, by path, the training images that an earlier attempt lost and that are still unreadable."""
    run = RunReader(folder)
    labels = {row["path"]: row["label"] for row in run.split}
    return {
        row["path"]: (
            BadImage(row["path"], "train", row["reason"]),
            Sample(row["path"], dataset.labels.index(labels[row["path"]]), "train"),
        )
        for row in run.bad_images
        if labels.get(row["path"]) in dataset.labels and row["path"] not in checked.digests
    }
