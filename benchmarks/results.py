"""Every measurement is one line of JSON, written at once; a benchmark started again goes on after them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

OURS = "finetune"
SAME = ("processor", "cores", "memory_gb", "torch", "torchvision", "timm", "threads", "workers", "quick")
"""Facts in which all parts of one file of results must agree."""

Figures = dict[str, Any]
"""What one measurement found, by name; mostly numbers."""


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        case: name of the case.
        tool: what was measured: a tool, or a strategy.
        repeat: from 0; also the seed. Equal numbers ran one after the other and are compared with each other.
        figures: what was found.
        failed: the error of a measurement that failed, else empty.
    """

    case: str
    tool: str
    repeat: int
    figures: Figures
    failed: str = ""


class Spread(NamedTuple):
    """A median, the smallest and the largest value."""

    middle: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread | None:
    """Return the median and the ends; None without values."""
    numbers = list(values)
    return Spread(median(numbers), min(numbers), max(numbers)) if numbers else None


class DifferentMachineError(Exception):
    """The file holds results of another machine, or of other versions."""


class Results:
    """The lines of a file of results.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines: list[dict[str, Any]] = []
        self._results: dict[tuple[str, str, int], Result] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if "processor" in record:
                self.machines.append(record)
            else:
                self._keep(Result(**record))  # a later try replaces an earlier one

    def begin(self, machine: dict[str, Any]) -> None:
        """Record the machine on which the next results are measured.

        Raises:
            DifferentMachineError: earlier results are of another one.
        """
        for earlier in self.machines[-1:]:
            changed = [key for key in SAME if earlier.get(key) != machine.get(key)]
            if changed:
                words = ", ".join(f"{key} {earlier.get(key)} -> {machine.get(key)}" for key in changed)
                raise DifferentMachineError(f"{self.path}: {words}. Name other --results, or use --again.")
        self.machines.append(machine)
        self._append(machine)

    def add(self, result: Result) -> None:
        """Keep a result, in memory and in the file."""
        self._keep(result)
        self._append(asdict(result))

    def _keep(self, result: Result) -> None:
        self._results[result.case, result.tool, result.repeat] = result

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * bool(torn) + json.dumps(record) + "\n")

    def has(self, case: str, tool: str, repeat: int) -> bool:
        """Return whether this was measured and did not fail."""
        result = self._results.get((case, tool, repeat))
        return result is not None and not result.failed

    def of(self, case: str, tool: str) -> list[Result]:
        """Return the successful results, by repeat."""
        found = [result for key, result in sorted(self._results.items()) if key[:2] == (case, tool)]
        return [result for result in found if not result.failed]

    def of_cases(self, prefix: str) -> list[Result]:
        """Return all results, failed ones too, of the cases whose names begin so."""
        return [one for one in self._results.values() if one.case.startswith(prefix)]

    def measured(self, prefix: str) -> list[tuple[str, str]]:
        """Return case and tool of the successful results, in the order of their first measurement."""
        found = [one for one in self.of_cases(prefix) if not one.failed]
        return list(dict.fromkeys((one.case, one.tool) for one in found))

    def figure(self, case: str, tool: str, name: str) -> Spread | None:
        """Return a figure over all repeats."""
        return spread(result.figures[name] for result in self.of(case, tool) if name in result.figures)

    def pairs(self, case: str, tool: str, other: str, name: str) -> Iterator[tuple[float, float]]:
        """Yield a figure of two tools, of the same repeat."""
        theirs = {result.repeat: result.figures[name] for result in self.of(case, other)}
        for result in self.of(case, tool):
            if result.repeat in theirs:
                yield result.figures[name], theirs[result.repeat]

    def ratios(self, case: str, tool: str, base: str) -> Spread | None:
        """Return the wall seconds of a tool as multiples of another's, of the same repeat."""
        if not any("wall" in result.figures for result in self.of(case, tool)):
            return None
        return spread(one / other for one, other in self.pairs(case, tool, base, "wall"))
