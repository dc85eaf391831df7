"""Several labels an image, beside fastai: mean average precision, seconds and memory of whole processes.

No set at hand has several labels, so one is made: two groceries of different classes side by side, training
pairs of training images and validation pairs of validation images.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.commands import find_finetune
from benchmarks.data import find_sets, make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures
from benchmarks.time_to_accuracy import BATCH_SIZE, choose_size, find_state
from benchmarks.timing import run_timed

BACKBONE = "tf_efficientnet_lite0"
WAYS: dict[str, list[str]] = {
    f"{OURS} solved": ["--strategy", "freeze", "--set", "strategy.features=all"],
    f"{OURS} top": ["--strategy", "top"],
    f"{OURS} full": ["--strategy", "full"],
}
PEER = "fastai"
NUM_PAIRS = {"train": 800, "val": 400}
SIDE = 224


def plan(bench: Bench) -> list[Case]:
    """Return the one case."""
    return [Case("several_labels-groceries", (*WAYS, PEER), BACKBONE, epochs=2 if bench.quick else 5)]


def measure(turn: Turn) -> Figures:
    """Return what a whole process cost, and its mean average precision on the validation pairs."""
    data, output = find_pairs(turn.bench), turn.place / "out"
    words = ["--data", str(data), "--img-size", str(choose_size(turn)), "--epochs", str(turn.case.epochs)]
    words += ["--batch-size", str(BATCH_SIZE), "--seed", str(turn.repeat), "--output", str(output)]
    words += ["--workers", str(turn.bench.workers)]
    if turn.tool == PEER:
        python = str(turn.bench.peers_folder / "bin" / "python")
        words += ["--arch", f"timm/{BACKBONE}", "--weights", str(find_state(turn))]
        words = [python, "-m", "benchmarks.peers.fastai_labels", *words, "--threads", str(turn.bench.threads)]
        timed, said = run_timed(words, turn.place)
        facts: Figures = json.loads(said.strip().splitlines()[-1])
        return timed | {"map": facts["last_accuracy"]}
    words = [find_finetune(), "run", "--offline", "--device", "cpu", *WAYS[turn.tool], *words]
    timed, _ = run_timed([*words, "--backbone", f"timm/{BACKBONE}", "--resize", "squash"], turn.place)
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text("utf-8"))
    return timed | {"map": metrics["map"], "half_width": np.ptp(metrics["intervals"]["map"]) / 2}


def find_pairs(bench: Bench) -> Path:
    """Return the table of the pairs, ``labels.csv``, which is made once."""
    target = bench.cache / f"pairs{'-quick' * bench.quick}"
    return make_once(target, lambda to: _write_pairs(bench, to)) / "labels.csv"


def _write_pairs(bench: Bench, target: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for split, number in NUM_PAIRS.items():
        files = sorted((find_sets(bench) / "grocery22" / split).glob("*/*.jpg"))
        for index in range(number // 8 if bench.quick else number):
            one, two = (files[place] for place in rng.choice(len(files), 2, replace=False))
            labels = sorted({one.parent.name, two.parent.name})
            path = Path("images", f"{split}-{index:04}.jpg")
            _paste(one, two, target / path)
            rows.append((str(path), "|".join(labels), split))
    with (target / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "split"), *rows])


def _paste(one: Path, two: Path, target: Path) -> None:
    """Write two images side by side."""
    both = Image.new("RGB", (2 * SIDE, SIDE))
    for place, path in enumerate((one, two)):
        with Image.open(path) as image:
            both.paste(image.convert("RGB").resize((SIDE, SIDE)), (place * SIDE, 0))
    target.parent.mkdir(parents=True, exist_ok=True)
    both.save(target, quality=90)


COLUMNS = {
    "seconds": "wall",
    "mean average precision": "map",
    "half of its interval": "half_width",
    "peak MB": "peak_mb",
}
QUESTION = Question("several_labels", plan, measure, COLUMNS, base=f"{OURS} solved")
