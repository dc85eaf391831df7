"""Every timed process is one line of JSON, written at once; a suite started again goes on after them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

OURS = "finetune"
SAME = ("processor", "cores", "memory_gb", "torch", "torchvision", "timm", "threads", "workers", "quick")
"""Facts in which all parts of one file of results must agree."""


@dataclass(frozen=True)
class Result:
    """What one process cost, and what it found.

    Attributes:
        case: name of the case.
        tool: name of the tool.
        repeat: from 0; equal numbers ran one after the other, and are compared with each other.
        wall: seconds of the whole process.
        cpu: processor seconds.
        peak_mb: sampled sum of PSS, 10^6 bytes.
        rss_mb: largest single process, 10^6 bytes.
        appeared: seconds until the watched file was there.
        facts: what the tool said of itself.
        failed: the last words of a process that failed; empty for others.
    """

    case: str
    tool: str
    repeat: int
    wall: float
    cpu: float = 0.0
    peak_mb: float = 0.0
    rss_mb: float = 0.0
    appeared: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is the result of."""
        return self.case, self.tool, self.repeat

    @property
    def accuracy(self) -> float | None:
        """On the validation part, best epoch."""
        return self.facts.get("accuracy")


class Spread(NamedTuple):
    """A median, and the ends."""

    middle: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread | None:
    """Return the median and the ends; None of nothing."""
    numbers = list(values)
    return Spread(median(numbers), min(numbers), max(numbers)) if numbers else None


class DifferentMachineError(Exception):
    """The file holds results of another machine, or of other versions."""


class Results:
    """The lines of a file of results.

    Args:
        path: the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines: list[dict[str, Any]] = []
        self._results: dict[tuple[str, str, int], Result] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        for line in self.path.read_text("utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if record.pop("kind") == "machine":
                self.machines.append(record)
            else:
                result = Result(**record)
                self._results[result.key] = result  # a later try replaces an earlier one

    def begin(self, machine: dict[str, Any]) -> None:
        """Note the machine on which the next results are taken.

        Raises:
            DifferentMachineError: earlier ones are of another.
        """
        for earlier in self.machines[-1:]:
            changed = [key for key in SAME if earlier.get(key) != machine.get(key)]
            if changed:
                words = ", ".join(f"{key} {earlier.get(key)} -> {machine.get(key)}" for key in changed)
                raise DifferentMachineError(f"{self.path}: {words}. Name other --results, or start --again.")
        self.machines.append(machine)
        self._append({"kind": "machine", **machine})

    def add(self, result: Result) -> None:
        """Keep a result, on disk too."""
        self._results[result.key] = result
        self._append({"kind": "result", **asdict(result)})

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * bool(torn) + json.dumps(record) + "\n")

    def has(self, case: str, tool: str, repeat: int) -> bool:
        """Return whether this process has been timed, and did not fail."""
        result = self._results.get((case, tool, repeat))
        return result is not None and not result.failed

    def of(self, case: str, tool: str) -> list[Result]:
        """Return what succeeded, by repeat."""
        return [
            result
            for key, result in sorted(self._results.items())
            if key[:2] == (case, tool) and not result.failed
        ]

    def failed(self) -> list[Result]:
        """Return the processes that failed and were not successful in a later try."""
        return [result for result in self._results.values() if result.failed]

    def cases(self) -> dict[str, list[str]]:
        """Return the tools of each case, in the order in which they were first timed."""
        tools: defaultdict[str, list[str]] = defaultdict(list)
        for case, tool, _ in self._results:
            if tool not in tools[case]:
                tools[case].append(tool)
        return dict(tools)

    def walls(self, case: str, tool: str) -> Spread | None:
        """Return the wall seconds."""
        return spread(result.wall for result in self.of(case, tool))

    def facts(self, case: str, tool: str, *names: str) -> Spread | None:
        """Return a figure that the tool gave of itself, by its path of names."""
        return spread(
            value for result in self.of(case, tool) if (value := dig(result.facts, names)) is not None
        )

    def ratios(self, case: str, tool: str, to: str = OURS) -> Spread | None:
        """Return the wall seconds of a tool as multiples of another's, of the same repeat."""
        other = {result.repeat: result.wall for result in self.of(case, to)}
        return spread(
            result.wall / other[result.repeat] for result in self.of(case, tool) if result.repeat in other
        )


def dig(facts: Any, names: Iterable[str]) -> float | None:
    """Return a number from nested dictionaries; None where it is not there."""
    for name in names:
        if not isinstance(facts, dict) or name not in facts:
            return None
        facts = facts[name]
    return facts if isinstance(facts, int | float) else None
