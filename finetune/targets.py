"""What a label is, and everything that follows from it. Today a label is one class index for each image.

The training loss, the activation, the decision, the names of metrics and the columns of prediction files
depend on the kind of label. They are defined here and nowhere else (tests/test_architecture.py checks this),
so another kind of label, such as several classes or a number for an image, is added by changing this file.

torch is imported inside the functions that compute: a recipe or a table can be read without it.

Shape legend: B batch, N images, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

# --- the training loss ---------------------------------------------------------------------------

ClassWeights = Literal["none", "balanced"]
LINEAR_CLASSIFIER: Final = "softmax"
"""The linear classifier of :mod:`finetune.features.solvers` that has the training loss and gives logits."""


def build_loss(
    counts: Sequence[int] = (), class_weights: ClassWeights = "none", label_smoothing: float = 0.0
) -> nn.Module:
    """Return the mean cross entropy of (logits (B, K), labels (B,) int64 or soft labels (B, K)), in nats.

    Args:
        counts: number of training images of each class, (K,); only read for balanced weights.
        class_weights: ``balanced`` weights each image by the inverse frequency of its class, or of its mixed
            classes by their shares. The mean over hard labels is divided by the sum of the weights; that over
            soft labels by the number of images.
        label_smoothing: share of a label that is spread over all classes, in [0, 1).
    """
    from torch import nn

    if class_weights == "none":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    weights = compute_class_weights(counts)
    if not label_smoothing:
        return nn.CrossEntropyLoss(weight=weights)
    return _build_weighted_smooth_loss(weights, label_smoothing)


def _build_weighted_smooth_loss(weights: Tensor, label_smoothing: float) -> nn.Module:
    """Return the smoothed cross entropy in which an image's whole loss has the weight of its true class.

    torch multiplies the smoothed share of every class by that class's own weight instead. In an image of a
    common class, the share of a rare one then outweighs the true class: with 40 images of one class for each
    of the other, the best prediction for the common class would be the rare one.
    """
    from torch import nn
    from torch.nn import functional as F

    class WeightedSmoothLoss(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            assert self.weight is not None
            is_hard = target.ndim == 1
            shares = (F.one_hot(target, len(self.weight)) if is_hard else target) * self.weight
            whole = shares.sum(dim=1, keepdim=True)  # (B, 1), the weight of each image
            smoothed = shares * (1 - self.label_smoothing) + whole * (self.label_smoothing / len(self.weight))
            summed = F.cross_entropy(input, smoothed, reduction="sum")
            return summed / (whole.sum() if is_hard else len(target))  # as torch does without smoothing

    return WeightedSmoothLoss(weight=weights, label_smoothing=label_smoothing)


def compute_class_weights(counts: Sequence[int]) -> Tensor:
    """Return inverse class frequencies, scaled so that their mean is 1: (K,) float32."""
    import torch

    inverse = 1.0 / torch.tensor(counts, dtype=torch.float64).clamp_min(1)
    return (inverse / inverse.mean()).float()


def compute_share(loss: nn.Module, part: Tensor, whole: Tensor) -> Tensor | float:
    """Return the weight of a part of a batch in the mean loss of the whole batch, in (0, 1].

    Without class weights it is the share of the images. With them, the mean over hard labels is divided by
    the sum of their weights, so it is the share of that sum.

    Args:
        loss: loss module made by :func:`build_loss`.
        part: labels of the part, (B',) or (B', K).
        whole: labels of the batch, (B,) or (B, K).
    """
    weight = getattr(loss, "weight", None)
    if weight is None or whole.ndim > 1:
        return len(part) / len(whole)
    share: Tensor = weight[part].sum() / weight[whole].sum()
    return share


# --- activation and decision ---------------------------------------------------------------------


ACTIVATION = "softmax"
"""The function that turns logits into probabilities, as a model card names it."""
_SMALLEST = 1e-30
"""Smallest probability whose logarithm is taken, so that the result stays finite in float32."""


def to_probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each class, (N, K), from logits (N, K)."""
    return logits.softmax(dim=1)


def to_logits(probabilities: Tensor) -> Tensor:
    """Return logits (N, K) that have these probabilities (N, K) float32; finite even for probability 0."""
    return probabilities.clamp_min(_SMALLEST).log()


def compute_log_odds(logits: Tensor) -> npt.NDArray[np.float64]:
    """Return log(p / (1 - p)) of each class, (N, K), rounded to nine decimals.

    It orders images as p does, but without the ties of images whose p rounds to 1. Rounding makes values
    equal that differ in their last bits only.

    Args:
        logits: logits (N, K), K at least 2.
    """
    import torch

    logits = logits.double()
    best = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, best, float("-inf")).logsumexp(dim=1, keepdim=True)
    logs = logits.log_softmax(dim=1)
    small = logs - torch.log1p(-logs.exp())  # exact for all classes but the best: their p is at most 1/2
    odds: npt.NDArray[np.float64] = small.scatter(1, best, logits.gather(1, best) - others).numpy()
    return odds.round(9)


def decide(scores: Tensor) -> Tensor:
    """Return the class of the highest logit, probability or vote count: (N, K) -> (N,) int64."""
    return scores.argmax(dim=1)


def decide_with_confidence(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest probability (N,) in [0, 1] and its class (N,) int64 from probabilities (N, K)."""
    confidence, predicted = probabilities.max(dim=1)
    return confidence, predicted


def compute_margins(probabilities: Tensor) -> Tensor:
    """Return the highest minus the second highest probability, (N, K) -> (N,); infinite for one class."""
    if probabilities.shape[1] < 2:
        return probabilities[:, 0] + float("inf")
    best = probabilities.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def rank_classes(probabilities: npt.NDArray[np.float32], k: int) -> list[int]:
    """Return the ``k`` most probable classes of one image, best first; ties go to the lower index.

    Args:
        probabilities: probabilities of one image, (K,).
        k: largest number of classes to return.
    """
    order: list[int] = (-probabilities).argsort(kind="stable")[:k].tolist()
    return order


# --- metrics of single images --------------------------------------------------------------------


def compute_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each image in nats, (N,) float64, without smoothing or class weights."""
    from torch.nn import functional as F

    return F.cross_entropy(logits.double(), labels, reduction="none")


def compute_mean_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the mean cross entropy in nats, without smoothing or class weights."""
    from torch.nn import functional as F

    return F.cross_entropy(logits.double(), labels).item()


def find_in_top_k(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return whether the label of each image is among its ``k`` most probable classes, (N,) bool."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1)


# --- names of metrics ----------------------------------------------------------------------------

Monitor = Literal["accuracy", "loss"]
"""Validation metrics that can select the best epoch."""
TOP5_CLASSES = 6
"""Smallest number of classes for which top-5 accuracy is reported."""
METRIC_NAMES: dict[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "macro F1",
    "precision_macro": "macro precision",
    "recall_macro": "macro recall",
    "top5_accuracy": "top-5 accuracy",
    "roc_auc": "ROC AUC",
    "loss": "log loss",
    "error": "error",
    "top5_error": "top-5 error",
}
"""Display name of each metric of ``metrics.json``, by key."""
HEADLINE_METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "top5_accuracy", "roc_auc")
"""The most important metrics, in order of importance."""
DETAIL_METRICS = ("error", "top5_error", "precision_macro", "recall_macro", "loss")
"""All other metrics."""
CARD_METRICS = (
    "accuracy",
    "top5_accuracy",
    "balanced_accuracy",
    "precision_macro",
    "recall_macro",
    "f1_macro",
    "roc_auc",
    "loss",
)
"""The metrics of a model card, in its order."""
SERIES_METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "loss", "roc_auc", "top5_accuracy")
"""The metrics that are averaged over the runs of a series (``--folds``, ``--repeats``)."""
CLASS_METRICS = ("precision", "recall", "f1", "support", "predicted")
"""Columns of ``per_class.csv`` after the label: the metrics of one class."""


def compute_monitored(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics that are computed after each epoch: ``accuracy`` in [0, 1] and ``loss`` in nats."""
    accuracy = (decide(logits) == labels).double().mean().item()
    return {"accuracy": accuracy, "loss": compute_mean_loss(logits, labels)}


def is_better(metrics: Mapping[str, float], best: Mapping[str, float], monitor: Monitor) -> bool:
    """Return whether an epoch's validation metrics beat the best so far (``{}`` before the first epoch).

    ``accuracy``: higher accuracy wins, and at equal accuracy the lower loss; ``loss``: lower loss wins.
    """
    if not best:
        return True
    if monitor == "loss":
        return metrics["loss"] < best["loss"]
    return (metrics["accuracy"], -metrics["loss"]) > (best["accuracy"], -best["loss"])


# --- columns of prediction files -----------------------------------------------------------------

PREDICTION_COLUMNS = ("path", "label", "predicted", "confidence")
"""First columns of ``predictions.csv``; the columns of :func:`name_probabilities` follow."""
_PROBABILITY = "prob_"


def make_unique(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of which no two are equal: one that occurs several times gets its index appended.

    A name that occurs once stays as it is.
    """
    times, taken, unique = Counter(names), set(names), []
    for index, name in enumerate(names):
        own = name
        while times[name] > 1 and own in taken:
            own = f"{own} ({index})"
        taken.add(own)
        unique.append(own)
    return tuple(unique)


def name_probabilities(classes: Sequence[str]) -> list[str]:
    """Return the column name of each class's probability."""
    return [f"{_PROBABILITY}{name}" for name in classes]


def read_classes(columns: Sequence[str]) -> list[str]:
    """Return the classes whose probabilities a table holds, in the order of its columns."""
    return [name.removeprefix(_PROBABILITY) for name in columns if name.startswith(_PROBABILITY)]


def name_answer_columns(classes: Sequence[str], top: int = 1, with_rejected: bool = False) -> list[str]:
    """Return the columns of ``finetune predict``, whose images have no known label.

    Args:
        classes: class names in index order.
        top: number of classes named for each image, the most probable first.
        with_rejected: whether a column says if the prediction was rejected.
    """
    rejected = ["rejected"] if with_rejected else []
    more = [f"{what}_{place}" for place in range(2, top + 1) for what in ("label", "confidence")]
    return ["path", "label", "confidence", *rejected, *more, *name_probabilities(classes)]
