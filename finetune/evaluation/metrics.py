"""The final metrics, from predictions alone. Accuracies, precision, recall and F1 are fractions in [0, 1].

Averages over classes run over the classes that have images in the evaluated split. A class without images has
no recall: counting it as 0 would make the mean pessimistic, and as 1 optimistic.

scikit-learn is imported inside the functions that use it: the import takes over a second, and a command that
is refused must not wait for it.

Shape legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation.predictions import Predictions
from finetune.targets import TOP5_CLASSES, compute_log_odds, find_in_top_k

UNKNOWN = "n/a"
"""Cell of a table for a metric that is not defined."""
MOST_CONFUSED = 20
"""Largest number of confused pairs of classes in ``metrics.json``."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def compute_confusion(predictions: Predictions) -> Counts:
    """Return counts (K, K): row = true class, column = predicted class."""
    from sklearn.metrics import confusion_matrix

    classes = range(predictions.logits.shape[1])
    counts: Counts = confusion_matrix(predictions.labels, predictions.predicted, labels=classes)
    return counts


def compute_metrics(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of ``metrics.json`` that depend on predictions alone."""
    confusion = compute_confusion(predictions)
    has_images = confusion.sum(axis=1) > 0
    accuracy = predictions.accuracy
    metrics: dict[str, Any] = {
        "accuracy": accuracy,
        **compute_macro(predictions),
        "error": 1 - accuracy,
        "loss": predictions.loss,
        "roc_auc": compute_roc_auc(predictions),
        "num_samples": len(predictions.labels),
        "classes_not_judged": [name for name, has in zip(classes, has_images, strict=True) if not has],
    }
    if len(classes) >= TOP5_CLASSES:
        top5 = find_in_top_k(predictions.logits, predictions.labels, 5).double().mean().item()
        metrics |= {"top5_accuracy": top5, "top5_error": 1 - top5}
    return metrics | {"most_confused": find_most_confused(confusion, classes)}


def compute_macro(predictions: Predictions) -> dict[str, float]:
    """Return means over the classes with images; a class that was never predicted has a precision of 0."""
    precision, recall, f1, support = compute_by_class(predictions)
    has_images = support > 0
    return {
        "balanced_accuracy": float(recall[has_images].mean()),  # the macro recall, by definition
        "precision_macro": float(np.nan_to_num(precision[has_images]).mean()),
        "recall_macro": float(recall[has_images].mean()),
        "f1_macro": float(f1[has_images].mean()),
    }


def compute_by_class(predictions: Predictions) -> tuple[Floats, Floats, Floats, Counts]:
    """Return precision, recall, F1 and number of images of each class, (K,) each.

    All three metrics are NaN for a class without images; so is the precision of a class that was never
    predicted.
    """
    from sklearn.metrics import precision_recall_fscore_support

    truth, predicted = predictions.labels.numpy(), predictions.predicted.numpy()
    num_classes = predictions.logits.shape[1]
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=range(num_classes), zero_division=np.nan
    )
    support = np.bincount(truth, minlength=num_classes)
    precision, recall, f1 = (np.where(support > 0, values, np.nan) for values in (precision, recall, f1))
    return precision, recall, f1, support


def list_by_class(predictions: Predictions, classes: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return the rows of ``per_class.csv``: a name and :data:`finetune.targets.CLASS_METRICS`.

    An undefined metric is written as ``n/a``, never as 0.
    """
    *metrics, support = compute_by_class(predictions)
    cells = [[UNKNOWN if np.isnan(value) else value for value in column.tolist()] for column in metrics]
    times = np.bincount(predictions.predicted.numpy(), minlength=len(classes))
    return list(zip(classes, *cells, support.tolist(), times.tolist(), strict=True))


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


def compute_roc_auc(predictions: Predictions) -> float | None:
    """Return the area under the ROC curve, each class against the rest, averaged over classes.

    It is the chance that an image of a class gets a higher score for it than an image of another class; 0.5
    is the value of random guessing. None where fewer than two classes have images.
    """
    from sklearn.metrics import roc_auc_score

    labels = predictions.labels.numpy()
    present = np.unique(labels)
    if len(present) < 2:
        return None
    scores = compute_log_odds(predictions.logits)
    return float(np.mean([roc_auc_score(labels == label, scores[:, label]) for label in present]))
