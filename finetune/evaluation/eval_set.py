"""The labelled images that finished models are evaluated on, and which of them a model has seen before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.channels.bands import check_takes
from finetune.data.dataset import Dataset, PreparedDataset
from finetune.data.inputs import EvalSplit, find_labelled
from finetune.data.scan import scan_images
from finetune.data.tables.config import BY_NAMES, TableConfig
from finetune.errors import DataError, UsageError, count
from finetune.evaluation.variants import Model
from finetune.features.extraction import open_images
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display
from finetune.targets import SINGLE


@dataclass(frozen=True)
class EvalSet:
    """Labelled images that models are evaluated on.

    Attributes:
        dataset: the images; labels index the first model's classes.
        split: train, val or test; all if the images are of several splits or of none.
    """

    dataset: PreparedDataset
    split: str


def find_eval_set(
    first: Model, data: Path | None, split: EvalSplit | None, follow_links: bool, display: Display
) -> EvalSet:
    """Find the images to evaluate models on, and decode every one of them.

    Args:
        first: the first model; labels are mapped to its classes.
        data: a folder, an archive, a CSV file; None for the data of the model's run. If the data are those
            that the run was trained on, the run's own split is used.
        split: train, val, test or all; None for test if there is one, else val, else all.
        follow_links: read images through links that lead out of the data.
        display: shows progress and warnings.

    Raises:
        UsageError: no data were named, and the model does not come from a run.
        DataError: images are missing or cannot be read, or have a class that the model does not know.
    """
    run, classes = first.run, first.predictor.classes
    if run is not None and (data is None or _is_own(run, data)):
        if _has_split(run, split):
            dataset = _prepare(first, _images_of_run(first, run, split, display), display)
            _refuse_changed(run, dataset.digests)
            return EvalSet(dataset, _name_split(dataset, split))
        data = _data_of(run)
    if data is None:
        raise UsageError("finetune evaluate", "no data was named", "Add --data FOLDER.")
    with display.count(f"reading {data}") as on_progress:
        target = first.predictor.target
        found = find_labelled(data, classes, split, follow_links, on_progress, _table_of(run), target)
    for warning in found.warnings:
        display.warn(warning)
    return EvalSet(_prepare(first, found, display), _name_split(found, split))


def _refuse_changed(run: RunFolder, digests: Mapping[str, str]) -> None:
    before = RunReader(run).digests
    changed = sorted(path for path, digest in digests.items() if before.get(path) != digest)
    if changed:
        images = count(len(digests), "image")
        found = f"{len(changed)} of {images} changed since the run (for example {changed[0]})"
        fix = "Restore them, or evaluate on a copy of the data in another folder."
        raise DataError(f"the data of {run.path}", found, fix)


def _is_own(run: RunFolder, data: Path) -> bool:
    """Return whether the data are those of the run; its own split is used then."""
    own = _data_of(run)
    return data.resolve() in (run.path.resolve(), own.resolve() if own is not None else None)


def _data_of(run: RunFolder) -> Path | None:
    recipe = RunReader(run).recipe
    return Path(recipe.data.path) if recipe is not None and recipe.data.path is not None else None


def _table_of(run: RunFolder | None) -> TableConfig:
    """Return how the run read its table, since a table of test images is often written like it."""
    recipe = RunReader(run).recipe if run is not None else None
    return TableConfig.of(recipe) if recipe is not None else BY_NAMES


def _has_split(run: RunFolder, split: EvalSplit | None) -> bool:
    """Return whether the run recorded this split; a test split may have been added since."""
    return split in (None, "all") or any(row["split"] == split for row in RunReader(run).split)


def _images_of_run(first: Model, run: RunFolder, split: EvalSplit | None, display: Display) -> Dataset:
    """Return the images of a run's own data: of the named split, or of the one that the run was evaluated on.

    Raises:
        DataError: some of them are missing, or the split is empty.
    """
    classes = first.predictor.classes
    found = open_images(load_recipe(None, {"data": {"path": str(run.path)}}), display)
    rows = RunReader(run).split
    wanted = split or ("test" if any(row["split"] == "test" for row in rows) else "val")
    target = first.predictor.target
    labels = classes if target == SINGLE else found.labels
    index = {name: number for number, name in enumerate(labels)}
    known = {row["path"]: row for row in rows if wanted in ("all", row["split"])}
    samples = tuple(
        replace(sample, label=index[known[sample.path]["label"]])
        for sample in found.samples
        if sample.path in known and known[sample.path]["label"] in index
    )
    if len(samples) < len(known):
        lost = sorted(known.keys() - {sample.path for sample in samples})
        missing = f"of {count(len(known), 'image')} of its {wanted} split, {len(lost)} cannot be found"
        raise DataError(
            f"the data of {run.path}",
            f"{missing} (for example {lost[0]})",
            "Restore them, or name other --data.",
        )
    if not samples:
        raise DataError(f"the data of {run.path}", f"it has no {wanted} images", "Choose another --split.")
    return replace(found, classes=tuple(classes), samples=samples, target=target)


def check_unchanged(dataset: PreparedDataset, display: Display) -> None:
    """Check after an evaluation that the images are those that were recorded before it.

    Raises:
        DataError: an image was changed or removed meanwhile: its prediction may be that of another image.
    """
    now = scan_images(
        dataset, display, "checking that no image changed", decode=False, is_subset=True
    ).digests
    changed = [path for path, digest in dataset.digests.items() if now.get(path) != digest]
    if changed:
        images = count(len(changed), "image was", "images were")
        found = f"{images} changed or removed meanwhile (for example {changed[0]})"
        fix = "Do not change images while a command runs, and start again."
        raise DataError(f"data in {dataset.root}", found, fix)


def _prepare(model: Model, dataset: Dataset, display: Display) -> PreparedDataset:
    """Decode every image once.

    Raises:
        DataError: an image cannot be read: metrics over fewer images than the user expects would mislead. Or
            the model takes arrays and the data are images, or the other way round.
    """
    check_takes(model.predictor.card, dataset)
    channels = model.predictor.card.preprocessing.channels
    checked = scan_images(dataset, display, "checking images", is_subset=True, channels=channels)
    if checked.bad:
        lines = "".join(f"\n  {image.path} ({image.reason})" for image in checked.bad[:5])
        more = f"\n  and {len(checked.bad) - 5} more" if len(checked.bad) > 5 else ""
        found = f"{len(checked.bad)} of {count(len(dataset.samples), 'image')} cannot be read:{lines}{more}"
        raise DataError(f"data in {dataset.root}", found, "Replace these files, or remove them yourself.")
    return dataset.prepared(checked.digests)


@dataclass(frozen=True)
class Overlap:
    """How many images of the eval set the models have seen before.

    Attributes:
        trained: images that a model was trained on.
        chose: images by which a model's best epoch was chosen.
        fitted: images that a model's temperature was fitted on.
        is_known: whether the runs of all models are known, so that these counts are complete.
    """

    trained: int
    chose: int
    fitted: int
    is_known: bool


def find_overlap(models: Sequence[Model], eval_set: EvalSet, allow_leaks: bool, display: Display) -> Overlap:
    """Count the images that a model was trained on, chosen by or calibrated on, and warn of them.

    Args:
        models: at least one.
        eval_set: the images.
        allow_leaks: evaluate on images that a model was trained on.
        display: shows the warning.

    Raises:
        DataError: a model was trained on some of them, and that is not allowed.
    """
    samples, digests = eval_set.dataset.samples, eval_set.dataset.digests
    images = [digests[sample.path] for sample in samples]
    for model in models:
        learned = [sample for sample in samples if digests[sample.path] in model.seen.trained]
        if learned and not allow_leaks:
            found = f"it was trained on {len(learned)} of {count(len(images), 'image')} "
            fix = "Evaluate it on other images, or add --allow-leaks to use these anyway."
            raise DataError(f"evaluating {model.name}", f"{found}(for example {learned[0].path})", fix)
    overlap = Overlap(
        trained=sum(any(image in model.seen.trained for model in models) for image in images),
        chose=sum(any(image in model.seen.chose for model in models) for image in images),
        fitted=sum(any(image in model.seen.fitted for model in models) for image in images),
        is_known=all(model.seen.is_known for model in models),
    )
    if overlap.trained:
        message = f"{overlap.trained} of these images were trained on"
        display.warn(f"{message}: the metrics say nothing about new images")
    elif overlap.chose:
        message = f"{overlap.chose} of these images also chose the epoch"
        display.warn(f"{message}: the metrics are slightly optimistic")
    elif not overlap.is_known:
        display.warn(
            "it is not known which images a model was trained on: if some of these are among them, "
            "the metrics are optimistic"
        )
    return overlap


def _name_split(dataset: Dataset, split: EvalSplit | None) -> str:
    """Return the split that all images belong to, or ``all``."""
    splits = {sample.split for sample in dataset.samples}
    is_plain = splits == {"train"} and split != "train"
    return splits.pop() if len(splits) == 1 and not is_plain else "all"
