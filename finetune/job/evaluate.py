"""Judge finished models on labelled pictures: one, several together, with one view of a picture or many.

::

    models, pictures -> probabilities, of each model and way of looking -> figures of the last, gains of all
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.data.check import check_images
from finetune.data.labelled import Part, find_labelled
from finetune.data.looks import LookStore
from finetune.data.sample import Dataset, Sample
from finetune.display import Display
from finetune.errors import DataError, UsageError, suggest
from finetune.evaluation.calibration import compare_calibration, measure_thresholds
from finetune.evaluation.intervals import compute_intervals
from finetune.evaluation.metrics import compute_metrics
from finetune.evaluation.views import build_views
from finetune.job.data import check_outside, create_new_folder
from finetune.job.figures import write_figures
from finetune.job.looking import Model, Variant, check_same_classes, load_model, look, write_variants
from finetune.job.report import add_report
from finetune.job.source import open_pictures
from finetune.recipe import load_recipe
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.runtime import describe_environment

VARIANT_COLUMNS = ("model", "views", "accuracy", "gain", "loss", "ece", "milliseconds", "cost")
_SMALLEST = 1e-30
"""Probability that counts as none: its logarithm is finite in float32."""


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        models: runs, or other models, at least one; several are an ensemble.
        data: labelled pictures; None for those that the first run was judged by.
        part: of the data; None for test where there is one, else val, else all.
        crops: 1, 5 or 10.
        scales: short sides in pixels; none for the default.
        output: a new folder.
        device: that computes.
        batch_size: pictures at a time; None for the default.
        workers: decoding threads; None for the default.
        offline: never ask the network.
        follow_links: read images through links that lead out of the data.
        allow_leaks: judge by images that a model was trained on all the same.
    """

    models: tuple[str, ...]
    data: Path | None
    part: Part | None
    crops: int
    scales: tuple[int, ...]
    output: Path
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    offline: bool = False
    follow_links: bool = False
    allow_leaks: bool = False

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["finetune", "evaluate", *self.models]
        words += ["--data", str(self.data)] if self.data is not None else []
        words += ["--split", self.part] if self.part is not None else []
        words += ["--crops", str(self.crops)] if self.crops > 1 else []
        words += ["--scales", ",".join(map(str, self.scales))] if self.scales else []
        return shlex.join(words)


def evaluate_models(request: Request, display: Display) -> dict[str, Any]:
    """Judge models, and write their figures into a new folder.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UsageError: there is no such model, models know different classes, or the folder is not empty.
        DataError: pictures cannot be used, or a model was trained on them.
    """
    with display.busy("loading models"):
        models = [
            load_model(name, request.device, request.batch_size, request.workers, request.offline)
            for name in request.models
        ]
    classes = models[0].predictor.classes
    check_same_classes(models)
    for model in models:
        build_views(model.predictor.card.preprocessing, request.crops, request.scales)  # refuses bad ones
    dataset = _find_pictures(request, models[0], display)
    check_outside(request.output, dataset)
    digests = _check_pictures(dataset, display)
    facts = _find_overlap(request, models, dataset, digests, display)
    create_new_folder(request.output)
    variants = list(look(models, dataset, request.crops, request.scales, display))
    folder = RunFolder(request.output)
    metrics = _figures(models, variants, classes) | facts
    metrics |= {"models": [model.name for model in models], "data": str(dataset.root)}
    if len(models) == 1 and models[0].predictor.card.place == "folder":
        metrics["model"] = str(Path(models[0].predictor.card.location).absolute())
    metrics |= {"crops": request.crops, "scales": list(request.scales), "version": __version__}
    metrics["variants"] = write_variants(folder, variants, display)
    write_figures(folder, dataset.samples, variants[-1].predictions, classes)
    write_json(folder.environment, describe_environment(models[0].predictor.device))
    write_json(folder.metrics, metrics)
    _say(metrics, folder, display)
    add_report(folder, display, request.command)
    return metrics


def _say(metrics: Mapping[str, Any], folder: RunFolder, display: Display) -> None:
    low, high = metrics["intervals"]["accuracy"]
    display.say(
        f"accuracy {metrics['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f}), balanced "
        f"{metrics['balanced_accuracy']:.4f}, macro F1 {metrics['f1_macro']:.4f} on "
        f"{metrics['num_samples']} {metrics['split']} images",
        style="bold",
    )
    display.say(f"figures {folder.path}")


# --- pictures ------------------------------------------------------------------------------------


def _find_pictures(request: Request, first: Model, display: Display) -> Dataset:
    classes = first.predictor.classes
    if request.data is None and first.run is None:
        raise UsageError("finetune evaluate", "no data was named", "Add --data FOLDER.")
    run = first.run
    if run is not None and (request.data is None or _is_own(run, request.data)):
        dataset = _pictures_of_run(run, classes, request.part, display)
    else:
        assert request.data is not None
        with display.count(f"reading {request.data}") as tell:
            dataset = find_labelled(request.data, classes, request.part, request.follow_links, tell)
        for warning in dataset.warnings:
            display.warn(warning)
    return dataset


def _is_own(run: RunFolder, data: Path) -> bool:
    """The very folder that the run was trained on: only its own split says what is what in it."""
    if data.absolute() == run.path.absolute():
        return True
    own = load_recipe(str(run.recipe)).data.path if run.recipe.is_file() else None
    return own is not None and Path(own).absolute() == data.absolute()


def _pictures_of_run(run: RunFolder, classes: Sequence[str], part: Part | None, display: Display) -> Dataset:
    """Return the images of a run's own data in the part that it was judged by, or the one that was named."""
    found = open_pictures(load_recipe(None, {"data": {"path": str(run.path)}}), display)
    wanted = part or found.judged_split
    index = {name: number for number, name in enumerate(classes)}
    if unknown := sorted(set(found.classes) - index.keys()):
        hint = suggest(unknown[0], classes)
        raise DataError(
            f"the data of {run.path}", f"the model does not know {unknown[0]!r}{hint}", "Name other --data."
        )
    samples = [
        replace(sample, label=index[found.classes[sample.label]])
        for sample in found.samples
        if wanted in ("all", sample.split)
    ]
    if not samples:
        raise DataError(f"the data of {run.path}", f"has no part {wanted}", "Take another --split.")
    return replace(found, classes=tuple(classes), samples=tuple(samples))


def _check_pictures(dataset: Dataset, display: Display) -> dict[str, str]:
    """Return the digest of every image; one that cannot be read would be missing from every figure."""
    with display.track("checking images", len(dataset.samples)) as advance:
        store = LookStore(dataset.root, keep_others=True)
        checked = check_images(dataset, on_progress=lambda _: advance(1, ""), store=store)
    if checked.bad:
        lines = "".join(f"\n  {image.path} ({image.reason})" for image in checked.bad[:5])
        more = f"\n  and {len(checked.bad) - 5} more" if len(checked.bad) > 5 else ""
        found = f"{len(checked.bad)} of {len(dataset.samples)} images cannot be read:{lines}{more}"
        raise DataError(f"data in {dataset.root}", found, "Replace these files, or remove them yourself.")
    return checked.digests


def _find_overlap(
    request: Request,
    models: Sequence[Model],
    dataset: Dataset,
    digests: Mapping[str, str],
    display: Display,
) -> dict[str, Any]:
    """Say which of the images a model has learned from, or was chosen by.

    Raises:
        DataError: it was trained on some that are not the training part by name.
    """
    trained = chosen = 0
    for model in models:
        parts = [model.parts.get(digests[sample.path]) for sample in dataset.samples]
        learned = [sample for sample, part in zip(dataset.samples, parts, strict=True) if part == "train"]
        trained, chosen = max(trained, len(learned)), max(chosen, _count_choosers(model, parts))
        if learned and request.part not in ("train", "all") and not request.allow_leaks:
            found = f"{len(learned)} of {len(dataset.samples)} images are among those it was trained on "
            fix = "Judge it by other images, or add --allow-leaks to do so all the same."
            raise DataError(f"judging {model.name}", f"{found}({learned[0].path} for one)", fix)
    if trained:
        display.warn(f"{trained} of these images were trained on: the figures say nothing about new images")
    if chosen:
        display.warn(f"{chosen} of these images also chose the epoch, so that the figures are a little kind")
    is_known = all(model.run is not None for model in models)
    return {
        "split": _name_part(dataset.samples),
        "trained_on": trained if trained or is_known else None,
        "split_chose_checkpoint": bool(chosen) if chosen or is_known else None,
    }


def _count_choosers(model: Model, parts: Sequence[str | None]) -> int:
    """Validation images choose the epoch, or between a training and its floor."""
    is_choosing = bool(model.metrics.get("epochs")) or bool(model.metrics.get("split_chose_checkpoint"))
    return sum(part == "val" for part in parts) if is_choosing else 0


def _name_part(samples: Sequence[Sample]) -> str:
    parts = {sample.split for sample in samples}
    return parts.pop() if len(parts) == 1 else "all"


# --- figures -------------------------------------------------------------------------------------


def _figures(models: Sequence[Model], variants: Sequence[Variant], classes: Sequence[str]) -> dict[str, Any]:
    final = variants[-1]
    figures = compute_metrics(final.raw, classes)
    figures["intervals"] = {name: list(limits) for name, limits in compute_intervals(final.raw).items()}
    temperature = models[0].predictor.card.temperature if len(models) == 1 else None
    figures["calibration"] = {
        "temperature": temperature,
        "fitted_on": "val",
        "same_images": False,
        **compare_calibration(final.raw, final.predictions),
    }
    if len(models) == 1:
        figures["reject"] = measure_thresholds(models[0].metrics.get("reject", []), final.predictions)
    figures["num_classes"] = len(classes)
    return figures
