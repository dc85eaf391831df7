"""How often the interval of ``finetune forecast`` holds the truth, and how wide it is.

Three quarters of a set are hidden, a forecast is made from the rest, and the truth is looked up: trained on
twice the images, and on all of them, which are four times as many, and tested on hidden images. Look-alikes
are kept on one side of the hiding, since a hidden image must be new. Classes with fewer than 32 images are
left out, since a quarter of them is too few for a forecast. Of the characters, 20 images each, a half is
hidden and 40 are drawn, so that only twice the images are looked at.

Features are computed once and kept; a draw then takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import BACKBONES, DATASETS, describe_backbone
from benchmarks.data import find_sets
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures, Results
from benchmarks.text import table
from finetune.features.extraction import open_features, open_images, open_source
from finetune.features.folds import draw_folds
from finetune.features.forecast.extrapolation import MOST_TIMES, find_interval, fit_curves
from finetune.features.forecast.learning_curve import (
    FEWEST_A_CLASS,
    draw_subset,
    find_others,
    measure_curve,
)
from finetune.features.forecast.requirement import find_requirement
from finetune.features.look_alikes import find_groups_of_small_classes
from finetune.features.network import open_network
from finetune.features.ridge import leave_groups_out, predict_others
from finetune.features.rows import MemoryRows
from finetune.features.solvers import fit
from finetune.recipe import load_recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.system.display import SilentDisplay
from finetune.targets import LINEAR_CLASSIFIER, decide

HIDE_HALF = {"omniglot136": 40}
"""Sets of which a half is hidden, and how many of their classes are drawn."""
CHOSEN_ON = ("wbc4", "coffee5", "grocery22")
"""Sets on which the width of the intervals was chosen; the others judge it."""
DRAWS, FIRST_SEED = 9, 2_000
"""Draws in each turn, and the first seed: other draws than those that were looked at meanwhile."""
MORE, NUM_FOLDS = 5, 10
"""Draws of further images over which the truth of twice the images is averaged (of the softmax, one), and the
folds of the softmax on all images."""
CPU = torch.device("cpu")

Pool = tuple[Tensor, Tensor, Tensor]
"""Features (N, D), labels (N,) and groups (N,)."""
Found = dict[str, Any]
"""One forecast: set, multiple, accuracy, ends of its interval, truth, and that of the softmax."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each backbone and data set."""
    return [
        Case(f"forecast-{network}-{name}", network=network, dataset=name)
        for network in (["lite0"] if bench.quick else BACKBONES)
        for name in (["digits"] if bench.quick else DATASETS)
    ]


def measure(turn: Turn) -> Figures:
    """Return the forecasts of some draws, each beside the truth."""
    rows, labels, groups = _read_pool(turn)
    found: list[Found] = []
    pool: Pool | None = None
    for number in range(1 if turn.bench.quick else DRAWS):
        seed = FIRST_SEED + DRAWS * turn.repeat + number
        if pool is None or turn.case.dataset in HIDE_HALF:
            pool = _take_classes((rows, labels, groups), turn.case.dataset, seed)
            hits = _leave_each_out(pool)
        found += _draw(pool, hits, turn.case, seed)
    return {"forecasts": found}


def _read_pool(turn: Turn) -> Pool:
    """Return features and groups of all images of a set; features stay in the benchmark's cache."""
    name = turn.case.dataset
    data = "sample:digits" if DATASETS[name].test else str(find_sets(turn.bench) / name)
    keys = {"data.path": data, "data.workers": 0, "input.augmentation": "none"}
    recipe = load_recipe(None, keys | describe_backbone(turn.case, turn.bench))
    display = SilentDisplay()
    network = open_network(recipe, display)
    source = open_source(recipe, network, open_images(recipe, display), display)
    kept = FeatureCacheDir(folder=turn.bench.cache / "features")
    with open_features(source, network.layers.all[-1:], "auto", cache_dir=kept) as features:
        usable = features.usable(source.dataset.samples)
        labels = torch.tensor([source.dataset.samples[index].label for index in usable.tolist()])
        rows = features.rows[0][usable]
    return rows, labels, _find_groups(rows, labels)


def _find_groups(rows: Tensor, labels: Tensor) -> Tensor:
    return find_groups_of_small_classes(MemoryRows(rows), torch.arange(len(labels)), labels)


def _take_classes(pool: Pool, name: str, seed: int) -> Pool:
    """Return the images of the classes of a draw, with labels from 0."""
    rows, labels, groups = pool
    counts = labels.bincount()
    if name in HIDE_HALF:
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randperm(len(counts), generator=generator)[: HIDE_HALF[name]].sort().values
    else:
        classes = (counts >= MOST_TIMES * FEWEST_A_CLASS).nonzero().flatten()
    chosen = torch.isin(labels, classes)
    return rows[chosen], torch.searchsorted(classes, labels[chosen]), groups[chosen]


def _draw(pool: Pool, hits: Sequence[Tensor], case: Case, seed: int) -> list[Found]:
    """Return what a forecast from a part says, beside what the rest says.

    Args:
        pool: all images of the draw.
        hits: see :func:`_leave_each_out`.
        case: names the set.
        seed: of the draw.
    """
    rows, labels, groups = pool
    num_classes = int(labels.max()) + 1
    times = 2 if case.dataset in HIDE_HALF else MOST_TIMES
    seen = draw_subset(labels, groups, 1 / times, seed)
    own = MemoryRows(rows[seen])
    own_groups = _find_groups(rows[seen], labels[seen])
    curves = fit_curves(measure_curve(own, labels[seen], own_groups, num_classes, seed, CPU), seed)
    hidden = find_others(groups, seen)
    ridge, softmax = (one[hidden].double().mean().item() for one in hits)
    truths: list[Truth] = [(len(labels), ridge, softmax, len(hidden))]
    if times > 2:
        truths.insert(0, _train_on_twice(pool, seen, seed))
    found = []
    for multiple, (images, truth, softmax, tested) in zip((2, times), truths, strict=False):
        middle, low, high = find_interval(curves.accuracies(images))
        answer = find_requirement(curves, truth)
        found.append(
            {
                "set": case.dataset,
                "times": multiple,
                "seen": len(seen),
                "images": images,
                "tested": tested,
                "forecast": middle,
                "low": low,
                "high": high,
                "truth": truth,
                "softmax": softmax,
                "answer": answer.answer,
                "needed": [answer.low, answer.images, answer.high],
            }
        )
    return found


Truth = tuple[float, float, float, float]
"""Training images, accuracy of ridge regression and of the softmax on hidden images, and their number."""


def _train_on_twice(pool: Pool, seen: Tensor, seed: int) -> Truth:
    """Return the truth of twice the images: with some of the hidden ones, tested on the others."""
    rows, labels, groups = pool
    hidden, whole, num_classes = find_others(groups, seen), MemoryRows(rows), int(labels.max()) + 1
    found, solved = [], 0.0
    for number in range(MORE):
        share = len(seen) / len(hidden)
        more = hidden[draw_subset(labels[hidden], groups[hidden], share, MORE * seed + number)]
        train = torch.cat([seen, more])
        test = find_others(groups, train)
        given = whole, train, labels[train]
        predicted = predict_others(*given, test, num_classes, groups=groups[train])
        found.append((len(train), (predicted == labels[test]).double().mean().item(), len(test)))
        if number == 0:
            softmax = fit(*given, num_classes, LINEAR_CLASSIFIER, seed, groups=groups[train])
            solved = (decide(softmax.scores(rows[test])) == labels[test]).double().mean().item()
    images, ridge, tested = (mean(column) for column in zip(*found, strict=True))
    return images, ridge, solved, tested


def _leave_each_out(pool: Pool) -> tuple[Tensor, Tensor]:
    """Return whether ridge regression and the softmax on the other images are right of each image, (N,) bool.

    The softmax is solved without one tenth at a time.
    """
    rows, labels, groups = pool
    whole, num_classes = MemoryRows(rows), int(labels.max()) + 1
    hits = leave_groups_out(whole, torch.arange(len(labels)), labels, num_classes, CPU, groups)
    folds, right = draw_folds(labels, NUM_FOLDS, 0, groups), torch.zeros(len(labels), dtype=torch.bool)
    for fold in range(NUM_FOLDS):
        train, test = (folds != fold).nonzero().flatten(), (folds == fold).nonzero().flatten()
        softmax = fit(whole, train, labels[train], num_classes, LINEAR_CLASSIFIER, 0, groups=groups[train])
        right[test] = decide(softmax.scores(rows[test])) == labels[test]
    return hits, right


# --- the table -----------------------------------------------------------------------------------


def write(results: Results) -> Iterator[str]:
    """Yield coverage and width: of each set, of those on which something was chosen, and of the others."""
    found = [
        one
        for case, tool in results.measured("forecast-")
        for result in results.of(case, tool)
        for one in result.figures["forecasts"]
    ]
    head = (
        "set",
        "images seen",
        "images",
        "draws",
        "truth in the interval",
        "mean width, points",
        "mean error, points",
        "mean difference, points",
        "truth of the softmax in it",
        "images needed in the interval",
    )
    others = tuple(name for name in DATASETS if name not in CHOSEN_ON)
    rows = [
        _row(DATASETS[name].kind, [one for one in found if one["set"] == name], times)
        for name in DATASETS
        for times in (2, MOST_TIMES)
    ]
    parts = {"the three sets that chose": CHOSEN_ON, "the other three": others, "all": DATASETS}
    for title, names in parts.items():
        rows += [
            _row(f"**{title}**", [one for one in found if one["set"] in names], times)
            for times in (2, MOST_TIMES)
        ]
    yield from table(head, [row for row in rows if row])


def _row(title: str, forecasts: Sequence[Found], times: int) -> list[str]:
    some = [one for one in forecasts if one["times"] == times]
    if not some:
        return []
    covered = [one["low"] <= one["truth"] <= one["high"] for one in some]
    solved = [one["low"] <= one["softmax"] <= one["high"] for one in some]
    errors = [one["forecast"] - one["truth"] for one in some]
    return [
        title,
        f"{mean(one['seen'] for one in some):.0f}",
        f"{times}x",
        f"{len(some)}",
        f"{sum(covered)} of {len(some)} ({mean(covered):.0%})",
        f"{100 * mean(one['high'] - one['low'] for one in some):.1f}",
        f"{100 * mean(map(abs, errors)):.1f}",
        f"{100 * mean(errors):+.1f}",
        f"{mean(solved):.0%}",
        _describe_needed(some),
    ]


def _describe_needed(some: Sequence[Found]) -> str:
    """Return how often an answer held the images that a known accuracy took, of how many answers."""
    answers = [one for one in some if one["answer"] != "cannot say"]
    held = [_holds(one) for one in answers]
    return f"{sum(held)} of {len(held)}; cannot say {len(some) - len(answers)}"


def _holds(one: Found) -> bool:
    if one["answer"] == "reached":
        return False  # the accuracy took twice or four times the images
    low, _, high = one["needed"]
    return low <= one["images"] and (high is None or one["images"] <= high)


QUESTION = Question("forecast", plan, measure, write=write)
