"""The best model of so much wall-clock time: ``--budget`` against our defaults, random search and fastai.

Every tool gets the same images, seconds, cores and empty caches. ``finetune auto`` is what a user gets who
chooses nothing: ``--strategy auto`` on the default backbone. ``random`` draws backbone, input size and
strategy, makes one run after the other, and takes the one with the best validation accuracy. ``fastai``
fine-tunes the default backbone for as many epochs as fit, by the seconds of two epochs that are trained
before and not counted. A run of ``auto`` or fastai that is late counts as it ended, and its seconds are
shown; of random search only finished runs count.

Accuracy is that on test images, which choose nothing. The optimistic figure is the one that chose: left-out
training images for ``--budget``, validation images for the others. The regret is the distance to the best
tool on the same set, budget and seed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.accuracy import DATASETS, EVERY, make_folder
from benchmarks.commands import find_finetune
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures, Result, Results
from benchmarks.text import points, table
from benchmarks.time_to_accuracy import choose_size, find_state
from benchmarks.timing import ProcessFailedError, run_timed

SETS = tuple(name for name in DATASETS if not DATASETS[name].test)
"""Those of ``sets.zip``."""
BUDGETS = (90, 300)
"""Seconds."""
BUDGET, AUTO, RANDOM, FASTAI = f"{OURS} budget", f"{OURS} auto", "random", "fastai"
TOOLS = (BUDGET, AUTO, RANDOM, FASTAI)
BACKBONES = tuple(f"timm/tf_efficientnet_lite{number}" for number in range(3))
"""Those with ImageNet weights; the last is the default where all three are installed."""
IMG_SIZES = (96, 128, 160, 192, 224)
STRATEGIES = (
    ("--strategy", "freeze", "--set", "strategy.features=last"),
    ("--strategy", "freeze", "--set", "strategy.features=all"),
    ("--strategy", "top", "--set", "strategy.probe_first=true"),
    ("--strategy", "full", "--set", "strategy.probe_first=true"),
)
BATCH_SIZE = 32


def plan(bench: Bench) -> list[Case]:
    """Return a case for each set and budget."""
    network = BACKBONES[-1].removeprefix("timm/")
    pairs = [(name, budget) for name in SETS for budget in BUDGETS]
    return [
        Case(f"budget-{name}-{budget}", TOOLS, network, "", name, budget)
        for name, budget in ([("coffee5", BUDGETS[0])] if bench.quick else pairs)
    ]


def measure(turn: Turn) -> Figures:
    """Return seconds, accuracy on test images, and the accuracy that chose."""
    data = make_folder(turn.case.dataset, EVERY, turn.repeat, turn.bench)
    if turn.tool == FASTAI:
        return _fine_tune(turn, data)
    if turn.tool == RANDOM:
        return _search_randomly(turn, data)
    if turn.tool == BUDGET:
        timed, _ = _run(turn, data, "out", ["--budget", f"{turn.case.size}s"])
        facts = json.loads((turn.place / "out" / "budget.json").read_text("utf-8"))
        tried = facts["figures"]["chose"]["num_candidates"]
        return timed | {"optimistic": facts["figures"]["chose"]["accuracy"], "tried": tried}
    timed, validated = _run(turn, data, "out", ["--strategy", "auto"])
    return timed | {"optimistic": validated, "tried": 1}


def _run(
    turn: Turn, data: Path, name: str, words: list[str], limit: float = 4 * 3600.0
) -> tuple[Figures, float]:
    """Return seconds and test accuracy of a run of ours, and its validation accuracy."""
    own = [find_finetune(), "run", "--offline", "--device", "cpu", "--data", str(data)]
    own += ["--workers", str(turn.bench.workers), "--seed", str(turn.repeat)]
    own += ["--output", str(turn.place / name)]
    own += ["--img-size", "64"] if turn.bench.quick and "--img-size" not in words else []
    timed, _ = run_timed([*own, *words], turn.place, limit=limit)
    metrics = json.loads((turn.place / name / "metrics.json").read_text("utf-8"))
    assert metrics["split"] == "test"
    return timed | {"accuracy": metrics["accuracy"]}, metrics["val_accuracy"]


def _search_randomly(turn: Turn, data: Path) -> Figures:
    """Return the run with the best validation accuracy of those that finish in time; without one, 0."""
    rng, began = random.Random(turn.repeat), time.perf_counter()
    best: Figures = {"accuracy": 0.0, "optimistic": 0.0}
    tried, left = 0, float(turn.case.size)
    while left > 1:
        words = ["--backbone", rng.choice(BACKBONES), *rng.choice(STRATEGIES)]
        words += ["--img-size", str(rng.choice(IMG_SIZES[:1] if turn.bench.quick else IMG_SIZES))]
        try:
            found, validated = _run(turn, data, f"run-{tried}", words, left)
        except ProcessFailedError:
            if time.perf_counter() - began < turn.case.size:
                raise  # it was not the end of its time
            break
        tried += 1
        if validated > best["optimistic"]:
            best = {"accuracy": found["accuracy"], "optimistic": validated}
        left = turn.case.size - (time.perf_counter() - began)
    return best | {"wall": time.perf_counter() - began, "tried": tried}


def _fine_tune(turn: Turn, data: Path) -> Figures:
    """Return what fastai reaches with the epochs that fit; its test images are what it calls validation."""
    folder = turn.place / "data"
    folder.mkdir()
    for name, split in (("train", "train"), ("val", "test")):
        (folder / name).symlink_to(data / split)
    words = [str(turn.bench.peers_folder / "bin" / "python"), "-m", "benchmarks.peers.fastai_fine_tune"]
    words += [
        "--arch",
        f"timm/{turn.case.network}",
        "--weights",
        str(find_state(turn)),
        "--data",
        str(folder),
    ]
    words += [
        "--img-size",
        str(choose_size(turn)),
        "--batch-size",
        str(BATCH_SIZE),
        "--seed",
        str(turn.repeat),
    ]
    words += ["--threads", str(turn.bench.threads), "--workers", str(turn.bench.workers)]
    words += ["--output", str(turn.place / "out"), "--epochs"]
    timed, said = run_timed([*words, "2"], turn.place)
    (before, _), (end, _) = json.loads(said.strip().splitlines()[-1])["curve"][-2:]
    epoch = before - end
    epochs = max(2, int((turn.case.size - (timed["wall"] - 2 * epoch)) / epoch))
    timed, said = run_timed([*words, str(epochs)], turn.place)
    accuracy = json.loads(said.strip().splitlines()[-1])["last_accuracy"]
    return timed | {"accuracy": accuracy, "optimistic": None, "tried": 1, "epochs": epochs}


# --- the table -----------------------------------------------------------------------------------


def write(results: Results) -> Iterator[str]:
    """Yield a row for each set, budget and tool, and the mean of each tool over them."""
    head = ["set", "seconds given", "tool", "seconds", "tried"]
    head += ["accuracy, %", "accuracy that chose, %", "regret, points"]
    best: dict[tuple[str, int], float] = {}
    found: dict[tuple[str, str], list[Result]] = {}
    for case, tool in results.measured("budget-"):
        found[case, tool] = list(results.of(case, tool))
        for one in found[case, tool]:
            key = case, one.repeat
            best[key] = max(best.get(key, 0.0), one.figures["accuracy"])
    rows = []
    for (case, tool), some in found.items():
        name, seconds = case.removeprefix("budget-").split("-")
        rows.append([name, seconds, *_row(tool, some, best)])
    for tool in TOOLS:
        if every := [one for (_, own), some in found.items() for one in some if own == tool]:
            rows.append(["**all**", "", *_row(tool, every, best)])
    yield from table(head, rows)


def _row(tool: str, some: list[Result], best: dict[tuple[str, int], float]) -> list[str]:
    figures = [one.figures for one in some]
    chose = [one["optimistic"] for one in figures if one["optimistic"] is not None]
    return [
        f"**{tool}**" if tool == BUDGET else tool,
        f"{mean(one['wall'] for one in figures):.0f}",
        f"{mean(one['tried'] for one in figures):.0f}",
        points([one["accuracy"] for one in figures]),
        points(chose) if chose else "-",
        points([best[one.case, one.repeat] - one.figures["accuracy"] for one in some]),
    ]


QUESTION = Question("budget", plan, measure, write=write)
