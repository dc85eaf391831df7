"""What is worth saying of a data set: one thing found, how often, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
"""A run refuses; a run goes on and says so; worth knowing."""


@dataclass(frozen=True)
class Remark:
    """One thing that was found.

    Attributes:
        code: a short name that stays, for programs (docs/check.md lists them).
        severity: what a run does about it.
        message: what was found, one sentence.
        fix: what to do about it, an imperative sentence.
        count: how many images, classes, groups or rows it concerns.
        paths: some of the images.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    count: int = 1
    paths: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "code": self.code,
            "severity": self.severity,
            "count": self.count,
            "message": self.message,
            "fix": self.fix,
            "paths": list(self.paths),
        }
