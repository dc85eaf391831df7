"""The images that a run can use: unreadable files left out, leaks refused."""

from __future__ import annotations

from dataclasses import replace

from finetune.data.dataset import BadImage, Dataset, PreparedDataset, Sample
from finetune.data.prepare import _place, draw_copies_together
from finetune.data.quality.files import UNREADABLE
from finetune.data.quality.report import inspect_dataset
from finetune.data.samples import is_sample
from finetune.data.scan import Checked, check_bad
from finetune.errors import DataError
from finetune.recipe import Recipe
from finetune.recipe.schema import DataSettings
from finetune.runs.bad_images import write_bad_images
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display

SHOWN = 5
"""Findings of the preflight that a run shows."""


def check_data(
    dataset: Dataset, checked: Checked, folder: RunFolder, display: Display, recipe: Recipe
) -> PreparedDataset:
    """Return the images that can be used: all but a few, or a refusal of what cannot be stood behind.

    Images that an earlier attempt lost on its way keep their places: they stay lost, and every epoch keeps
    its order.
    """
    if dataset.val_was_drawn:
        dataset = draw_copies_together(dataset, checked.digests, recipe, display)
    _look_over(dataset, checked, folder, display, recipe.data)
    for image in checked.bad[:10]:
        display.warn(f"{image.path} cannot be read: {image.reason}")
    lost = _lost_before(dataset, checked, folder)
    bad = [image for image in checked.bad if image.path not in lost]
    listed = [*bad, *(image for image, _ in lost.values())]
    write_bad_images(folder, [(image.path, image.split, image.reason) for image in listed])
    usable = check_bad(dataset.without(lost), bad)
    samples = sorted([*usable.samples, *(sample for _, sample in lost.values())], key=_place)
    return replace(usable, samples=tuple(samples)).prepared(checked.digests, listed)


def _look_over(
    dataset: Dataset, checked: Checked, folder: RunFolder, display: Display, settings: DataSettings
) -> None:
    """Write ``check.json``, say what stands out, and refuse exact copies in two splits.

    Raises:
        DataError: there are some, and they are not allowed.
    """
    report = inspect_dataset(dataset, checked, settings.allow_leaks, dataset.issues)
    write_json(folder.check, report.to_dict())
    said = {issue.message for issue in dataset.issues}
    news = [one for one in report.issues if one.severity != "note" and one.message not in said]
    # A sample is as small as it is; nobody has larger originals of it.
    known = {*UNREADABLE, "picture-small"} if is_sample(settings.path or "") else {*UNREADABLE}
    news = [one for one in news if one.code not in known]
    for issue in news[:SHOWN]:
        display.warn(issue.message)
    if len(news) > SHOWN:
        display.say(f"and {len(news) - SHOWN} findings more, in {folder.check}")
    leaks = [issue for issue in report.errors if issue.code == "leak"]
    if leaks:
        shown = "".join(f"\n  {path}" for path in leaks[0].paths[:SHOWN])
        found = f"{' '.join(issue.message for issue in leaks)} Among them:{shown}"
        raise DataError(f"data in {dataset.root}", found, leaks[0].fix)


def _lost_before(dataset: Dataset, checked: Checked, folder: RunFolder) -> dict[str, tuple[BadImage, Sample]]:
    """Return the training images that an earlier attempt began with and lost, and that are still lost."""
    run = RunReader(folder)
    began = {row["path"]: row["label"] for row in run.split}
    return {
        row["path"]: (
            BadImage(row["path"], "train", row["reason"]),
            Sample(row["path"], dataset.classes.index(began[row["path"]]), "train"),
        )
        for row in run.bad_images
        if began.get(row["path"]) in dataset.classes and row["path"] not in checked.digests
    }
