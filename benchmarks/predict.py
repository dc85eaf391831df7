"""What ``finetune predict`` makes of a network's own speed, and whether its memory grows with the files.

Links to a few hundred images stand for so many files: each of them is opened, decoded and resized anew. The
network alone (views in memory) and decoding alone (in as many threads) are measured beside the command. Where
both need the same cores, nothing is faster than 1 / (1 / network + 1 / decoding) images a second, with each
measured on all cores. Processor time says the same on a machine that others use as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.commands import find_finetune
from benchmarks.data import NETWORKS, find_folder, list_images, make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures
from benchmarks.timing import run_timed
from finetune.data.transforms import build_eval_transform
from finetune.evaluation.predictor import Predictor, load
from finetune.pipeline.run import run
from finetune.recipe import load_recipe
from finetune.system.display import SilentDisplay

BACKBONE = "timm/mobilenetv3_small_100"
COLUMNS = {
    "images/s": "images_per_second",
    "network alone": "network_per_second",
    "decoding alone": "decoding_per_second",
    "limit of both": "limit_per_second",
    "processor ms an image": "processor_ms",
    "network and decoding alone, ms": "alone_ms",
    "peak MB": "rss_mb",
}
Pace = tuple[float, float]
"""Images a second, and milliseconds of processor time an image."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each number of files."""
    return [Case(f"predict-{size}", size=size) for size in ((40,) if bench.quick else (2_000, 10_000))]


def measure(turn: Turn) -> Figures:
    """Return the pace of the command, and of its two parts alone."""
    bench = turn.bench
    torch.set_num_threads(bench.threads)
    data = find_folder(NETWORKS["squeezenet"], bench)
    model = make_once(
        bench.cache / f"predict-model{'-quick' * bench.quick}", lambda to: train_model(data, to)
    )
    images = list_images(data)
    predictor = load(model).with_runtime_for(turn.case.size, SilentDisplay())
    network, decoding = measure_parts(predictor, images, bench.workers, 0.1 if bench.quick else 20.0)
    start, _ = run_command(turn, model, images[:1], 1)  # what imports and loading take
    used, speed = run_command(turn, model, images, turn.case.size)
    return {
        "images_per_second": speed,
        "network_per_second": network[0],
        "decoding_per_second": decoding[0],
        "limit_per_second": 1 / (1 / network[0] + 1 / decoding[0]),
        "processor_ms": 1000 * (used["cpu"] - start["cpu"]) / turn.case.size,
        "alone_ms": network[1] + decoding[1],
        "rss_mb": used["rss_mb"],
    }


def train_model(data: Path, target: Path) -> None:
    """Leave a finished run with random weights: they change no time."""
    keys = {"backbone.name": BACKBONE, "strategy.name": "scratch", "data.path": str(data), "data.workers": 1}
    run(load_recipe(None, keys | {"training.epochs": 1}), target)


def measure_parts(predictor: Predictor, images: list[Path], workers: int, seconds: float) -> list[Pace]:
    """Return the pace of the network alone, and that of decoding and resizing alone."""
    view = build_eval_transform(predictor.card.preprocessing)
    views = [view(view.open(path))[None] for path in images[: predictor.batch_size]]
    with ThreadPoolExecutor(workers) as pool:
        works: list[Callable[[], int]] = [
            lambda: len(predictor.compute(views)),
            lambda: sum(1 for _ in pool.map(lambda path: view(view.open(path)), images)),
        ]
        return [measure_pace(work, seconds) for work in works]


def measure_pace(work: Callable[[], int], seconds: float) -> Pace:
    """Repeat work that returns its number of images, for so many seconds, after once for nothing."""
    work()
    began, used, number = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        number += work()
    return number / (time.perf_counter() - began), 1000 * (time.process_time() - used) / number


def run_command(turn: Turn, model: Path, images: list[Path], number: int) -> tuple[Figures, float]:
    """Predict links to so many images; return what the process cost, and images a second of its loop."""
    files = turn.place / f"files-{number}"
    for place, image in enumerate(islice(cycle(images), number)):
        below = files / f"{place // 1000:04}"
        below.mkdir(exist_ok=True, parents=True)
        (below / f"{place:06}{image.suffix}").symlink_to(image)
    words = [find_finetune(), "predict", str(model), str(files), "--follow-links", "--json"]
    words += ["--output", str(turn.place / f"{number}.csv"), "--workers", str(turn.bench.workers)]
    timed, said = run_timed(words, turn.place)
    return timed, json.loads(said)["images_per_second"]


QUESTION = Question("predict", plan, measure, COLUMNS)
