"""One class for each image: the softmax of logits, its loss and its decisions.

The functions serve every command that works on classes; :class:`SingleLabel` is the kind as a run takes it.

torch is imported inside the functions that compute: a recipe or a table can be read without it.

Shape legend: B batch, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from finetune.targets.columns import format_share, name_answer_columns, read_share
from finetune.targets.target import ClassWeights, Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

# --- the training loss ---------------------------------------------------------------------------

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


# --- the kind ------------------------------------------------------------------------------------


class SingleLabel(Target):
    """One class for each image."""

    kind = "single"
    score = "accuracy"
    additive_score = "accuracy"
    solver = "softmax"
    activation = "softmax"
    has_classes = True
    problem = "single_label_classification"

    def classes_of(self, label: str) -> tuple[str, ...]:
        """Return the class."""
        return (label,)

    def describe(self, labels: Sequence[str]) -> str:
        """Return the number of classes."""
        number = len(set(labels))
        return "1 class" if number == 1 else f"{number} classes"

    def strata(self, by_label: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the paths of each class."""
        return {name: [*paths] for name, paths in by_label.items()}

    def encode(self, labels: Sequence[str], classes: Sequence[str]) -> Tensor:
        """Return class indices, (N,) int64."""
        import torch

        index = {name: number for number, name in enumerate(classes)}
        return torch.tensor([index[label] for label in labels], dtype=torch.int64)

    def to_facts(self) -> dict[str, Any]:
        """Return the kind alone."""
        return {"kind": self.kind}

    def build_loss(
        self,
        labels: Tensor,
        num_classes: int,
        class_weights: ClassWeights,
        label_smoothing: float,
        huber_delta: float | None = None,
    ) -> nn.Module:
        """Return the mean cross entropy (:func:`build_loss`)."""
        return build_loss(labels.bincount(minlength=num_classes).tolist(), class_weights, label_smoothing)

    def activate(self, outputs: Tensor) -> Tensor:
        """Return the softmax."""
        return to_probabilities(outputs)

    def deactivate(self, answers: Tensor) -> Tensor:
        """Return the logarithms of probabilities."""
        return to_logits(answers)

    def find_evidence(self, outputs: Tensor) -> Tensor:
        """Return the log odds of each class against all others."""
        import torch

        return torch.from_numpy(compute_log_odds(outputs))

    def answer(self, values: npt.NDArray[np.float32], classes: Sequence[str]) -> tuple[str, float | None]:
        """Return the most probable class and its probability."""
        best = rank_classes(values, 1)[0]
        return classes[best], float(values[best])

    def find_error(self, row: Mapping[str, Any]) -> tuple[float, tuple[str, ...], str] | None:
        """Return the confidence in a wrong class, and the two classes."""
        if row["label"] == row["predicted"]:
            return None
        share = read_share(row["confidence"])
        return share, (row["predicted"], row["label"]), f"with {format_share(share)}"

    def answer_columns(self, classes: Sequence[str], top: int, with_rejected: bool) -> list[str]:
        """Return path, label, confidence, further classes and all probabilities."""
        return name_answer_columns(classes, top, with_rejected)

    def compute_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy in nats."""
        return compute_losses(outputs, labels)

    def compute_score(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the accuracy, in [0, 1]."""
        return (decide(outputs) == labels).double().mean().item()

    def score_each(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Return 1 where the class of the highest score is the label, else 0."""
        return (decide(predicted) == labels).double()

    def compute_monitored(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Return ``accuracy`` and ``loss``."""
        return {self.score: self.compute_score(outputs, labels), "loss": compute_mean_loss(outputs, labels)}
