"""Keys and display names of the metrics in ``metrics.json``, of all kinds of labels."""

from __future__ import annotations

from typing import Literal

Monitor = Literal["score", "loss", "last"]
"""What selects the best epoch: a validation metric, or nothing but its number; the score is named by the kind
of labels."""
SCORES = ("accuracy", "map", "r2")
"""The scores of all kinds of labels."""
TOP5_CLASSES = 6
"""Smallest number of classes for which top-5 accuracy is reported."""
METRIC_NAMES: dict[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "map": "mean average precision",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "precision_macro": "macro precision",
    "recall_macro": "macro recall",
    "exact_match": "all labels right",
    "top5_accuracy": "top-5 accuracy",
    "roc_auc": "ROC AUC",
    "r2": "R squared",
    "spearman": "rank correlation",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "loss": "log loss",
    "error": "error",
    "top5_error": "top-5 error",
}
"""Display name of each metric of ``metrics.json``, by key."""
HEADLINE_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "map",
    "f1_micro",
    "f1_macro",
    "exact_match",
    "top5_accuracy",
    "roc_auc",
    "r2",
    "spearman",
)
"""The most important metrics, in order of importance; all are 1 at best."""
DETAIL_METRICS = ("mae", "rmse", "error", "top5_error", "precision_macro", "recall_macro", "loss")
"""All other metrics."""
PLAIN_METRICS = ("loss", "roc_auc", "r2", "spearman", "mae", "rmse", "map")
"""Metrics that are shown as numbers and not in percent."""
CARD_METRICS = (
    "accuracy",
    "top5_accuracy",
    "balanced_accuracy",
    "map",
    "precision_macro",
    "recall_macro",
    "f1_micro",
    "f1_macro",
    "roc_auc",
    "r2",
    "spearman",
    "mae",
    "rmse",
    "loss",
)
"""The metrics of a model card, in its order."""
SERIES_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "f1_macro",
    "loss",
    "roc_auc",
    "top5_accuracy",
    "map",
    "f1_micro",
    "r2",
    "mae",
    "rmse",
)
"""The metrics that are averaged over the runs of a series (``--folds``, ``--repeats``)."""
CLASS_METRICS = ("precision", "recall", "f1", "support", "predicted")
"""Columns of ``per_class.csv`` after the label: the metrics of one class."""
