"""What all kinds of labels have in common in their summaries: the result, and ``predictions.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.evaluation.predictions import Predictions
from finetune.runs.files import FLOAT_FORMAT, escape_formula, format_csv_line, write_chunks
from finetune.runs.folder import RunFolder
from finetune.targets import Target

EvaluatedImage = tuple[str, str]
"""Path and label of an evaluated image."""


@dataclass(frozen=True)
class Summary:
    """The metrics of evaluated images.

    Attributes:
        predictions: the predictions after calibration.
        temperature: the temperature that calibrated them.
        metrics: content for ``metrics.json``. Only those under ``calibration`` and ``reject`` depend on the
            temperature; ``loss`` is that of the network as it was trained.
        target: what the labels are, with what validation images chose of it.
    """

    predictions: Predictions
    temperature: float
    metrics: dict[str, Any]
    target: Target


class LabelIssue(NamedTuple):
    """A label that is probably wrong.

    Attributes:
        place: number of the image, in [0, N).
        suggested: the label that it probably should have.
        values: the numbers that say so, named by :attr:`finetune.evaluation.summary.Judge.issue_columns`.
        captions: what follows the given and the suggested label in a picture.
    """

    place: int
    suggested: str
    values: tuple[float, float]
    captions: tuple[str, str]


def write_predictions(
    folder: RunFolder,
    columns: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Sequence[float]]],
) -> None:
    """Write ``predictions.csv``: the texts of each row, and then its numbers."""

    def lines() -> Iterable[bytes]:
        yield format_csv_line([escape_formula(column) for column in columns]).encode()
        for texts, numbers in rows:
            names = format_csv_line([escape_formula(text) for text in texts]).removesuffix("\n")
            form = f",{FLOAT_FORMAT}" * len(numbers) + "\n"
            yield (names + form % tuple(numbers)).encode()

    write_chunks(folder.predictions, lines())
