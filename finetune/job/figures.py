"""The figures of a finished run, and the files that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.feed import Feed
from finetune.data.sample import Dataset, Sample
from finetune.display import Advance, Display
from finetune.errors import InternalError
from finetune.evaluation.judgement import Judgement
from finetune.evaluation.metrics import PER_CLASS_COLUMNS, compute_confusion, list_by_class
from finetune.evaluation.predict import Predictions, autocast, predict
from finetune.job.prepare import Ready
from finetune.job.solve import Solution
from finetune.runs.files import FLOAT_FORMAT, escape_formula, format_csv_line, write_chunks, write_csv
from finetune.runs.folder import RunFolder
from finetune.runtime import Precision
from finetune.training.progress import Progress
from finetune.training.trainer import Trainer

FIGURES_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.25}
"""Largest difference in a probability between figures and model. Where numbers are coarse, and a trunk saw
its pictures in other batches, a logit of 50 may differ by 0.2."""
GPU_TOLERANCE = 0.02
"""The least of it on a GPU, which multiplies float32 with fewer bits in some kernels than in others."""


def evaluate(trainer: Trainer, feed: Feed, display: Display) -> Predictions:
    """Predict the judged part with the judged network."""
    forward = trainer.task.forward(trainer.judged)
    with display.track("evaluating", len(feed.samples)) as advance:
        on_batch = partial(_advance, advance)
        return predict(trainer.judged, feed, trainer.precision, on_batch, forward, trainer.world)


def _advance(advance: Advance, done: int) -> None:
    advance(done, "")


def check_figures(
    network: nn.Module, predictions: Predictions, images: Tensor, precision: Precision, dtype: Precision
) -> None:
    """Predict the first pictures once more, with the whole network as it is handed over, and compare.

    Figures come from kept features and from a classifier that sees standardised ones; neither may tell tales.

    Args:
        network: that is handed over.
        predictions: the figures' own.
        images: (B, 3, H, W) the first pictures of the same part.
        precision: of the forward pass.
        dtype: of the kept features.

    Raises:
        InternalError: the whole network says something else.
    """
    with torch.inference_mode(), autocast(images.device, precision):
        whole = network.eval()(images).float().softmax(dim=1).cpu()
    difference = (whole - predictions.probabilities[: len(whole)]).abs().max().item()
    most = max(FIGURES_TOLERANCE[precision], FIGURES_TOLERANCE[dtype])
    most = max(most, GPU_TOLERANCE) if images.is_cuda else most
    if not difference <= most:  # so that NaN is refused as well
        found = f"the whole network's probabilities differ from the figures' by up to {difference:.2g}"
        fix = "Run `finetune cache clear`, or set cache.trunk to false; and please report this."
        raise InternalError("comparing figures and model", found, fix)


def collect_metrics(
    ready: Ready, dataset: Dataset, judgement: Judgement, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``metrics.json`` but for the seconds: figures, and which images they come from."""
    return judgement.metrics | {
        "split": dataset.judged_split,
        **facts,
        "backbone": ready.backbone.card.name,
        "strategy": ready.recipe.strategy.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.of("train")),
    }


def describe_training(dataset: Dataset, progress: Progress) -> dict[str, Any]:
    """Return what ``metrics.json`` says of epochs."""
    seconds = sum(row["seconds"] for row in progress.history)
    num_seen = len(dataset.of("train")) * progress.epoch
    return {
        "split_chose_checkpoint": dataset.judged_split == "val",
        "features": None,
        "val_accuracy": progress.best["accuracy"],
        "val_loss": progress.best["loss"],
        "best_epoch": progress.best_epoch + 1,
        "epochs": progress.epoch,
        "images_per_second": round(num_seen / max(seconds, 1e-9), 2),
        "data_wait_fraction": round(_mean_wait(progress), 4),
        "lost_images": len(progress.lost),
        "skipped_steps": progress.skipped,
        "rollbacks": progress.rollbacks,
        "microbatch": progress.microbatch or None,
    }


def describe_solution(ready: Ready, dataset: Dataset, solution: Solution) -> dict[str, Any]:
    """Return what ``metrics.json`` says of a linear classifier.

    Validation images chose it only where it is handed over instead of a training that it beat on them.
    """
    was_floor = ready.recipe.strategy.features is None
    val = solution.predictions["val"]
    return {
        "split_chose_checkpoint": was_floor and dataset.judged_split == "val",
        "features": [layer.name for layer in solution.layers],
        "num_features": solution.classifier.weight.shape[1],
        "regularisation": solution.classifier.strength,
        "val_accuracy": val.accuracy,
        "val_loss": val.loss,
        "best_epoch": None,
        "epochs": 0,
    }


def _mean_wait(progress: Progress) -> float:
    """The share of the training time that was spent waiting for data."""
    rows = progress.history
    waited = sum(row["seconds"] * row["data_wait_fraction"] for row in rows)
    return waited / max(sum(row["seconds"] for row in rows), 1e-9)


def write_figures(
    folder: RunFolder, samples: Sequence[Sample], predictions: Predictions, classes: Sequence[str]
) -> None:
    """Write one row an image, one row a class, and the confusion matrix.

    Args:
        folder: takes the files.
        samples: that were judged, in the order of the predictions.
        predictions: calibrated.
        classes: names in index order.
    """
    write_chunks(folder.predictions, _prediction_lines(samples, predictions, classes))
    confusion = compute_confusion(predictions)
    table = [(name, *counts) for name, counts in zip(classes, confusion.tolist(), strict=True)]
    write_csv(folder.confusion_matrix, table, ("label", *classes))
    write_csv(folder.per_class, list_by_class(confusion, classes), PER_CLASS_COLUMNS)


def _prediction_lines(
    samples: Sequence[Sample], predictions: Predictions, classes: Sequence[str]
) -> Iterator[bytes]:
    """Yield the lines of ``predictions.csv``: one template for all numbers of a row, perhaps thousands."""
    columns = ("path", "label", "predicted", "confidence", *(f"prob_{name}" for name in classes))
    yield format_csv_line([escape_formula(column) for column in columns]).encode()
    numbers = f",{FLOAT_FORMAT}" * (1 + len(classes)) + "\n"
    for sample, values in zip(samples, predictions.probabilities, strict=True):
        sure, guess = values.max(dim=0)
        texts = (sample.path, classes[sample.label], classes[int(guess)])
        who = format_csv_line([escape_formula(text) for text in texts]).removesuffix("\n")
        yield (who + numbers % (sure.item(), *values.tolist())).encode()


def say_result(display: Display, folder: RunFolder, metrics: dict[str, Any]) -> None:
    """Say the figures, what they are worth, and where everything is."""
    how = "the epoch" if metrics["epochs"] else "between this and training"
    chosen = f" (which also chose {how})" if metrics["split_chose_checkpoint"] else ""
    came = f"best epoch {metrics['best_epoch']} of {metrics['epochs']}"
    if not metrics["epochs"]:
        came = f"a linear classifier on {', '.join(metrics['features'])}"
    low, high = metrics["intervals"]["accuracy"]
    display.say(
        f"accuracy {metrics['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f}), balanced "
        f"{metrics['balanced_accuracy']:.4f}, macro F1 {metrics['f1_macro']:.4f} on "
        f"{metrics['num_samples']} {metrics['split']} images{chosen}; "
        f"{came}, {metrics['seconds']['total']:.0f} s",
        style="bold",
    )
    display.say(f"run {folder.path}  model {folder.model}")
