"""What a run reports about its predictions, by the kind of its labels.

A :class:`Judge` computes the metrics of one kind and writes its tables; :data:`JUDGES` is their registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from finetune.evaluation.multi_label import MultiLabelJudge
from finetune.evaluation.number import NumberJudge
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.resampling import Floats, Weights
from finetune.evaluation.single_label import SingleLabelJudge
from finetune.evaluation.tables import EvaluatedImage, LabelIssue, Summary
from finetune.runs.folder import RunFolder
from finetune.targets import TargetKind


class Judge(Protocol):
    """Computes the metrics of predictions of one kind of labels, and writes their tables.

    Attributes:
        issue_columns: names of the two numbers of a :class:`~finetune.evaluation.tables.LabelIssue`.
    """

    issue_columns: tuple[str, str]

    def summarize(self, evaluated: Predictions, val: Predictions | None, classes: Sequence[str]) -> Summary:
        """Return all metrics of a network from its predictions.

        Args:
            evaluated: uncalibrated predictions of the evaluated images.
            val: uncalibrated predictions of the validation images; None if these are the evaluated images.
            classes: names of the outputs in index order.
        """
        ...

    def measure(self, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
        """Return the metrics and ``intervals`` of predictions, without choosing anything by them."""
        ...

    def write_tables(
        self,
        folder: RunFolder,
        images: Sequence[EvaluatedImage],
        predictions: Predictions,
        classes: Sequence[str],
    ) -> None:
        """Write ``predictions.csv`` and the tables of the kind; predictions are those after calibration."""
        ...

    def weigh_score(self, values: Floats, labels: Tensor) -> Callable[[Weights], Floats]:
        """Return the function that gives the score, (R,), of images weighted in R ways, (R, N).

        Args:
            values: probabilities of classes, or numbers, of each image (N, K).
            labels: (N, ...), as the target encodes them; numbers in their own unit.
        """
        ...

    def find_issues(self, predictions: Predictions, classes: Sequence[str]) -> list[LabelIssue]:
        """Return the labels that are probably wrong, the least probable first.

        Args:
            predictions: each image's by a network or classifier that was not trained on it.
            classes: names of the outputs in index order.
        """
        ...

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """Return the most important metrics with their interval in a line."""
        ...


JUDGES: Mapping[TargetKind, Judge] = {
    "single": SingleLabelJudge(),
    "multi": MultiLabelJudge(),
    "number": NumberJudge(),
}
"""By the kind of labels."""
