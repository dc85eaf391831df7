"""What several views of a picture, and several models, added to an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.report.facts import Facts


def list_variants(facts: Facts) -> list[list[str]]:
    """Return model, views, accuracy, gain, loss, ECE, time and cost of each way of looking, as text.

    Nothing where there was only one, or where a row is not what an evaluation writes.
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
