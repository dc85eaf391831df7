"""What the labels of a data set are: the interface of all kinds.

A label is kept as text, as tables and folders give it: a class, several classes joined by ``|``, or a number.
Everything that follows from the kind is a method here: which outputs the network has, how a label becomes a
tensor, the training loss, what an output means, and which metric chooses the best epoch.

Shape legend: N images, B batch, K classes (outputs of the network).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

TargetKind = Literal["single", "multi", "number"]
ClassWeights = Literal["none", "balanced"]
SEPARATOR = "|"
"""Joins the classes of a label; no class of several has it in its name."""


class Target(ABC):
    """What the labels of a data set are.

    Attributes:
        kind: name in recipes and files.
        score: name of the metric that chooses the best epoch; higher is better.
        additive_score: name of the metric that is a mean over images (:meth:`score_each`); higher is better.
        solver: kind of the linear classifier (:mod:`finetune.features.solvers`) that has the training loss.
        activation: function that turns the network's outputs into answers, as a model card names it.
        has_classes: whether outputs are classes, which can be weighted, smoothed and mixed.
        problem: name of the kind in configurations of Hugging Face transformers.
    """

    kind: ClassVar[TargetKind]
    score: ClassVar[str]
    additive_score: ClassVar[str]
    solver: ClassVar[Literal["softmax", "logreg", "ridge"]]
    activation: ClassVar[str]
    has_classes: ClassVar[bool]
    problem: ClassVar[str]

    # --- labels ----------------------------------------------------------------------------------

    def name_outputs(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the network's outputs, in code-point order as torchvision's ImageFolder."""
        return tuple(sorted({name for label in labels for name in self.classes_of(label)}))

    @abstractmethod
    def classes_of(self, label: str) -> tuple[str, ...]:
        """Return the names of the outputs that a label is about: its classes, or that of the number."""

    @abstractmethod
    def describe(self, labels: Sequence[str]) -> str:
        """Return in some words what the labels of all images are: ``3 classes``."""

    @abstractmethod
    def strata(self, by_label: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the paths of images by what a drawn split keeps even: an image may be in several strata.

        Args:
            by_label: the paths of each label.
        """

    @abstractmethod
    def encode(self, labels: Sequence[str], classes: Sequence[str]) -> Tensor:
        """Return labels as training takes them: (N,) int64, (N, K) or (N, 1) float32."""

    @abstractmethod
    def to_facts(self) -> dict[str, Any]:
        """Return what a model's files must say about its labels, as JSON values."""

    # --- training --------------------------------------------------------------------------------

    @abstractmethod
    def build_loss(
        self,
        labels: Tensor,
        num_classes: int,
        class_weights: ClassWeights,
        label_smoothing: float,
        huber_delta: float | None = None,
    ) -> nn.Module:
        """Return the mean loss of (outputs (B, K), labels (B, ...)) over images.

        Args:
            labels: those of the training images, (N, ...); only read for balanced weights.
            num_classes: K.
            class_weights: ``balanced`` gives rare classes more weight.
            label_smoothing: share of a label that is spread over what it is not, in [0, 1).
            huber_delta: error of a number, in standard deviations, beyond which it counts linearly; None for
                never.
        """

    # --- outputs ---------------------------------------------------------------------------------

    @abstractmethod
    def activate(self, outputs: Tensor) -> Tensor:
        """Return answers (N, K) of outputs (N, K): probabilities, or values in their own unit."""

    @abstractmethod
    def deactivate(self, answers: Tensor) -> Tensor:
        """Return outputs (N, K) that have these answers (N, K) float32; finite even for probability 0."""

    def find_evidence(self, outputs: Tensor) -> Tensor:
        """Return what outputs (N, K) say for each answer, without bounds, (N, K) float64.

        That is the log odds of a class, or the number in standard deviations.
        """
        return outputs.double()

    @abstractmethod
    def answer(self, values: npt.NDArray[np.float32], classes: Sequence[str]) -> tuple[str, float | None]:
        """Return the label that the answers of one image (K,) give, and its probability where it has one."""

    @abstractmethod
    def find_error(self, row: Mapping[str, Any]) -> tuple[float, tuple[str, ...], str] | None:
        """Return how wrong an answer is, which outputs that is about, and what is said of it; None if right.

        Args:
            row: the cells of an image in ``predictions.csv``, by column.

        Raises:
            ValueError: a number is damaged.
            LookupError: a column is missing.
        """

    @abstractmethod
    def answer_columns(self, classes: Sequence[str], top: int, with_rejected: bool) -> list[str]:
        """Return the columns of ``finetune predict``, whose images have no known label.

        Args:
            classes: names of the outputs in index order.
            top: number of classes named for each image, the most probable first.
            with_rejected: whether a column says if the prediction was rejected.
        """

    @abstractmethod
    def compute_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image, (N,) float64, without smoothing or weights."""

    @abstractmethod
    def compute_score(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the metric that chooses the best epoch."""

    @abstractmethod
    def score_each(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Return what each image adds to :attr:`additive_score`, which is the mean of them, (N,) float64.

        So differences between two predictors have a paired standard error over images.

        Args:
            predicted: scores of classes (N, K), or estimates of the labels' own numbers (N, K).
            labels: as :meth:`encode` gives them, (N,) or (N, K).
        """

    def compute_monitored(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the metrics that are computed after each epoch, by name: the score, and ``loss``."""
        loss = self.compute_losses(outputs, labels).mean().item()
        return {self.score: self.compute_score(outputs, labels), "loss": loss}


def share_explained(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return what each image adds to R squared, averaged over columns, (N,) float64.

    Columns without spread, of which nothing can be explained, are left out.

    Args:
        predicted: estimates (N, K).
        labels: numbers (N, K).
    """
    truth = labels.double()
    spread = (truth - truth.mean(dim=0)).square().mean(dim=0)
    known = spread > 0
    errors = (predicted.double() - truth).square()[:, known] / spread[known]
    return 1 - errors.mean(dim=1) if known.any() else errors.sum(dim=1)


def is_better(metrics: Mapping[str, float], best: Mapping[str, float], monitor: str) -> bool:
    """Return whether an epoch's validation metrics beat the best so far (``{}`` before the first epoch).

    Args:
        metrics: the score and the loss, as :meth:`Target.compute_monitored` names them.
        best: those of the best epoch.
        monitor: ``score``: a higher score wins, and at equal scores the lower loss; ``loss``: the lower loss;
            ``last``: the later epoch.
    """
    if not best or monitor == "last":
        return True
    if monitor == "loss":
        return metrics["loss"] < best["loss"]
    (score,) = metrics.keys() - {"loss"}
    return (metrics[score], -metrics["loss"]) > (best[score], -best["loss"])
