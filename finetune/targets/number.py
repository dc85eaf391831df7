"""A number for each image: the network's one output is the number in standard deviations from the mean.

Shape legend: N images, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Self

from finetune.targets.target import ClassWeights, Target, share_explained

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

OUTPUT = "value"
"""Name of the network's one output."""
STRATA = 10
"""Ranges of equal numbers of images that a drawn split keeps even."""
_FEWEST = 4
"""Images of a range, so that each range has images of both splits."""


@dataclass(frozen=True)
class Number(Target):
    """A number for each image.

    Attributes:
        mean: mean of the training labels.
        std: their standard deviation, positive.
        margin: half the width of an interval that should hold 90 % of all numbers; None if not measured.
    """

    mean: float = 0.0
    std: float = 1.0
    margin: float | None = None

    kind = "number"
    score = "r2"
    additive_score = "r2"
    solver = "ridge"
    activation = "identity"
    has_classes = False
    problem = "regression"

    @classmethod
    def fit(cls, labels: Sequence[str]) -> Self:
        """Return the kind with mean and deviation of training labels."""
        values = [*map(float, labels)]
        return cls(fmean(values), pstdev(values) or 1.0)

    def classes_of(self, label: str) -> tuple[str, ...]:
        """Return the name of the one output."""
        return (OUTPUT,)

    def describe(self, labels: Sequence[str]) -> str:
        """Return the range, and mean and deviation in training."""
        values = [*map(float, labels)]
        ends = f"{min(values, default=0):.4g} to {max(values, default=0):.4g}"
        return f"a number from {ends} (in training: mean {self.mean:.4g}, deviation {self.std:.4g})"

    def strata(self, by_label: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the paths by the rank of their number, in :data:`STRATA` ranges of equal size."""
        ordered = sorted(by_label.items(), key=lambda item: float(item[0]))
        paths = [path for _, own in ordered for path in sorted(own)]
        number = max(1, min(STRATA, len(paths) // _FEWEST))
        ends = [len(paths) * one // number for one in range(number + 1)]
        return {f"{low} to {high}": paths[low:high] for low, high in pairwise(ends)}

    def encode(self, labels: Sequence[str], classes: Sequence[str]) -> Tensor:
        """Return standardised numbers, (N, 1) float32."""
        import torch

        values = torch.tensor([float(label) for label in labels], dtype=torch.float64)
        return ((values - self.mean) / self.std).float()[:, None]

    def to_facts(self) -> dict[str, Any]:
        """Return the kind, the mean, the deviation and the margin."""
        return {"kind": self.kind, "mean": self.mean, "std": self.std, "margin": self.margin}

    def build_loss(
        self,
        labels: Tensor,
        num_classes: int,
        class_weights: ClassWeights,
        label_smoothing: float,
        huber_delta: float | None = None,
    ) -> nn.Module:
        """Return the mean of :meth:`compute_losses`, or of its Huber form (Huber 1964).

        Its curvature is half of what the squared error's own half has, and twice a binary cross entropy's at
        most, so that the learning rate of classes is stable here too.
        """
        from torch import nn

        class QuarterSquaredError(nn.HuberLoss):
            def forward(self, input: Tensor, target: Tensor) -> Tensor:
                return super().forward(input, target) / 2

        return QuarterSquaredError(delta=float("inf") if huber_delta is None else huber_delta)

    def activate(self, outputs: Tensor) -> Tensor:
        """Return the numbers in their own unit."""
        return outputs * self.std + self.mean

    def deactivate(self, answers: Tensor) -> Tensor:
        """Return standardised numbers."""
        return (answers - self.mean) / self.std

    def answer(self, values: npt.NDArray[np.float32], classes: Sequence[str]) -> tuple[str, float | None]:
        """Return the number."""
        return f"{values[0]:.9g}", None

    def find_error(self, row: Mapping[str, Any]) -> tuple[float, tuple[str, ...], str] | None:
        """Return the absolute error."""
        error = float(row["predicted"]) - float(row["label"])
        if not math.isfinite(error):
            raise ValueError(f"{row['path']} has an error that is not finite")
        return (abs(error), (OUTPUT,), f"off by {error:+.4g}") if error else None

    def answer_columns(self, classes: Sequence[str], top: int, with_rejected: bool) -> list[str]:
        """Return path, value, and the ends of its interval where a margin is known."""
        return ["path", OUTPUT, *(() if self.margin is None else ("low", "high"))]

    def compute_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return a quarter of the squared error of standardised numbers."""
        return (outputs.double() - labels.double()).square().sum(dim=1) / 4

    def compute_score(self, outputs: Tensor, labels: Tensor) -> float:
        """Return R squared: 1 for exact answers, 0 for the mean of these labels, negative for worse."""
        errors = (outputs.double() - labels.double()).square().sum().item()
        spread = (labels.double() - labels.double().mean()).square().sum().item()
        return 1 - errors / spread if spread else 0.0

    def score_each(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Return what each image adds to R squared."""
        return share_explained(predicted, labels)
