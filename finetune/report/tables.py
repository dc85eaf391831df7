"""Tables of the report: confidence thresholds, and the variants of an evaluation (views and ensembles)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.report.facts import Facts, finite
from finetune.report.sections import percent


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
