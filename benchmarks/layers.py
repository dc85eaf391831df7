"""Which features ``auto`` should give its linear classifier: the last ones, those of one stage, or all.

From each data set some images a class are drawn again and again; every stage is scored by leaving training
images out, as ``finetune advise`` does, and judged by a softmax on the set's own test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

import torch
from torch import Tensor

from benchmarks.accuracy import BACKBONES, DATASETS, describe_backbone, make_folder
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures, Results
from benchmarks.text import table
from finetune.features.extraction import Features, Source, open_features, open_images, open_source
from finetune.features.network import open_network
from finetune.features.ridge import leave_groups_out
from finetune.features.rows import ConcatRows, Rows
from finetune.features.solvers import fit
from finetune.pipeline.rule import LAST_ERRORS
from finetune.recipe import load_recipe
from finetune.system.display import SilentDisplay
from finetune.targets import LINEAR_CLASSIFIER, decide

SIZES = (5, 10, 20, 50)
"""Images a class of a draw."""
DRAWS = 6
MOST_IMAGES = 1_500

Draw = dict[str, list[float]]
"""By stage and at the end all together: the accuracy left out and on test images, the lead over the last
stage and its standard error."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each backbone and data set."""
    sets = ["digits"] if bench.quick else [name for name in DATASETS if name != "omniglot136"]
    largest = {name: max(DATASETS[name].epochs) if name == "digits" else 0 for name in sets}
    backbones = ["lite0"] if bench.quick else BACKBONES
    return [
        Case(f"layers-{network}-{name}", network=network, dataset=name, size=largest[name])
        for network in backbones
        for name in sets
    ]


def measure(turn: Turn) -> Figures:
    """Return what each draw found."""
    folder = make_folder(turn.case.dataset, turn.case.size, 0, turn.bench)
    keys = {"data.path": str(folder), "data.workers": 0, "input.augmentation": "none", "seed": turn.repeat}
    recipe = load_recipe(None, keys | describe_backbone(turn.case, turn.bench))
    display = SilentDisplay()
    network = open_network(recipe, display)
    source = open_source(recipe, network, open_images(recipe, display), display)
    with open_features(source, network.layers.all, "auto") as features:
        return {"draws": [*_draw_all(source, features, turn)]}


def _draw_all(source: Source, features: Features, turn: Turn) -> Iterator[Draw]:
    labels = torch.tensor([sample.label for sample in source.dataset.samples])
    is_test = torch.tensor([sample.split == "test" for sample in source.dataset.samples])
    pool, test = (~is_test).nonzero().flatten(), is_test.nonzero().flatten()
    fewest = int(labels[pool].bincount().min())
    every = [*features.rows, ConcatRows(features.rows)]
    generator = torch.Generator().manual_seed(turn.repeat)
    for size in SIZES[:1] if turn.bench.quick else SIZES:
        number = size * source.dataset.num_classes
        for _ in range(1 if turn.bench.quick else DRAWS):
            if 0.7 * size <= fewest and number <= MOST_IMAGES:  # a small class may give all it has
                order = pool[torch.randperm(len(pool), generator=generator)]
                drawn = torch.cat([order[labels[order] == label][:size] for label in torch.unique(labels)])
                yield _score(every, drawn, test, labels, turn.repeat)


def _score(every: Sequence[Rows], drawn: Tensor, test: Tensor, labels: Tensor, seed: int) -> Draw:
    num_classes = int(labels.max()) + 1
    hits = [leave_groups_out(rows, drawn, labels[drawn], num_classes).double() for rows in every]
    leads = [one - hits[-2] for one in hits]
    solved = [fit(rows, drawn, labels[drawn], num_classes, LINEAR_CLASSIFIER, seed) for rows in every]
    right = [decide(one.scores(rows[test])) == labels[test] for one, rows in zip(solved, every, strict=True)]
    return {
        "left_out": [one.mean().item() for one in hits],
        "lead": [one.mean().item() for one in leads],
        "lead_error": [one.std(correction=0).item() / len(drawn) ** 0.5 for one in leads],
        "test": [one.double().mean().item() for one in right],
    }


def _take_all_unless_last_leads(draw: Draw) -> int:
    return -2 if -draw["lead"][-1] > LAST_ERRORS * draw["lead_error"][-1] else -1


def _take_the_best_of_all(draw: Draw) -> int:
    """Return the last stage, unless the best single one or all together lead by a standard error."""
    single = max(range(len(draw["test"]) - 1), key=lambda place: (draw["left_out"][place], place))
    better = [place for place in (single, -1) if draw["lead"][place] > draw["lead_error"][place]]
    return max(better, key=lambda place: draw["left_out"][place], default=-2)


POLICIES: dict[str, Callable[[Draw], int]] = {
    "always the last features": lambda _: -2,
    "always all stages": lambda _: -1,
    "all stages unless the last lead by 1 s.e.": _take_all_unless_last_leads,
    "the best of the last, the best stage and all, by 1 s.e.": _take_the_best_of_all,
}


def write(results: Results) -> Iterator[str]:
    """Yield what each policy loses to the best choice in hindsight, in points."""
    rows = []
    for case, tool in results.measured("layers-"):
        draws: list[Draw] = [draw for result in results.of(case, tool) for draw in result.figures["draws"]]
        lost = [
            mean(max(one["test"]) - one["test"][take(one)] for one in draws) for take in POLICIES.values()
        ]
        cells = [f"{100 * value:.1f}" for value in lost]
        best = f"{100 * mean(max(one['test']) for one in draws):.1f}"
        rows.append([case.removeprefix("layers-"), f"{len(draws)}", best, *cells])
    yield from table(["network and set", "draws", "best in hindsight, %", *POLICIES], rows)


QUESTION = Question("layers", plan, measure, write=write)
