"""How often does ``finetune audit`` find a shortcut that is there, and how often one that is not?

The labels of real images are permuted over groups of look-alikes, so that nothing tells them, and one mark is
planted: a coloured stamp on the edge, the JPEG quality, or the order of the file names. A share of the images
has the mark of its class, and the others that of any class. All tests are made each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.accuracy import describe_backbone, make_folder
from benchmarks.data import make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures, Results
from benchmarks.text import table
from finetune.data.prepare import draw_evenly, read_images
from finetune.evaluation.intervals import compute_wilson
from finetune.features.extraction import Source, open_images, open_source
from finetune.features.look_alikes import find_groups
from finetune.features.network import open_network
from finetune.features.rows import MemoryRows
from finetune.recipe import load_recipe
from finetune.shortcuts.audit import build_predictors, extract_regions
from finetune.shortcuts.file_facts import FileFacts, read_file_facts
from finetune.shortcuts.find import find_shortcuts
from finetune.shortcuts.permutation import Floats, Ints, LabelPermuter
from finetune.system.display import SilentDisplay

SETS = ("clothing10", "coffee5", "grocery22")
IMAGES = 200
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.8)
"""Shares of images with the mark of their class."""
PLANTED = {"stamp": "border", "quality": "quality", "order": "order"}
"""What is planted, and the test that should find it."""
DRAWS, NULL_DRAWS = 5, 60
COLOURS = ("#d02020", "#20a020", "#2040d0", "#d0c020")
QUALITIES = (70, 78, 86, 94)
"""Of the marks; a class has one of four."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each set."""
    names = ("wbc4",) if bench.quick else SETS
    return [Case(f"shortcuts-{name}", network="lite0", dataset=name) for name in names]


class Marked:
    """The images of a set with each mark, and what the audit knows of them.

    Attributes:
        labels: the true labels (N,).
        groups: the groups of look-alikes (N,).
    """

    def __init__(self, turn: Turn) -> None:
        folder = make_folder(turn.case.dataset, 0, turn.repeat, turn.bench)
        self._turn, display = turn, SilentDisplay()
        recipe = load_recipe(None, {"input.crop_pct": 1.0, **describe_backbone(turn.case, turn.bench)})
        self._network = open_network(recipe, display)
        stamped = [self._open(folder, colour, 90) for colour in COLOURS]
        saved = [self._open(folder, None, quality) for quality in QUALITIES]
        self._source = stamped[0]
        samples = stamped[0].dataset.samples
        self.labels = np.array([sample.label for sample in samples])
        every = [extract_regions(source) for source in (*stamped, saved[-1])]
        self._regions = [{**regions, "last": last} for regions, last, _ in every]
        self._facts = [read_file_facts(source.dataset, display) for source in saved]
        self.groups = self.find_groups(self._regions[-1]["last"], self.labels)

    def _open(self, folder: Path, colour: str | None, quality: int) -> Source:
        mark = f"{colour or 'plain'}-{quality}".removeprefix("#")
        target = folder.parent / "marked" / f"{folder.name}-{mark}"
        data = make_once(target, lambda to: _save_marked(folder / "train", to, colour, quality))
        keys = {"data.path": str(data), "data.workers": 0, "runtime": "torch", "seed": self._turn.repeat}
        recipe = load_recipe(None, keys)
        display = SilentDisplay()
        dataset = replace(open_images(recipe, display), val_was_drawn=False)
        train = replace(dataset, samples=tuple(replace(one, split="train") for one in dataset.samples))
        few = draw_evenly(read_images(recipe, train, display), 80 if self._turn.bench.quick else IMAGES, 0)
        few = replace(few, samples=tuple(sorted(few.samples, key=lambda one: one.path)))
        return open_source(recipe, self._network, few, display)

    def find_groups(self, last: Tensor, labels: Ints) -> Ints:
        """Return the groups of look-alikes (N,) under other labels, as the audit finds them."""
        every = torch.arange(len(labels))
        return find_groups(MemoryRows(last), every, torch.from_numpy(labels)).numpy()

    def find_alarms(self, planted: str, strength: float, rng: np.random.Generator) -> list[str]:
        """Return the names of the tests that give an alarm on permuted labels with one mark."""
        labels = LabelPermuter(self.labels, self.groups).draw(1, rng)[0]
        marks = np.where(
            rng.random(len(labels)) < strength, labels, rng.integers(labels.max() + 1, size=len(labels))
        )
        regions, values = self._plant(planted, marks, rng)
        groups = self.find_groups(regions["last"], labels)
        facts = FileFacts(values, {})
        predictors, _ = build_predictors(self._source, regions, facts, torch.from_numpy(groups))
        whole = float(predictors.pop("whole")(labels[None]).mean())
        found = find_shortcuts(predictors, labels, groups, whole, int(rng.integers(2**31)))
        return [one.name for one in found if one.is_alarm]

    def _plant(
        self, planted: str, marks: Ints, rng: np.random.Generator
    ) -> tuple[dict[Any, Tensor], dict[str, Floats]]:
        """Return the features and the facts of images of which one thing has a mark."""
        own, every = marks % len(COLOURS), np.arange(len(marks))
        regions, values = self._regions[-1], dict(self._facts[-1].values)
        order = rng.permutation(len(marks)).astype(float)
        if planted == "stamp":
            regions = {name: _choose([one[name] for one in self._regions[:-1]], own) for name in regions}
        elif planted == "quality":
            values["quality"] = np.stack([one.values["quality"] for one in self._facts])[own, every]
        elif planted == "order":
            order = marks + rng.random(len(marks))
        return regions, values | {"order": order[:, None]}


def _choose(rows: Sequence[Tensor], marks: Ints) -> Tensor:
    return torch.stack([*rows])[torch.from_numpy(marks), torch.arange(len(marks))]


def _save_marked(source: Path, target: Path, colour: str | None, quality: int) -> None:
    for path in sorted(source.glob("*/*")):
        goal = target / path.parent.name / f"{path.stem}.jpg"
        goal.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if colour is not None:  # in the middle of the upper edge, where no crop removes it
            side = min(image.size) // 10
            left = (image.width - side) // 2
            ImageDraw.Draw(image).rectangle((left, 0, left + side, side), fill=colour)
        image.save(goal, quality=quality)


def measure(turn: Turn) -> Figures:
    """Return the alarms of each draw, by what was planted and how strongly."""
    marked = Marked(turn)
    draws, nulls = (1, 2) if turn.bench.quick else (DRAWS, NULL_DRAWS)
    wanted = [("none", 0.0, nulls), *((what, share, draws) for what in PLANTED for share in STRENGTHS)]
    rng = np.random.default_rng(turn.repeat)
    found: dict[str, list[list[str]]] = {}
    for what, share, number in wanted:
        found[f"{what} {share}"] = [marked.find_alarms(what, share, rng) for _ in range(number)]
    return {"num_images": len(marked.labels), "alarms": found}


def write(results: Results) -> Iterator[str]:
    """Yield the power by strength, and the false alarms."""
    found = {
        case.removeprefix("shortcuts-"): [one.figures["alarms"] for one in results.of(case, OURS)]
        for case, _ in results.measured("shortcuts-")
    }
    yield "Planted shortcuts that were found, in percent of the draws:\n"
    head = ["set", "planted", *(f"{100 * share:.0f} % of images" for share in STRENGTHS)]
    rows = [
        [name, what, *(_power(figures, what, share) for share in STRENGTHS)]
        for name, figures in found.items()
        for what in PLANTED
    ]
    yield from table(head, rows)
    yield "\nAudits with a false alarm, in percent (95 % interval):\n"
    yield from table(("set", "nothing planted", "other tests, with one planted"), _false_alarms(found))


def _gather(figures: Sequence[Figures], wanted: Callable[[str], bool]) -> list[tuple[str, list[str]]]:
    """Return what was planted, and the alarms, of each draw."""
    return [
        (key.split()[0], alarms)
        for one in figures
        for key, draws in one.items()
        if wanted(key)
        for alarms in draws
    ]


def _power(figures: Sequence[Figures], what: str, share: float) -> str:
    drawn = _gather(figures, lambda key: key == f"{what} {share}")
    return f"{100 * mean(PLANTED[what] in alarms for _, alarms in drawn):.0f}" if drawn else "-"


def _false_alarms(found: Mapping[str, Sequence[Figures]]) -> Iterator[list[str]]:
    every = [one for figures in found.values() for one in figures]
    for name, figures in [*found.items(), ("all", every)]:
        null = [bool(alarms) for _, alarms in _gather(figures, lambda key: key.startswith("none"))]
        others = [
            bool(set(alarms) - _SEEN[what])
            for what, alarms in _gather(figures, lambda key: not key.startswith("none"))
        ]
        yield [name, _say_share(null), _say_share(others)]


_SEEN = {"stamp": {"border", "surroundings"}, "quality": {"quality"}, "order": {"order"}}
"""The tests that see a mark: the edge is also a part of the image without its middle."""


def _say_share(drawn: Sequence[bool]) -> str:
    if not drawn:
        return "-"
    low, high = compute_wilson(sum(drawn), len(drawn))
    return f"{100 * mean(drawn):.1f} ({100 * low:.1f} to {100 * high:.1f}) of {len(drawn):,}"


QUESTION = Question("shortcuts", plan, measure, write=write)
