"""The images that finished models are judged by, and which of them a model has seen before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.dataset import Dataset
from finetune.data.inputs import EvalSplit, find_labelled
from finetune.data.scan import check_images
from finetune.data.scan_cache import ScanCache
from finetune.errors import DataError, UsageError
from finetune.evaluation.variants import Model
from finetune.features.extraction import open_images
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display


@dataclass(frozen=True)
class EvalSet:
    """Labelled images that models are judged by.

    Attributes:
        dataset: its labels count as the first model's classes do.
        digests: sha256 of each, by path.
        part: what they are called: train, val, test, or all where they lie in several parts, or in none.
    """

    dataset: Dataset
    digests: Mapping[str, str]
    part: str


def find_judged(
    first: Model, data: Path | None, part: EvalSplit | None, follow_links: bool, display: Display
) -> EvalSet:
    """Find the images that models are judged by, and read every one of them.

    Args:
        first: of the models; its classes count.
        data: a folder, an archive, a CSV file; None for the data of the model's run. For the very data of
            that run its own split counts.
        part: train, val, test or all; None for test where there is one, else val, else all.
        follow_links: read images through links that lead out of the data.
        display: shows progress and warnings.

    Raises:
        UsageError: no data were named, and the model has no run.
        DataError: images are gone or cannot be read, or have a class that the model does not know.
    """
    run, classes = first.run, first.predictor.classes
    if run is not None and (data is None or _is_own(run, data)):
        if _has_part(run, part):
            dataset = _images_of_run(run, classes, part, display)
            digests = _check_images(dataset, display)
            _refuse_changed(run, digests)
            return EvalSet(dataset, digests, _name_part(dataset, part))
        data = _data_of(run)
    if data is None:
        raise UsageError("finetune evaluate", "no data was named", "Add --data FOLDER.")
    with display.count(f"reading {data}") as tell:
        dataset = find_labelled(data, classes, part, follow_links, tell)
    for warning in dataset.warnings:
        display.warn(warning)
    return EvalSet(dataset, _check_images(dataset, display), _name_part(dataset, part))


def _refuse_changed(run: RunFolder, digests: Mapping[str, str]) -> None:
    before = RunReader(run).digests
    changed = sorted(path for path, digest in digests.items() if before.get(path) != digest)
    if changed:
        found = f"{len(changed)} of {len(digests)} images have another content now ({changed[0]} for one)"
        fix = "Put them back; or judge by a copy in another folder, as other images."
        raise DataError(f"the data of {run.path}", found, fix)


def _is_own(run: RunFolder, data: Path) -> bool:
    """The very folder that the run was trained on: only its own split says what is what in it."""
    own = _data_of(run)
    return data.resolve() in (run.path.resolve(), own.resolve() if own is not None else None)


def _data_of(run: RunFolder) -> Path | None:
    recipe = RunReader(run).recipe
    return Path(recipe.data.path) if recipe is not None and recipe.data.path is not None else None


def _has_part(run: RunFolder, part: EvalSplit | None) -> bool:
    """Whether the run knew of such a part: a test part may have come since."""
    return part in (None, "all") or any(row["split"] == part for row in RunReader(run).split)


def _images_of_run(
    run: RunFolder, classes: Sequence[str], part: EvalSplit | None, display: Display
) -> Dataset:
    """Return the images of a run's own data in the part that it was judged by, or the one that was named.

    Raises:
        DataError: some of them are gone, or there is none.
    """
    found = open_images(load_recipe(None, {"data": {"path": str(run.path)}}), display)
    rows = RunReader(run).split
    wanted = part or ("test" if any(row["split"] == "test" for row in rows) else "val")
    index = {name: number for number, name in enumerate(classes)}
    known = {row["path"]: row for row in rows if wanted in ("all", row["split"])}
    samples = tuple(
        replace(sample, label=index[known[sample.path]["label"]])
        for sample in found.samples
        if sample.path in known and known[sample.path]["label"] in index
    )
    if len(samples) < len(known):
        lost = sorted(known.keys() - {sample.path for sample in samples})
        said = f"{len(lost)} of {len(known)} images of its part {wanted} are gone ({lost[0]} for one)"
        raise DataError(f"the data of {run.path}", said, "Put them back, or name other --data.")
    if not samples:
        raise DataError(f"the data of {run.path}", f"has no part {wanted}", "Take another --split.")
    return replace(found, classes=tuple(classes), samples=samples)


def _check_images(dataset: Dataset, display: Display) -> dict[str, str]:
    """Return the digest of every image; one that cannot be read would be missing from every figure."""
    with display.track("checking images", len(dataset.samples)) as advance:
        store = ScanCache(dataset.root, keep_others=True)
        checked = check_images(dataset, on_progress=lambda _: advance(1, ""), store=store)
    if checked.bad:
        lines = "".join(f"\n  {image.path} ({image.reason})" for image in checked.bad[:5])
        more = f"\n  and {len(checked.bad) - 5} more" if len(checked.bad) > 5 else ""
        found = f"{len(checked.bad)} of {len(dataset.samples)} images cannot be read:{lines}{more}"
        raise DataError(f"data in {dataset.root}", found, "Replace these files, or remove them yourself.")
    return checked.digests


@dataclass(frozen=True)
class Overlap:
    """Which of the judged images models have seen before.

    Attributes:
        trained: how many a model was trained on.
        chose: how many chose a model's epoch.
        fitted: how many fitted a model's temperature.
        is_known: whether that is all that there is to know.
    """

    trained: int
    chose: int
    fitted: int
    is_known: bool


def find_overlap(models: Sequence[Model], judged: EvalSet, allow_leaks: bool, display: Display) -> Overlap:
    """Count the images that a model has learned from, or was chosen by.

    Args:
        models: at least one.
        judged: the images.
        allow_leaks: judge by images that a model was trained on.
        display: is told.

    Raises:
        DataError: it was trained on some, and that is not allowed.
    """
    samples, digests = judged.dataset.samples, judged.digests
    images = [digests[sample.path] for sample in samples]
    for model in models:
        learned = [one for one in samples if digests[one.path] in model.seen.trained]
        if learned and not allow_leaks:
            found = f"{len(learned)} of {len(images)} images are among those it was trained on "
            fix = "Judge it by other images, or add --allow-leaks to do so all the same."
            raise DataError(f"judging {model.name}", f"{found}({learned[0].path} for one)", fix)
    overlap = Overlap(
        trained=sum(any(image in model.seen.trained for model in models) for image in images),
        chose=sum(any(image in model.seen.chose for model in models) for image in images),
        fitted=sum(any(image in model.seen.fitted for model in models) for image in images),
        is_known=all(model.seen.is_known for model in models),
    )
    if overlap.trained:
        said = f"{overlap.trained} of these images were trained on: the figures say nothing about new images"
        display.warn(said)
    elif overlap.chose:
        said = f"{overlap.chose} of these images also chose the epoch, so that the figures are a little kind"
        display.warn(said)
    elif not overlap.is_known:
        display.warn("which images a model was trained on is not known: those among these flatter it")
    return overlap


def _name_part(dataset: Dataset, part: EvalSplit | None) -> str:
    """Images that lie in no part were all looked at."""
    parts = {sample.split for sample in dataset.samples}
    is_plain = parts == {"train"} and part != "train"
    return parts.pop() if len(parts) == 1 and not is_plain else "all"
