"""Features to a file: ``finetune extract`` beside torchvision's feature extractor."""

from __future__ import annotations

import json

from benchmarks.commands import build_job, build_peer, find_finetune
from benchmarks.data import find_network
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures
from benchmarks.timing import run_timed

CASE = Case("extract-squeezenet", (OURS, "torchvision"), "squeezenet")


def plan(_: Bench) -> list[Case]:
    """Return the one case."""
    return [CASE]


def measure(turn: Turn) -> Figures:
    """Return what a whole process cost."""
    network = find_network(turn.case.network, turn.bench)
    if turn.tool != OURS:
        timed, said = run_timed(build_peer(turn, network, turn.place / "out"), turn.place)
        facts: Figures = json.loads(said.strip().splitlines()[-1])
        return timed | facts
    words = [find_finetune(), "extract", "--offline", "--device", "cpu", "--layers", "last"]
    words += ["--backbone", f"torchvision/{network.arch}", *build_job(turn)]
    return run_timed([*words, "--output", str(turn.place / "features.csv")], turn.place)[0]


QUESTION = Question("extract", plan, measure, {"seconds": "wall", "peak MB": "peak_mb"})
