"""The final figures, from predictions alone. Accuracies, precision, recall and F1 are fractions in [0, 1].

Averages over classes run over the classes that the judged split has. A class without images has no
recall: counting it as 0 would punish the network, and as 1 would flatter it. (torchmetrics' macro
averages count a class with false positives only; hence these few lines. scikit-learn agrees with them
in the tests.)

Shape legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.evaluation.predictions import Predictions

TOP5_CLASSES = 6
"""Top-5 accuracy means something from six classes on."""
PER_CLASS_COLUMNS = ("label", "precision", "recall", "f1", "support", "predicted")
UNKNOWN = "n/a"
"""In a table, where a figure has no meaning."""
MOST_CONFUSED = 20

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def compute_confusion(predictions: Predictions) -> Counts:
    """Return counts (K, K): row = true class, column = predicted class."""
    num_classes = predictions.logits.shape[1]
    cells = predictions.labels.numpy() * num_classes + predictions.predicted.numpy()
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def compute_metrics(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Return the figures of ``metrics.json`` that depend on predictions alone."""
    confusion = compute_confusion(predictions)
    judged = confusion.sum(axis=1) > 0
    shares = compute_shares(confusion)
    metrics: dict[str, Any] = shares | {
        "error": 1 - shares["accuracy"],
        "loss": predictions.loss,
        "roc_auc": compute_roc_auc(predictions),
        "num_samples": int(confusion.sum()),
        "classes_not_judged": [name for name, has in zip(classes, judged, strict=True) if not has],
    }
    if len(classes) >= TOP5_CLASSES:
        top5 = compute_top_k(predictions, 5)
        metrics |= {"top5_accuracy": top5, "top5_error": 1 - top5}
    return metrics | {"most_confused": find_most_confused(confusion, classes)}


def compute_shares(confusion: Counts) -> dict[str, float]:
    """Return what a confusion matrix (K, K) says: accuracy, and means over the classes that have images.

    A class that was never predicted counts with a precision of 0 here.
    """
    precision, recall, f1 = compute_by_class(confusion)
    judged = confusion.sum(axis=1) > 0
    return {
        "accuracy": float(confusion.trace() / confusion.sum()),
        "balanced_accuracy": float(recall[judged].mean()),
        "precision_macro": float(np.nan_to_num(precision[judged]).mean()),
        "recall_macro": float(recall[judged].mean()),
        "f1_macro": float(f1[judged].mean()),
    }


def compute_by_class(confusion: Counts) -> tuple[Floats, Floats, Floats]:
    """Return precision, recall and F1 of each class, (K,); NaN where there is none.

    A class without images has none of them, and a class that was never predicted no precision.
    """
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = hits / predicted, hits / support
        f1 = 2 * hits / (support + predicted)
    for figures in (precision, recall, f1):
        figures[support == 0] = np.nan
    return precision, recall, f1


def list_by_class(confusion: Counts, classes: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return the rows of ``per_class.csv``: ``n/a`` where there is no figure, never 0."""
    figures = [[UNKNOWN if np.isnan(x) else float(x) for x in one] for one in compute_by_class(confusion)]
    counts = confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist()
    return list(zip(classes, *figures, *counts, strict=True))


def find_most_confused(confusion: Counts, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pairs of classes with the most mistakes, the worst first."""
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(cell), len(classes)) for cell in order]
    support = confusion.sum(axis=1)
    return [
        {
            "label": classes[row],
            "predicted": classes[column],
            "count": int(wrong[row, column]),
            "share": float(wrong[row, column] / support[row]),
        }
        for row, column in pairs
        if wrong[row, column]
    ]


def compute_top_k(predictions: Predictions, k: int) -> float:
    """Return the share of images whose true class is among the ``k`` likeliest."""
    return float(find_top_k(predictions, k).mean())


def find_top_k(predictions: Predictions, k: int) -> npt.NDArray[np.bool_]:
    """Return for each image whether its true class is among the ``k`` likeliest, (N,)."""
    best = predictions.logits.topk(k, dim=1).indices
    found: npt.NDArray[np.bool_] = (best == predictions.labels[:, None]).any(dim=1).numpy()
    return found


def compute_roc_auc(predictions: Predictions) -> float | None:
    """Return the area under the ROC curve, each class against the rest, averaged over classes.

    The chance that an image of a class is given a higher probability of it than an image of another class:
    0.5 is a guess. None where fewer than two classes have images.
    """
    scores, labels = compute_log_odds(predictions), predictions.labels.numpy()
    areas = []
    for label in np.unique(labels):
        if 0 < (own := int((labels == label).sum())) < len(labels):
            ranks = _rank(scores[:, label])[labels == label].sum()
            areas.append((ranks - own * (own + 1) / 2) / (own * (len(labels) - own)))
    return float(np.mean(areas)) if areas else None


def compute_log_odds(predictions: Predictions) -> Floats:
    """Return the logarithm of p / (1 - p) of each class, (N, K): in the order of probabilities, without ties.

    Probabilities of a network that is very sure are all 1 in any float.
    """
    logits = predictions.logits.double()
    likeliest = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, likeliest, float("-inf")).logsumexp(dim=1, keepdim=True)
    logs = logits.log_softmax(dim=1)
    small = logs - torch.log1p(-logs.exp())  # of the others, which have at most a half
    odds: Floats = small.scatter(1, likeliest, logits.gather(1, likeliest) - others).numpy()
    return odds.round(9)  # equal but for the last bits are equals


def _rank(values: Floats) -> Floats:
    """Ranks from 1, equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    middle: Floats = (last - (counts - 1) / 2)[inverse]
    return middle
