"""What it does to accuracy, and to decoding time, that training views come from reduced images.

Training takes a large image at a half, a quarter or an eighth of its size, which a JPEG's decoder gives for
less than the whole. Each seed trains twice, with that and from every pixel, and nothing else differs between
the two; evaluation sees every pixel both times. The sizes are small, so that photographs of 500 x 375 pixels
are reduced as those of a phone are for 224 pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from benchmarks.data import NETWORKS, find_recipe, list_images
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures, Results
from benchmarks.text import points, table
from finetune.data import transforms
from finetune.data.decode import decode_image
from finetune.pipeline.run import run
from finetune.recipe import load_recipe
from pretrained.preprocessing import Preprocessing

WHOLE, REDUCED, TIME = "whole", "reduced", "time"


def plan(bench: Bench) -> list[Case]:
    """Return a case for each image size."""
    epochs, sizes = (1, (64,)) if bench.quick else (8, (64, 96))
    return [Case(f"draft-{size}", (WHOLE, REDUCED, TIME), size=size, epochs=epochs) for size in sizes]


def measure(turn: Turn) -> Figures:
    """Return the metrics of one run, or what decoding takes."""
    recipe = find_recipe(replace(NETWORKS["squeezenet"], img_size=turn.case.size), turn.bench)
    if turn.tool == TIME:
        return measure_time(list_images(Path(str(recipe["data.path"]))), turn.case.size)
    recipe |= {"strategy.name": "freeze", "training.epochs": turn.case.epochs, "seed": turn.repeat}
    recipe |= {"cache.trunk": False, "cache.pictures": False}
    every_pixel = mock.patch.object(transforms, "_compute_short_side", return_value=None)
    with every_pixel if turn.tool == WHOLE else nullcontext():
        metrics = run(load_recipe(None, recipe), turn.place / "run").metrics
    return {name: metrics[name] for name in ("accuracy", "loss")}


def measure_time(files: Sequence[Path], img_size: int) -> Figures:
    """Return the share of training images that are reduced, and what decoding and whole views then take.

    Both as shares of the processor time that every pixel takes; the best of three passes over all images.
    """
    view = transforms.build_train_transform(Preprocessing(img_size=img_size), "light")
    passes: tuple[Callable[[Path], Any], ...] = (
        view.open,
        decode_image,
        lambda file: view(view.open(file)),
        lambda file: view(decode_image(file)),
    )
    decoding, decoding_whole, views, views_whole = (
        min(time_pass(work, files) for _ in range(3)) for work in passes
    )
    reduced = mean(view.open(file).size != decode_image(file).size for file in files)
    return {"reduced": reduced, "decoding": decoding / decoding_whole, "view": views / views_whole}


def time_pass(work: Callable[[Path], Any], files: Sequence[Path]) -> float:
    """Return the seconds of processor time for all files."""
    began = time.process_time()
    for file in files:
        work(file)
    return time.process_time() - began


def write(results: Results) -> Iterable[str]:
    """Return a row a size: means and deviations over seeds, and those of the paired differences."""
    rows = []
    for case in dict.fromkeys(case for case, tool in results.measured("draft-") if tool == REDUCED):
        pairs = [list(results.pairs(case, REDUCED, WHOLE, name)) for name in ("accuracy", "loss")]
        cells = [points([whole for _, whole in some]) for some in pairs]
        cells += [points([reduced - whole for reduced, whole in some], "+") for some in pairs]
        timed = [results.figure(case, TIME, name) for name in ("reduced", "decoding", "view")]
        rows.append([case, *cells, *(f"{value.middle:.2f}" if value else "-" for value in timed)])
    head = ("size", "accuracy, %", "loss x 100", "difference of accuracy", "of loss", "reduced")
    return table((*head, "decoding", "view"), rows)


QUESTION = Question("draft", plan, measure, write=write)
