"""Tables of the report: classes, confused classes, confidence thresholds, variants of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.report.facts import Facts, finite, finite_text
from finetune.report.sections import percent
from finetune.runs.reader import CsvRow
from finetune.targets import CLASS_METRICS

MOST_PAIRS = 15
"""Largest number of confused pairs of classes on the page."""
MOST_BOTH_WAYS = 3
"""Largest number of pairs that are named as often confused both ways."""
OFTEN = 0.05
"""Share of the images of two classes from which these are often confused."""


@dataclass(frozen=True)
class Reject:
    """A confidence threshold below which a prediction is refused, formatted as text.

    Attributes:
        wanted: share of correct predictions asked for above the threshold.
        threshold: confidence.
        answered: share of the evaluated images above it.
        achieved: share of these that is correct, and their number.
        at_least: lower one-sided 95 % limit of that share on the images that chose the threshold; empty
            where unknown.
    """

    wanted: str
    threshold: str
    answered: str
    achieved: str
    at_least: str


def list_rejects(facts: Facts) -> list[Reject]:
    """Return the thresholds of ``metrics.json`` with the results on the evaluated images."""
    return [
        _describe_reject(row, wanted, facts.number("num_samples"))
        for row in facts.rows("reject")
        if (wanted := finite(row.get("precision"))) is not None
    ]


def _describe_reject(row: Mapping[str, Any], wanted: float, num_samples: float | None) -> Reject:
    threshold, coverage, achieved, low, chose = (
        finite(row.get(key)) for key in ("threshold", "coverage", "achieved", "low", "num_images")
    )
    if threshold is None:
        return Reject(f"{100 * wanted:.0f} %", "not reached", percent(coverage or 0.0), "", "")
    kept = "" if num_samples is None or coverage is None else f" of {round(coverage * num_samples):,} images"
    limit = "" if low is None else percent(low) + ("" if chose is None else f", by {chose:,.0f} images")
    return Reject(
        f"{100 * wanted:.0f} %",
        f"{threshold:.4f}" if threshold > 0 else "any",
        "" if coverage is None else percent(coverage),
        "" if achieved is None else percent(achieved) + kept,
        limit,
    )


def describe_rejects(facts: Facts) -> str:
    """Return notes on how the thresholds were chosen and what the lower limit means."""
    calibration = facts.metrics.get("calibration")
    chosen = isinstance(calibration, Mapping) and calibration.get("same_images") is True
    notes = []
    if chosen:
        notes.append("The thresholds were chosen on these images, so the achieved values are optimistic.")
    if any(reject.at_least for reject in list_rejects(facts)):
        notes.append(
            "'At least' is the lower one-sided 95 % limit of that share, on the images that chose the "
            "threshold."
        )
    return " ".join(notes)


# --- variants of an evaluation: several views, several models -----------------------------------


def list_variants(facts: Facts) -> list[list[str]]:
    """Return model, views, accuracy, gain, loss, ECE, time and cost of each variant, as text.

    The list is empty if there is only one variant or a row is malformed.
    """
    rows = facts.metrics.get("variants")
    if not isinstance(rows, list) or len(rows) < 2:
        return []
    try:
        return [_cells(row) for row in rows]
    except (LookupError, TypeError, ValueError):
        return []


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["model"]),
        f"{row['views']:,}",
        f"{100 * row['accuracy']:.1f} %",
        f"{100 * row['gain']:+.1f} points",
        f"{row['loss']:.3f}",
        f"{row['ece']:.3f}",
        f"{row['milliseconds']:.1f} ms",
        f"{row['cost']:.1f} x",
    ]


# --- classes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfusedPair:
    """How many images of one class were predicted as another."""

    label: str
    predicted: str
    count: int
    share: str


def list_confused(facts: Facts) -> list[ConfusedPair]:
    """Return the most frequently confused pairs, from ``metrics.json`` or else from the confusion matrix."""
    found = [
        ConfusedPair(str(row["label"]), str(row["predicted"]), int(count), percent(share))
        for row in facts.rows("most_confused")
        if {"label", "predicted"} <= set(row)
        and (count := finite(row.get("count"))) is not None
        and (share := finite(row.get("share"))) is not None
    ]
    if found:
        return found[:MOST_PAIRS]
    return [
        ConfusedPair(label, guess, count, percent(count / total))
        for label, guess, count, total in facts.confused[:MOST_PAIRS]
    ]


@dataclass(frozen=True)
class TableCell:
    """A cell of a sortable table: its text, and the number to sort by (empty: sorted last)."""

    text: str
    value: str


def list_classes(facts: Facts) -> list[tuple[str, list[TableCell]]]:
    """Return each class with one cell for each of ``class_columns``, the lowest F1 first, ``n/a`` last."""

    def key(row: CsvRow) -> float:
        number = finite_text(row.get("f1", ""))
        return math.inf if number is None else number

    columns = class_columns(facts)
    return [
        (row["label"], [_cell(row, column) for column in columns]) for row in sorted(facts.per_class, key=key)
    ]


def class_columns(facts: Facts) -> list[str]:
    """Return the numeric columns of ``per_class.csv`` that the table shows."""
    return [column for column in CLASS_METRICS if facts.per_class and column in facts.per_class[0]]


def _cell(row: CsvRow, column: str) -> TableCell:
    number = finite_text(row[column])
    if number is None:
        return TableCell("n/a", "")
    text = f"{number:,.0f}" if column in ("support", "predicted") else f"{number:.3f}"
    return TableCell(text, f"{number:.9g}")


# --- classes that are confused both ways ----------------------------------------------------------


def list_both_ways(facts: Facts) -> list[str]:
    """Return a sentence for every two classes that are often confused both ways, with their shares."""
    wrong = sum(count for _, _, count, _ in facts.confused)
    return [
        f"{two.first} and {two.second} are often confused both ways: {two.mistakes} of {wrong} mistakes are "
        f"between these two, {percent(two.mistakes / two.images)} of their {two.images} images."
        for two in facts.confused_two
        if min(two.there, two.back) >= 2 and two.mistakes / two.images >= OFTEN
    ][:MOST_BOTH_WAYS]
