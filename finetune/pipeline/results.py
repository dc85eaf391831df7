"""The metrics of a finished run: computing, checking and reporting them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.dataset import Dataset
from finetune.data.feed import BatchLoader
from finetune.errors import InternalError, count
from finetune.evaluation.intervals import compute_wilson
from finetune.evaluation.predictions import GPU_TOLERANCE, METRICS_TOLERANCE, Predictions, predict
from finetune.evaluation.summary import JUDGES
from finetune.evaluation.tables import Summary
from finetune.pipeline.linear_head import LinearHead
from finetune.pipeline.setup import RunSetup
from finetune.runs.folder import RunFolder
from finetune.system.device import Precision
from finetune.system.display import Advance, Display
from finetune.system.forward import autocast
from finetune.targets import SINGLE, Monitor
from finetune.training.state import Progress
from finetune.training.trainer import Trainer
from pretrained.catalog import Card


def evaluate(trainer: Trainer, loader: BatchLoader, display: Display) -> Predictions:
    """Predict the evaluated split with the network that the trainer selected."""
    forward = trainer.task.forward(trainer.eval_network)
    with display.track("evaluating", len(loader.samples)) as advance:
        return predict(
            trainer.eval_network,
            loader,
            trainer.precision,
            on_batch=partial(_advance, advance),
            forward=forward,
            distributed=trainer.distributed,
        )


def _advance(advance: Advance, done: int) -> None:
    advance(done, "")


def describe_answers(card: Card, summary: Summary) -> Card:
    """Return a network's card with what its outputs mean: the temperature, and the kind of its labels."""
    facts = summary.target.to_facts()
    target = () if summary.target == SINGLE else tuple(facts.items())
    return replace(card, temperature=summary.temperature, target=target)


def check_predictions(
    network: nn.Module, predictions: Predictions, images: Tensor, precision: Precision, dtype: Precision
) -> None:
    """Predict the first images again with the whole exported network, and compare.

    The metrics may come from cached features and from a classifier on standardised features. This check
    shows that the exported network gives the same predictions.

    Args:
        network: network that will be exported.
        predictions: predictions that the metrics were computed from.
        images: (B, 3, H, W) first images of the same split.
        precision: precision of the forward pass.
        dtype: precision of the cached features.

    Raises:
        InternalError: the probabilities differ by more than the tolerance.
    """
    with torch.inference_mode(), autocast(images.device, precision):
        whole = predictions.target.activate(network.eval()(images).float()).cpu()
    difference = (whole - predictions.probabilities[: len(whole)]).abs().max().item()
    most = max(METRICS_TOLERANCE[precision], METRICS_TOLERANCE[dtype])
    most = max(most, GPU_TOLERANCE) if images.is_cuda else most
    if not difference <= most:  # also refuses NaN
        found = f"the exported network's probabilities differ by up to {difference:.2g}"
        fix = "Run `finetune cache clear`, or set cache.trunk to false; and please report this."
        raise InternalError("comparing the exported model with the metrics", found, fix)


def collect_metrics(
    setup: RunSetup, dataset: Dataset, summary: Summary, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of ``metrics.json`` without the times: metrics, and which images they come from."""
    return summary.metrics | {
        "split": dataset.eval_split,
        **facts,
        "backbone": setup.backbone.card.name,
        "strategy": setup.recipe.strategy.name,
        "target": dataset.target.kind,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.of("train")),
    }


def describe_training(dataset: Dataset, progress: Progress, monitor: Monitor) -> dict[str, Any]:
    """Return the entries of ``metrics.json`` about training by epochs."""
    seconds = sum(row["seconds"] for row in progress.history)
    num_seen = len(dataset.of("train")) * progress.epoch
    return {
        "split_chose_checkpoint": dataset.eval_split == "val" and monitor != "last",
        "features": None,
        **{f"val_{name}": value for name, value in progress.best.items()},
        "best_epoch": progress.best_epoch + 1,
        "epochs": progress.epoch,
        "images_per_second": round(num_seen / max(seconds, 1e-9), 2),
        "data_wait_fraction": round(_mean_wait(progress), 4),
        "lost_images": len(progress.lost),
        "skipped_steps": progress.skipped,
        "rollbacks": progress.rollbacks,
        "microbatch": progress.microbatch or None,
    }


def describe_solution(setup: RunSetup, dataset: Dataset, solution: LinearHead) -> dict[str, Any]:
    """Return the entries of ``metrics.json`` about a solved linear classifier.

    Validation images chose it only if it replaced a trained network (``strategy.floor``).
    """
    was_floor = setup.recipe.strategy.features is None
    val = solution.predictions["val"]
    return {
        "split_chose_checkpoint": was_floor and dataset.eval_split == "val",
        "features": [layer.name for layer in solution.layers],
        "num_features": solution.classifier.weight.shape[1],
        "regularisation": solution.classifier.strength,
        f"val_{val.target.score}": val.score,
        "val_loss": val.loss,
        "best_epoch": None,
        "epochs": 0,
    }


def _mean_wait(progress: Progress) -> float:
    """Return the share of the training time that was spent waiting for data, in [0, 1]."""
    rows = progress.history
    waited = sum(row["seconds"] * row["data_wait_fraction"] for row in rows)
    return waited / max(sum(row["seconds"] for row in rows), 1e-9)


def find_gap(advice: Mapping[str, Any], val_accuracy: float | None, num_val: int) -> dict[str, float] | None:
    """Return how far validation is below the cross-validation that chose the strategy.

    Args:
        advice: content of ``advice.json``; empty if the strategy was given.
        val_accuracy: accuracy on the validation split; None if the labels have none.
        num_val: number of its images.

    Returns:
        The two accuracies and the facing ends of their 95 % intervals; None if the intervals overlap.
    """
    try:
        best = max(float(one["score"]) for one in advice["candidates"])
        number = max(int(advice["num_independent"]), 0)
        low, _ = compute_wilson(round(best * number), number)
    except (KeyError, TypeError, ValueError, ArithmeticError):  # no advice, or a damaged one
        return None
    if val_accuracy is None:
        return None
    _, high = compute_wilson(round(val_accuracy * num_val), num_val)
    if high >= low:
        return None
    return {"cross_validated": best, "at_least": low, "val": val_accuracy, "at_most": high}


GAP_CAUSES = (
    "Either training images come in groups (bursts, patients, frames of one video), so that a fold is "
    "predicted from images of the same object, or the validation images are of another kind than the "
    "training images."
)
GAP_FIX = (
    "If they come in groups, name them with --group-by, and train again: the strategy was chosen by a number "
    "that says nothing about new images."
)


def report_result(display: Display, folder: RunFolder, metrics: dict[str, Any]) -> None:
    """Report the metrics with their interval, and the paths of the run and the model."""
    choice = "the epoch" if metrics["epochs"] else "this classifier over the trained network"
    chosen = f" (which also chose {choice})" if metrics["split_chose_checkpoint"] else ""
    origin = f"best epoch {metrics['best_epoch']} of {metrics['epochs']}"
    if not metrics["epochs"]:
        origin = f"a linear classifier on {', '.join(metrics['features'])}"
    images = count(metrics["num_samples"], f"{metrics['split']} image")
    display.say(
        f"{JUDGES[metrics['target']].describe(metrics)} on {images}{chosen}; "
        f"{origin}, {metrics['seconds']['total']:.0f} s",
        style="bold",
    )
    if gap := metrics.get("advice_gap"):
        display.warn(
            f"the advice cross-validated {gap['cross_validated']:.3f} (at least {gap['at_least']:.3f}), and "
            f"validation is {gap['val']:.3f} (at most {gap['at_most']:.3f}). {GAP_CAUSES} {GAP_FIX}"
        )
    display.say(f"run {folder.path}  model {folder.model}")
