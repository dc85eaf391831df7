"""Several classes for each image, or none: each class is a decision of its own.

Shape legend: N images, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.targets.columns import format_share, name_probabilities, read_share
from finetune.targets.target import SEPARATOR, ClassWeights, Target, share_explained

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

DEFAULT_THRESHOLD = 0.5
"""Probability from which a class is named, where validation images chose no other."""
NONE = ""
"""Label of an image that has no class."""


@dataclass(frozen=True)
class MultiLabel(Target):
    """Several classes for each image, or none; a label is their sorted names, joined by ``|``.

    Attributes:
        thresholds: probability from which each class is named, (K,) in [0, 1]; empty for 0.5 each.
    """

    thresholds: tuple[float, ...] = ()

    kind = "multi"
    score = "map"
    additive_score = "r2"
    solver = "logreg"
    activation = "sigmoid"
    has_classes = True
    problem = "multi_label_classification"

    def classes_of(self, label: str) -> tuple[str, ...]:
        """Return the classes of a label, sorted."""
        return tuple(label.split(SEPARATOR)) if label else ()

    def describe(self, labels: Sequence[str]) -> str:
        """Return the number of classes, the mean number an image has, and the images without one."""
        sets = [self.classes_of(label) for label in labels]
        number, total = len({name for own in sets for name in own}), sum(map(len, sets))
        empty = sum(not own for own in sets)
        none = f", {empty} images with none" if empty else ""
        return f"several labels: {number} classes, {total / max(len(sets), 1):.2g} an image{none}"

    def strata(self, by_label: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the paths of each class, and those of images without one."""
        found: dict[str, list[str]] = {}
        for label, paths in by_label.items():
            for name in self.classes_of(label) or (NONE,):
                found.setdefault(name, []).extend(paths)
        if len(found.get(NONE, ())) == 1:  # it cannot be in both splits, and need not
            del found[NONE]
        return found

    def encode(self, labels: Sequence[str], classes: Sequence[str]) -> Tensor:
        """Return 1 for each class of an image and 0 for others, (N, K) float32."""
        import torch

        index = {name: number for number, name in enumerate(classes)}
        encoded = torch.zeros(len(labels), len(classes))
        for row, label in enumerate(labels):
            encoded[row, [index[name] for name in self.classes_of(label)]] = 1.0
        return encoded

    def to_facts(self) -> dict[str, Any]:
        """Return the kind and the thresholds."""
        return {"kind": self.kind, "thresholds": list(self.thresholds)}

    def build_loss(
        self,
        labels: Tensor,
        num_classes: int,
        class_weights: ClassWeights,
        label_smoothing: float,
        huber_delta: float | None = None,
    ) -> nn.Module:
        """Return the mean over images of the binary cross entropy, summed over classes.

        A sum gives every class the gradient that the softmax's cross entropy would give it, so that one
        learning rate suits both kinds; torch's own mean over classes divides it by K. ``balanced`` is torch's
        ``pos_weight``: images without a class for each image with it.
        """
        import torch

        weight = None
        if class_weights == "balanced":
            positive = labels.sum(dim=0)
            weight = (len(labels) - positive).clamp_min(1) / positive.clamp_min(1)
        return _build_summed_loss(torch.nn.BCEWithLogitsLoss, weight, label_smoothing)

    def activate(self, outputs: Tensor) -> Tensor:
        """Return the probability of each class."""
        return outputs.sigmoid()

    def deactivate(self, answers: Tensor) -> Tensor:
        """Return the log odds of probabilities."""
        return answers.logit(eps=1e-7)

    def answer(self, values: npt.NDArray[np.float32], classes: Sequence[str]) -> tuple[str, float | None]:
        """Return the classes whose probability reaches their threshold."""
        limits = self.thresholds or [DEFAULT_THRESHOLD] * len(classes)
        rows = zip(classes, values.tolist(), limits, strict=True)
        return SEPARATOR.join(name for name, value, limit in rows if value >= limit), None

    def find_error(self, row: Mapping[str, Any]) -> tuple[float, tuple[str, ...], str] | None:
        """Return what the probability of a class differs from the truth by, of the worst wrong class."""
        true, named = ({*self.classes_of(row[column])} for column in ("label", "predicted"))
        if true == named:
            return None
        shares = {
            name: read_share(row[column]) for name in true ^ named for column in name_probabilities([name])
        }
        errors = {name: 1 - share if name in true else share for name, share in shares.items()}
        worst = min(errors, key=lambda name: (-errors[name], name))
        return errors[worst], (worst,), f"with {format_share(shares[worst])} for {worst}"

    def answer_columns(self, classes: Sequence[str], top: int, with_rejected: bool) -> list[str]:
        """Return path, label (the classes that are named) and all probabilities."""
        return ["path", "label", *name_probabilities(classes)]

    def compute_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross entropy in nats, summed over classes."""
        from torch.nn import functional as F

        losses = F.binary_cross_entropy_with_logits(outputs.double(), labels.double(), reduction="none")
        return losses.sum(dim=1)

    def compute_score(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the mean average precision over the classes that have images, in [0, 1]."""
        found = average_precisions(outputs, labels)
        known = found[~found.isnan()]
        return known.mean().item() if len(known) else 0.0

    def score_each(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Return what each image adds to R squared of 0 and 1, averaged over classes."""
        return share_explained(predicted, labels)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return which classes are named, (N, K) bool, from probabilities (N, K)."""
        limits = probabilities.new_tensor(self.thresholds or [DEFAULT_THRESHOLD] * probabilities.shape[1])
        decided: Tensor = probabilities >= limits
        return decided


def average_precisions(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the average precision of each class, (K,) float64; NaN for a class without images."""
    import numpy as np
    import torch
    from sklearn.metrics import average_precision_score

    truth, scores = labels.numpy(), outputs.double().numpy()
    return torch.tensor(
        [
            average_precision_score(truth[:, k], scores[:, k]) if truth[:, k].any() else np.nan
            for k in range(truth.shape[1])
        ],
        dtype=torch.float64,
    )


def _build_summed_loss(kind: type[nn.Module], weight: Tensor | None, label_smoothing: float) -> nn.Module:
    class SummedLoss(kind):  # type: ignore[valid-type, misc]
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            smoothed = target * (1 - label_smoothing) + label_smoothing / 2
            losses: Tensor = super().forward(input, smoothed)
            return losses.sum(dim=1).mean()

    return SummedLoss(pos_weight=weight, reduction="none")
