"""The one harness: what a question is, and how its cases are measured in turns."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.results import OURS, Figures, Result, Results
from benchmarks.text import span, table


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Attributes:
        source: the folder with the original images and weights.
        cache: folder for what is made of them, and for what the runs leave.
        threads: for computing, of every tool.
        workers: decoding processes, of every tool.
        quick: the smallest sizes, to see that everything works.
        cuda: whether there is a GPU.
    """

    source: Path
    cache: Path
    threads: int = 1
    workers: int = 1
    quick: bool = False
    cuda: bool = False

    @property
    def peers_folder(self) -> Path:
        """The environment that has the other tools."""
        return self.cache / "env"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: unique; begins with the name of its question.
        tools: what is measured, in this order, again and again: tools, or strategies.
        network: a key of :data:`benchmarks.data.NETWORKS`, a backbone, or empty.
        strategy: what is trained, where that is not the tool.
        dataset: a key of :data:`benchmarks.accuracy.DATASETS`, or empty.
        size: images, images a class, pixels or images a batch: what the question varies.
        epochs: of training.
    """

    name: str
    tools: tuple[str, ...] = (OURS,)
    network: str = ""
    strategy: str = "freeze"
    dataset: str = ""
    size: int = 0
    epochs: int = 1


@dataclass(frozen=True)
class Turn:
    """One measurement that is to be made.

    Attributes:
        case: of this case.
        tool: of this tool.
        repeat: from 0; also the seed.
        place: an empty folder, which is removed afterwards.
        bench: where and how.
    """

    case: Case
    tool: str
    repeat: int
    place: Path
    bench: Bench


@dataclass(frozen=True)
class Question:
    """A benchmark.

    Attributes:
        name: that of its module; the names of its cases begin with it.
        plan: returns the cases.
        measure: makes one measurement, in a process of its own.
        columns: headings of its table, and the figures below them.
        base: the tool whose wall seconds those of the others are compared with.
        write: yields lines of its own instead of that table.
        draw: writes a plot.
    """

    name: str
    plan: Callable[[Bench], list[Case]]
    measure: Callable[[Turn], Figures]
    columns: Mapping[str, str] = field(default_factory=dict)
    base: str = OURS
    write: Callable[[Results], Iterable[str]] | None = None
    draw: Callable[[Results, Path], None] | None = None

    def lines(self, results: Results) -> Iterable[str]:
        """Return its tables: by default a row for each case and tool, with medians and ends."""
        if self.write:
            return self.write(results)
        rows = []
        for case, tool in results.measured(f"{self.name}-"):
            ratio = span(results.ratios(case, tool, self.base), "x")
            cells = [span(results.figure(case, tool, name)) for name in self.columns.values()]
            rows.append([case.removeprefix(f"{self.name}-"), tool, ratio, *cells])
        return table(("case", "tool", f"seconds of {self.base}", *self.columns), rows)


def plan_turns(case: Case, repeats: int, bench: Bench) -> list[Turn]:
    """Return the measurements, interleaved (A B A B): a slower hour of the machine meets all tools alike."""
    place = bench.cache / "work" / case.name
    return [Turn(case, tool, repeat, place, bench) for repeat in range(repeats) for tool in case.tools]


def run(question: Question, case: Case, bench: Bench, results: Results, repeats: int) -> None:
    """Measure what is not in the file yet; a measurement that fails is recorded, and the next one begins."""
    for turn in plan_turns(case, repeats, bench):
        if not results.has(case.name, turn.tool, turn.repeat):
            result = measure_apart(question, turn)
            results.add(result)
            said = result.failed and f"FAILED {result.failed}"
            sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {case.name} {turn.tool} {turn.repeat} {said}\n")


def measure_apart(question: Question, turn: Turn) -> Result:
    """Make one measurement in a new process, so that none inherits threads, memory or caches."""
    shutil.rmtree(turn.place, ignore_errors=True)
    turn.place.mkdir(parents=True)
    figures: Figures = {}
    failed = ""
    with ProcessPoolExecutor(1, get_context("spawn"), set_environment, (turn,)) as pool:
        try:
            figures = pool.submit(question.measure, turn).result()
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    shutil.rmtree(turn.place)
    return Result(turn.case.name, turn.tool, turn.repeat, figures, failed)


def set_environment(turn: Turn) -> None:
    """Set threads and empty caches for this process and all that it starts, before torch is imported."""
    threads = str(turn.bench.threads)
    os.environ |= {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(turn.place / "cache"),
        "FASTAI_HOME": str(turn.place / "fastai"),
        "PYTHONPATH": str(ROOT),
    }
