"""What a further image costs, among a thousand and among a hundred thousand."""

from __future__ import annotations

from benchmarks.commands import find_finetune
from benchmarks.data import find_blobs, find_small_network
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures
from benchmarks.timing import run_timed

SIZES = (1_000, 10_000, 100_000)


def plan(bench: Bench) -> list[Case]:
    """Return a case for each number of images."""
    return [Case(f"scaling-{size}", size=size) for size in ((200,) if bench.quick else SIZES)]


def measure(turn: Turn) -> Figures:
    """Return what one epoch of ``freeze`` cost."""
    words = [find_finetune(), "run", "--offline", "--device", "cpu", "--strategy", "freeze", "--epochs", "1"]
    words += ["--data", str(find_blobs(turn.case.size, turn.bench)), "--batch-size", "64"]
    words += ["--backbone", str(find_small_network(turn.bench)), "--img-size", "32"]
    words += ["--workers", str(turn.bench.workers), "--output", str(turn.place / "out")]
    figures, _ = run_timed(words, turn.place)
    return figures | {"ms_per_image": 1000 * figures["wall"] / turn.case.size}


QUESTION = Question(
    "scaling",
    plan,
    measure,
    {"seconds": "wall", "ms an image": "ms_per_image", "peak MB": "peak_mb", "largest process, MB": "rss_mb"},
)
