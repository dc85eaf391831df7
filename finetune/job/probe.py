"""``finetune probe``: which layer is best, as Zeiler and Fergus asked it (arXiv:1311.2901)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.display import Display
from finetune.features.plots import draw_probe
from finetune.features.probe import Classifier, Draw, ProbeResult, draw_parts, probe_layer
from finetune.features.rows import ChosenRows
from finetune.job.data import check_outside, create_new_folder, require_labels
from finetune.job.outcome import translated_errors
from finetune.job.source import Features, Source, open_features, open_network, open_pictures, open_source
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from pretrained.graph.layer import Layer
from pretrained.graph.pooling import Pool

COLUMNS = (
    "layer",
    "depth",
    "num_features",
    "classifier",
    "mean_accuracy",
    "std_accuracy",
    "per_class",
    "repeats",
    "regularisation",
)


@dataclass(frozen=True)
class Row:
    """One classifier on one layer."""

    layer: Layer
    num_features: int
    result: ProbeResult

    def cells(self, per_class: int) -> tuple[Any, ...]:
        """Return the row as ``probe.csv`` has it."""
        result = self.result
        strengths = " ".join(f"{strength:g}" for strength in result.strengths)
        return (
            self.layer.name,
            self.layer.share,
            self.num_features,
            result.classifier,
            result.mean,
            result.std,
            per_class,
            len(result.accuracies),
            strengths,
        )

    def to_dict(self, per_class: int) -> dict[str, Any]:
        """Return the row with its columns' names."""
        return dict(zip(COLUMNS, self.cells(per_class), strict=True))


def probe(
    recipe: Recipe,
    wanted: Sequence[str],
    per_class: int,
    classifiers: Sequence[Classifier],
    repeats: int,
    output: Path,
    pool: Pool,
    display: Display,
) -> list[Row]:
    """Judge layers by linear classifiers and nearest neighbours on their features.

    All labelled pictures are taken together, whatever their part; in each repeat some of each class train and
    the rest are judged, by the mean over classes.

    Args:
        recipe: its backbone, data, input, cache, machine and seed count.
        wanted: names, words and patterns of layers.
        per_class: training images of each class.
        classifiers: at least one.
        repeats: draws of training images.
        output: a new folder for ``probe.csv`` and ``probe.png``.
        pool: of what layers give.
        display: shows progress.

    Raises:
        FinetuneError: every refusal and failure.
    """
    with translated_errors():
        network = open_network(recipe, display)
        layers = network.layers.select(wanted, pool)
        dataset = open_pictures(recipe, display)
        require_labels(dataset, recipe)
        check_outside(output, dataset)
        every = torch.tensor([sample.label for sample in dataset.samples])
        draw_parts(every, dataset.classes, per_class, recipe.seed, 0)  # refuses before anything is computed
        source = open_source(recipe, network, dataset, display)
        create_new_folder(output)
        samples = source.dataset.samples
        with open_features(source, layers, pool) as features:
            usable = _leave_copies_out(features.usable(samples), source)
            labels = torch.tensor([samples[index].label for index in usable.tolist()])
            draws = [
                draw_parts(labels, dataset.classes, per_class, recipe.seed, repeat)
                for repeat in range(repeats)
            ]
            total = len(layers) * len(classifiers) * repeats
            with display.track("judging layers", total) as advance:
                rows = _judge(features, usable, labels, draws, classifiers, lambda: advance(1, ""))
        write_csv(output / "probe.csv", [row.cells(per_class) for row in rows], COLUMNS)
        title = f"{network.backbone.card.name}, {per_class} training images a class"
        _draw_curves(rows, layers, classifiers, 1 / dataset.num_classes, title, output / "probe.png")
        display.say(f"{output}/probe.csv, probe.png", style="bold")
        return rows


def _leave_copies_out(usable: Tensor, source: Source) -> Tensor:
    """Return the indices of different pictures: by a copy, what is known by heart would be judged."""
    samples = source.dataset.samples
    first: dict[str, int] = {}
    for index in usable.tolist():
        first.setdefault(source.digests[samples[index].path], index)
    if len(first) < len(usable):
        said = (
            "1 exact copy is"
            if len(usable) - len(first) == 1
            else f"{len(usable) - len(first)} exact copies are"
        )
        source.display.say(f"{said} left out: each picture counts once")
    return torch.tensor(list(first.values()), dtype=torch.int64)


def _judge(
    features: Features,
    usable: Tensor,
    labels: Tensor,
    draws: Sequence[Draw],
    classifiers: Sequence[Classifier],
    on_done: Callable[[], None],
) -> list[Row]:
    num_classes = int(labels.max()) + 1
    rows: list[Row] = []
    for layer, whole in zip(features.layers, features.rows, strict=True):
        results = probe_layer(ChosenRows(whole, usable), labels, num_classes, draws, classifiers, on_done)
        rows += [Row(layer, whole.shape[1], result) for result in results]
    return rows


def _draw_curves(
    rows: Sequence[Row],
    layers: Sequence[Layer],
    kinds: Sequence[Classifier],
    chance: float,
    title: str,
    path: Path,
) -> None:
    curves = {}
    for kind in kinds:
        results = [row.result for row in rows if row.result.classifier == kind]
        curves[str(kind)] = ([result.mean for result in results], [result.std for result in results])
    draw_probe(path, [layer.name for layer in layers], curves, chance, title)
