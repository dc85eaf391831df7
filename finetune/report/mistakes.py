"""The wrong answers of a run, the worst first, whatever its labels are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from finetune.targets import Target


@dataclass(frozen=True)
class Mistake:
    """A wrong answer.

    Attributes:
        path: the image, below the data folder.
        label: the true label.
        predicted: the answer.
        size: how wrong it is; larger is worse.
        outputs: names of the outputs that it is about.
        said: what follows the answer in a sentence.
    """

    path: str
    label: str
    predicted: str
    size: float
    outputs: tuple[str, ...]
    said: str


def list_mistakes(target: Target, rows: Iterable[Mapping[str, Any]]) -> list[Mistake]:
    """Return the wrong answers, the worst first; of numbers all but those that are exact.

    Args:
        target: what the labels are.
        rows: those of ``predictions.csv``. Rows with damaged numbers are left out.
    """
    found = []
    for row in rows:
        with suppress(ValueError, LookupError):
            path, label, predicted = (str(row[name]) for name in ("path", "label", "predicted"))
            if (error := target.find_error(row)) is not None:
                found.append(Mistake(path, label, predicted, *error))
    return sorted(found, key=lambda mistake: -mistake.size)
