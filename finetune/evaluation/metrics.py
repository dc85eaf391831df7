"""The final figures, from the confusion matrix. Accuracies and F1 are fractions in [0, 1].

Averages over classes run over the classes that the judged split has. A class without images has no
recall: counting it as 0 would punish the network, and as 1 would flatter it. (torchmetrics' macro
averages count a class with false positives only; hence these few lines. scikit-learn agrees with them
in the tests.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation.predict import Predictions

TOP5_CLASSES = 6
"""Top-5 accuracy means something from six classes on."""


def compute_confusion(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Return counts (K, K): row = true class, column = predicted class."""
    num_classes = predictions.logits.shape[1]
    cells = predictions.labels.numpy() * num_classes + predictions.predicted.numpy()
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def compute_metrics(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Return the figures of ``metrics.json`` that depend on predictions alone."""
    confusion = compute_confusion(predictions)
    support, hits = confusion.sum(axis=1), confusion.diagonal()
    judged = support > 0
    recall = hits[judged] / support[judged]
    f1 = 2 * hits[judged] / (support + confusion.sum(axis=0))[judged]
    metrics = {
        "accuracy": float(hits.sum() / support.sum()),
        "balanced_accuracy": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "loss": predictions.loss,
        "num_samples": int(support.sum()),
        "classes_not_judged": [name for name, has in zip(classes, judged, strict=True) if not has],
    }
    if len(classes) >= TOP5_CLASSES:
        metrics["top5_accuracy"] = compute_top_k(predictions, 5)
    return metrics


def compute_top_k(predictions: Predictions, k: int) -> float:
    """Return the share of images whose true class is among the ``k`` likeliest."""
    best = predictions.logits.topk(k, dim=1).indices
    return (best == predictions.labels[:, None]).any(dim=1).double().mean().item()
