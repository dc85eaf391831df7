"""The variants that an evaluation compares: each model with one view, with several, and the ensemble."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data.dataset import Dataset
from finetune.data.provenance import SeenImages, find_run, find_seen
from finetune.errors import DataError, UsageError
from finetune.evaluation.calibration import measure_reliability
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.predictor import Predictor, load
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.targets import SINGLE


@dataclass(frozen=True)
class Model:
    """A model, and the run that it comes from.

    Attributes:
        name: the name or path that the user gave.
        predictor: the model, with one view of each image.
        run: the run folder; None if the model does not come from a run.
    """

    name: str
    predictor: Predictor
    run: RunFolder | None

    @cached_property
    def seen(self) -> SeenImages:
        """The images that the model was trained on, chosen by and calibrated on."""
        return find_seen(self.run)


@dataclass(frozen=True)
class Variant:
    """The predictions of one model, or of the ensemble, with some number of views of each image.

    Attributes:
        model: the name of the model, or the number of models.
        views: forward passes for each image: its views, summed over models.
        predictions: the predictions after calibration.
        raw: the predictions before calibration; None for a mean of (calibrated) probabilities.
        seconds: the time taken, decoding included.
    """

    model: str
    views: int
    predictions: Predictions
    raw: Predictions | None
    seconds: float


def load_model(name: str, device: str, batch_size: int | None, workers: int | None, offline: bool) -> Model:
    """Load a model and find the run that it comes from.

    Raises:
        UsageError: there is no such model.
    """
    predictor = load(name, device=device, batch_size=batch_size, workers=workers, offline=offline)
    is_folder = predictor.card.place == "folder"
    return Model(name, predictor, find_run(Path(predictor.card.location)) if is_folder else None)


def check_same_classes(models: Sequence[Model]) -> None:
    """Check that models can form an ensemble.

    Raises:
        UsageError: they have different classes, or one is named twice.
    """
    if len({model.predictor.card.location or model.name for model in models}) < len(models):
        raise UsageError("finetune evaluate", "one model is named twice", "Name each once.")
    first = set(models[0].predictor.classes)
    for model in models[1:]:
        if others := first.symmetric_difference(model.predictor.classes):
            found = f"it and {models[0].name} have different classes ({', '.join(sorted(others)[:3])})"
            raise UsageError(f"the model {model.name}", found, "Evaluate them separately.")


def compute_variants(
    models: Sequence[Model], dataset: Dataset, crops: int, scales: Sequence[int], display: Display
) -> Iterator[Variant]:
    """Yield the predictions of each model with one view, then with several; last those of the ensemble.

    Args:
        models: at least one; all have the same classes.
        dataset: the images; labels index the first model's classes.
        crops: crops of each image and scale: 1, 5 or 10.
        scales: short sides in pixels that images are resized to; empty for the default.
        display: shows progress.

    Raises:
        DataError: an image cannot be read.
    """
    labels = dataset.encode(dataset.samples)
    classes = models[0].predictor.classes
    last: list[Variant] = []
    for model in models:
        order = torch.tensor([model.predictor.classes.index(name) for name in classes])
        own = _predict(model, model.predictor, dataset, labels, order, display)
        yield own
        if crops > 1 or scales:
            many = model.predictor.with_views(crops, scales)
            own = _predict(model, many, dataset, labels, order, display)
            yield own
        last.append(own)
    if len(models) > 1:
        yield _average(last, labels)


def _predict(
    model: Model, predictor: Predictor, dataset: Dataset, labels: Tensor, order: Tensor, display: Display
) -> Variant:
    is_plain = predictor.num_views == 1  # a mean over views is of calibrated probabilities
    temperature = predictor.card.temperature
    predictor = predictor.without_temperature() if is_plain else predictor
    size, samples = predictor.batch_size, dataset.samples
    predictor = predictor.with_runtime_for(len(samples), display)
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    began, parts = time.perf_counter(), []
    with display.track(f"evaluating {Path(model.name).name}", len(samples)) as advance:
        for result in predictor.predict_batches(batches, lambda sample: predictor.open(dataset.file(sample))):
            for index, reason in result.faults.items():
                fix = "Restore the file, and start again."
                raise DataError(result.inputs[index].path, f"it could be read before: {reason}", fix)
            parts.append(torch.from_numpy(result.probabilities))
            advance(len(result.inputs), "")
    probabilities = torch.cat(parts)[:, order]
    seconds = time.perf_counter() - began
    raw = Predictions(dataset.target.deactivate(probabilities), labels, dataset.target)
    calibrated = raw.apply_temperature(temperature) if is_plain else raw
    return Variant(model.name, predictor.num_views, calibrated, raw if is_plain else None, seconds)


def _average(variants: Sequence[Variant], labels: Tensor) -> Variant:
    """Return the ensemble: the mean of the probabilities of several models."""
    mean = torch.stack([variant.predictions.probabilities for variant in variants]).mean(dim=0)
    target = variants[0].predictions.target
    ensemble = Predictions(target.deactivate(mean), labels, target)
    views, seconds = sum(member.views for member in variants), sum(member.seconds for member in variants)
    return Variant(f"{len(variants)} together", views, ensemble, None, seconds)


def write_variants(folder: RunFolder, variants: Sequence[Variant], display: Display) -> list[dict[str, Any]]:
    """Write and show the metrics of each variant, with its gain and cost relative to the first one.

    Returns:
        One row per variant.
    """
    rows = [_row(variant, variants[0]) for variant in variants]
    if len(rows) > 1:
        columns = tuple(rows[0])
        write_csv(folder.path / "variants.csv", [tuple(row.values()) for row in rows], columns)
        display.table(columns, [_cells(row) for row in rows], numbers=columns[1:])
    return rows


def _row(variant: Variant, first: Variant) -> dict[str, Any]:
    predictions = variant.predictions
    is_single = predictions.target == SINGLE
    return {
        "model": variant.model,
        "views": variant.views,
        predictions.target.score: predictions.score,
        "gain": predictions.score - first.predictions.score,
        "loss": predictions.loss,
        **({"ece": measure_reliability(predictions).ece} if is_single else {}),
        "milliseconds": 1000 * variant.seconds / len(predictions.labels),
        "cost": variant.seconds / first.seconds,
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    forms = {
        "gain": f"{100 * row['gain']:+.1f} points",
        "loss": f"{row['loss']:.4f}",
        "milliseconds": f"{row['milliseconds']:.1f}",
        "cost": f"{row['cost']:.1f} x",
    }
    plain = {"model", "views"}
    return [forms.get(key, str(value) if key in plain else f"{value:.4f}") for key, value in row.items()]
