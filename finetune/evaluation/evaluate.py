"""``finetune evaluate``: test finished models, or an ensemble of them, on labelled images.

::

    models, images -> probabilities of each variant (model, views) -> metrics of the last, gains of all
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.data.channels.bands import check_takes
from finetune.data.channels.other_values import TRIED, describe_other_values
from finetune.data.dataset import describe_images
from finetune.data.inputs import EvalSplit
from finetune.data.prepare import check_outside
from finetune.evaluation.calibration import calibrate_cross_fitted, compare_calibration, measure_thresholds
from finetune.evaluation.eval_set import Overlap, check_unchanged, find_eval_set, find_overlap
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.summary import JUDGES
from finetune.evaluation.variants import (
    Model,
    Variant,
    check_same_classes,
    compute_variants,
    load_model,
    write_variants,
)
from finetune.evaluation.views import build_views
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.reader import RunReader
from finetune.system.device import describe_environment
from finetune.system.display import Display
from finetune.system.gpu import explain_unused_gpu
from finetune.targets import SINGLE


@dataclass(frozen=True)
class EvaluateRequest:
    """What the user asks ``finetune evaluate`` for.

    Attributes:
        models: run folders, model folders or names, at least one; several form an ensemble.
        data: labelled images; None for those that the first run was evaluated on.
        split: train, val, test or all; None for test if there is one, else val, else all.
        crops: crops of each image and scale: 1, 5 or 10.
        scales: short sides in pixels that images are resized to; empty for the default.
        output: a new folder for the results.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: images per batch; None for the default.
        workers: decoding threads; None for the default.
        offline: never download weights.
        follow_links: read images through symbolic links that lead out of the data.
        allow_leaks: evaluate even on images that a model was trained on.
    """

    models: tuple[str, ...]
    data: Path | None
    split: EvalSplit | None
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
        """The command line of this request."""
        arguments = ["finetune", "evaluate", *self.models]
        arguments += ["--data", str(self.data)] if self.data is not None else []
        arguments += ["--split", self.split] if self.split is not None else []
        arguments += ["--crops", str(self.crops)] if self.crops > 1 else []
        arguments += ["--scales", ",".join(map(str, self.scales))] if self.scales else []
        arguments += ["--device", self.device] if self.device != "auto" else []
        arguments += ["--batch-size", str(self.batch_size)] if self.batch_size else []
        arguments += ["--follow-links"] if self.follow_links else []
        arguments += ["--allow-leaks"] if self.allow_leaks else []
        return shlex.join(arguments)


def evaluate_models(
    request: EvaluateRequest, display: Display, add_report: Callable[[RunFolder], None]
) -> dict[str, Any]:
    """Evaluate models, and write their metrics into a new folder.

    Args:
        request: options of the command.
        display: shows progress.
        add_report: adds the report to the files, before the folder appears.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UsageError: there is no such model, models know different classes, or the folder is not empty.
        DataError: images cannot be read or have unknown classes, or a model was trained on them.
    """
    if obstacle := explain_unused_gpu(request.device):
        display.warn(obstacle)
    with display.busy("loading models"):
        models = [
            load_model(name, request.device, request.batch_size, request.workers, request.offline)
            for name in request.models
        ]
    classes = models[0].predictor.classes
    check_same_classes(models)
    for model in models:
        build_views(model.predictor.card.preprocessing, request.crops, request.scales)  # raises if invalid
    eval_set = find_eval_set(models[0], request.data, request.split, request.follow_links, display)
    for model in models[1:]:
        check_takes(model.predictor.card, eval_set.dataset)
    dataset = eval_set.dataset
    check_outside(request.output, dataset)
    some = [dataset.file(sample) for sample in dataset.samples[:: -(-len(dataset.samples) // TRIED)]]
    for model in models:
        if said := describe_other_values(model.predictor.card.preprocessing, some):
            display.warn(said)
    is_allowed = request.allow_leaks or request.split in ("train", "all")
    overlap = find_overlap(models, eval_set, is_allowed, display)
    with new_folder(request.output) as path:
        folder = RunFolder(path)
        variants = list(compute_variants(models, dataset, request.crops, request.scales, display))
        check_unchanged(dataset, display)
        metrics = _collect_metrics(models, variants, classes, overlap) | {"split": eval_set.split}
        metrics |= {"models": [model.name for model in models], "data": str(dataset.root)}
        if len(models) == 1 and models[0].predictor.card.place == "folder":
            metrics["model"] = str(Path(models[0].predictor.card.location).absolute())
        metrics |= {"crops": request.crops, "scales": list(request.scales), "version": __version__}
        metrics["variants"] = write_variants(folder, variants, display)
        images, judge = dataset.evaluated(dataset.samples), JUDGES[dataset.target.kind]
        judge.write_tables(folder, images, variants[-1].predictions, classes)
        rows = [(path, *row) for path, row in describe_images(dataset, dataset.digests).items()]
        write_csv(folder.split, rows, ("path", "label", "split", "sha256"))
        write_json(folder.environment, describe_environment(models[0].predictor.device))
        write_json(folder.metrics, metrics)
        add_report(folder)
    _say(metrics, RunFolder(request.output), display)
    return metrics


def _say(metrics: Mapping[str, Any], folder: RunFolder, display: Display) -> None:
    split = metrics["split"]
    display.say(
        f"{JUDGES[metrics['target']].describe(metrics)} on "
        f"{metrics['num_samples']}{'' if split == 'all' else f' {split}'} images",
        style="bold",
    )
    display.say(f"metrics {folder.path}")
    if folder.report.exists():
        display.say(f"report {folder.report}")


# --- metrics -------------------------------------------------------------------------------------


def _collect_metrics(
    models: Sequence[Model], variants: Sequence[Variant], classes: Sequence[str], overlap: Overlap
) -> dict[str, Any]:
    final = variants[-1]
    predictions = final.raw or final.predictions
    target = predictions.target
    metrics = JUDGES[target.kind].measure(predictions, classes) | {"target": target.kind}
    if target == SINGLE:
        metrics["calibration"] = _measure_calibration(models, final, overlap)
        if len(models) == 1:
            metrics["reject"] = _measure_thresholds(models[0], final.predictions)
    known = overlap.is_known
    return metrics | {
        "num_classes": len(classes),
        "trained_on": overlap.trained if overlap.trained or known else None,
        "split_chose_checkpoint": bool(overlap.chose) if overlap.chose or known else None,
    }


def _measure_calibration(models: Sequence[Model], final: Variant, overlap: Overlap) -> dict[str, Any]:
    """Return ``calibration`` of ``metrics.json``; means of calibrated probabilities have no "before"."""
    num_images = len(final.predictions.labels)
    facts = {
        "temperature": models[0].predictor.card.temperature if len(models) == 1 else None,
        "fitted_on": "val",
        "same_images": bool(overlap.fitted),
    }
    after = final.predictions
    if final.raw is None:
        measured = compare_calibration(after, after)
        return facts | {key: value for key, value in measured.items() if key.endswith("_calibrated")}
    if overlap.fitted == num_images and facts["temperature"] != 1.0:
        after = calibrate_cross_fitted(final.raw)
    return facts | compare_calibration(final.raw, after)


def _measure_thresholds(model: Model, predictions: Predictions) -> list[dict[str, Any]]:
    """Return the run's confidence thresholds with their effect on these images; empty if it has none."""
    rows = RunReader(model.run, tolerant=True).metrics.get("reject") if model.run is not None else None
    try:
        return measure_thresholds(rows or [], predictions)
    except (LookupError, TypeError):  # edited by hand, or written by another version
        return []
