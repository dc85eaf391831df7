"""How long it takes to start, and what a second run on the same images saves."""

from __future__ import annotations

import sys

from benchmarks.commands import build_run, find_finetune, read_run
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures
from benchmarks.timing import run_timed

STARTS = {
    "finetune --help": [find_finetune(), "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def plan(bench: Bench) -> list[Case]:
    """Return the case of starts, and that of a second run."""
    epochs = 2 if bench.quick else 50
    return [
        Case("startup-start", tuple(STARTS)),
        Case(f"startup-second-{epochs}", (OURS,), "squeezenet", "freeze", epochs=epochs),
    ]


def measure(turn: Turn) -> Figures:
    """Return the seconds of a process, after one that fills the caches."""
    if turn.tool in STARTS:
        run_timed(STARTS[turn.tool], turn.place)
        return run_timed(STARTS[turn.tool], turn.place)[0]
    run_timed([*build_run(turn, turn.place / "first"), "--lr", "0.02"], turn.place)
    output = turn.place / "out"
    timed, _ = run_timed(build_run(turn, output), turn.place, output / "history.csv")
    return timed | read_run(output)


QUESTION = Question(
    "startup",
    plan,
    measure,
    {"seconds": "wall", "training alone": "training", "to the end of the first epoch": "appeared"},
)
