"""Names of classes, and the columns of prediction files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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


def read_share(cell: str | float) -> float:
    """Return the probability in a table cell.

    Raises:
        ValueError: it is no number from 0 to 1.
    """
    share = float(cell)
    if not 0 <= share <= 1:  # also refuses nan
        raise ValueError(f"{cell} is no probability")
    return share


def format_share(share: float) -> str:
    """Return a probability as a percentage; a value below 1 is never rounded up to 100 %."""
    return "more than 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


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
