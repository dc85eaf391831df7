"""``finetune advise`` and ``--strategy auto``: measure the data with a backbone, and choose a strategy.

::

    training images, at most 2,000      -> size
    one forward of the published network -> logits of its own classifier: normalised LEEP
                                         -> features by depth: nearest neighbours, linear classifiers
    finetune/pipeline/rule.py            -> cell of the matrix, strategy, features, learning rates
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data.dataset import Dataset
from finetune.data.prepare import check_outside, draw_evenly, read_images, require_labels
from finetune.features.extraction import Features, Source, open_features, open_images, open_source
from finetune.features.look_alikes import find_groups
from finetune.features.network import Network, open_network, take_channels
from finetune.features.ridge import score_left_out
from finetune.features.rows import ConcatRows
from finetune.features.transferability import MOST_IMAGES, compute_normalised_leep, score_neighbours
from finetune.pipeline.rule import CELLS, Candidate, Decision, Evidence, decide
from finetune.pipeline.verify import verify
from finetune.recipe import BASE_LRS, Recipe, compute_views
from finetune.system.display import Display
from finetune.system.forward import time_forward
from finetune.targets import to_probabilities
from finetune.training.plan import Plan, lay_plan

BACKWARD = 3
"""Cost of a training step in forward passes; the backward pass counts as two."""


@dataclass(frozen=True)
class Depth:
    """One layer's linear classifier and nearest neighbours, on training images.

    Attributes:
        layer: name of the layer.
        num_features: features per image.
        neighbours: leave-one-out score of the five nearest neighbours by cosine.
        neighbours_error: its standard error.
        score: leave-one-out score of ridge regression.
        score_error: its standard error.
    """

    layer: str
    num_features: int
    neighbours: float
    neighbours_error: float
    score: float
    score_error: float


@dataclass(frozen=True)
class Advice:
    """The content of ``advice.json``.

    Attributes:
        backbone: name of the backbone.
        evidence: measurements of the data.
        decision: chosen strategy, with reasons.
        depths: one entry per layer, from the stem up.
        plan: which stages would be trained, and with which learning rate.
        num_trained: number of parameters that each strategy would train.
        seconds: estimated training time of each strategy.
        num_looked_at: number of training images that were measured.
        verified: scores of the brief training, by strategy; None without ``advise.verify``.
    """

    backbone: str
    evidence: Evidence
    decision: Decision
    depths: tuple[Depth, ...]
    plan: Plan
    num_trained: Mapping[str, int]
    seconds: Mapping[str, float]
    num_looked_at: int
    verified: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        decision, evidence = self.decision, self.evidence
        return {
            "backbone": self.backbone,
            "strategy": dict(decision.keys),
            "size": decision.size,
            "similarity": decision.similarity,
            "reasons": list(decision.reasons),
            "would_change": list(decision.changes),
            "warnings": list(decision.warnings),
            "num_images": evidence.num_images,
            "num_classes": evidence.num_classes,
            "smallest_class": evidence.smallest_class,
            "num_looked_at": self.num_looked_at,
            "num_independent": evidence.num_independent,
            "metric": evidence.metric,
            "normalised_leep": evidence.leep,
            "neighbours_gap": evidence.gap,
            "neighbours_gap_error": evidence.gap_error,
            "candidates": [vars(candidate) for candidate in evidence.candidates],
            "depths": [vars(depth) for depth in self.depths],
            "plan": [dict(zip(_PLAN_KEYS, row.cells(), strict=True)) for row in self.plan.rows],
            "num_trained": dict(self.num_trained),
            "seconds_estimated": dict(self.seconds),
            "verified": None if self.verified is None else dict(self.verified),
        }


_PLAN_KEYS = ("group", "stage", "parameters", "trained", "rate", "norm")


def advise(recipe: Recipe, display: Display, output: Path | None = None) -> Advice:
    """Measure a data set with a backbone, and choose a strategy.

    Args:
        recipe: recipe of the run; of its strategy only the keys that the advice does not set are read.
        display: progress display.
        output: folder that will be written; it must not be inside the data set.

    Raises:
        DataError: the images have no labels.
        FinetuneError: every other refusal and failure.
    """
    dataset = open_images(recipe, display)
    require_labels(dataset, recipe)
    recipe = take_channels(recipe, dataset)
    network = open_network(recipe, display)
    if output is not None:
        check_outside(output, dataset)
    prepared = read_images(recipe, dataset, display)
    few = draw_evenly(prepared, MOST_IMAGES, recipe.seed)
    source = open_source(recipe, network, few, display)
    layers = network.layers.all
    if network.backbone.card.taps:  # a classifier on stages takes no other features
        layers = layers[-1:]
    with open_features(
        source, layers, "auto", with_logits=network.has_classifier, splits=("train",)
    ) as features:
        samples = source.dataset.of("train")
        usable = features.usable(samples)
        chosen = [samples[index] for index in usable.tolist()]
        labels = torch.tensor([sample.label for sample in chosen])
        groups = find_groups(features.rows[-1], usable, labels, [sample.group for sample in chosen])
        evidence, depths = _measure(source, features, usable, dataset.encode(chosen), groups, dataset)
    decision, verified = decide(evidence), None
    if recipe.advise.verify:
        together = dict(zip((sample.path for sample in chosen), groups.tolist(), strict=True))
        decision, verified = verify(recipe, evidence, decision, together, dataset.target.score, display)
    settings = recipe.strategy.model_copy(update=dict(decision.keys))
    lr = recipe.training.lr
    lr = BASE_LRS[recipe.training.optimizer] if lr == "auto" else lr
    plan = lay_plan(network.backbone.network, network.backbone.stages, settings, lr, recipe.training.epochs)
    return Advice(
        network.backbone.card.name,
        evidence,
        decision,
        depths,
        plan,
        _count_trained(network, recipe, dataset.num_classes),
        _estimate(network, recipe, len(dataset.of("train"))),
        len(usable),
        verified,
    )


# --- measuring -----------------------------------------------------------------------------------


def _measure(
    source: Source, features: Features, usable: Tensor, labels: Tensor, groups: Tensor, dataset: Dataset
) -> tuple[Evidence, tuple[Depth, ...]]:
    """Measure layers on the usable images of a source; ``dataset`` is the whole, of which they are a part.

    ``labels`` are encoded: (N,) int64, or (N, K) float32.
    """
    seed, device = source.recipe.seed, source.network.placement.device
    num_classes, target = dataset.num_classes, dataset.target
    neighbours, scores = [], []
    with source.display.track("nearest neighbours by depth", len(features.layers)) as advance:
        for layer, rows in zip(features.layers, features.rows, strict=True):
            advance(0, layer.name)
            neighbours.append(score_neighbours(rows, usable, labels, num_classes, target, groups))
            advance(1, layer.name)
    names = (*(layer.name for layer in features.layers), "all together")
    with source.display.track("linear classifiers by depth", len(names)) as advance:
        for name, rows in zip(names, (*features.rows, ConcatRows(features.rows)), strict=True):
            advance(0, name)
            scores.append(score_left_out(rows, usable, labels, num_classes, target, device, groups))
            advance(1, name)
    depths = tuple(
        Depth(layer.name, rows.shape[1], *_average(near), *_average(score))
        for layer, rows, near, score in zip(
            features.layers, features.rows, neighbours, scores[: len(neighbours)], strict=True
        )
    )
    leep = _measure_leep(features, usable, labels, num_classes, seed)
    gap, gap_error = _gap(neighbours)
    counts = dataset.counts("train")
    evidence = Evidence(
        len(dataset.of("train")),
        num_classes,
        min(counts),
        leep,
        gap,
        gap_error,
        _candidates(scores),
        num_measured=len(usable),
        num_independent=len(torch.unique(groups)),
        metric=target.additive_score,
    )
    return evidence, depths


def _measure_leep(
    features: Features, usable: Tensor, labels: Tensor, num_classes: int, seed: int
) -> float | None:
    if features.logits is None or labels.ndim > 1:
        return None
    probabilities = to_probabilities(features.logits[usable])
    return compute_normalised_leep(probabilities, labels, num_classes, seed)


def _gap(neighbours: Sequence[Tensor]) -> tuple[float, float]:
    """Return the lead in score of the best earlier layer over the last, and its standard error."""
    if len(neighbours) < 2:
        return 0.0, 0.0
    best = max(neighbours[:-1], key=lambda scores: scores.mean().item())
    return _average(best - neighbours[-1])


def _average(values: Tensor) -> tuple[float, float]:
    """Return the mean of what each image has (N,), and its standard error."""
    return values.mean().item(), values.std(correction=0).item() / math.sqrt(len(values))


def _candidates(scores: Sequence[Tensor]) -> tuple[Candidate, ...]:
    """Return the candidates from the scores of each layer and, at the end, of all layers together."""
    last, together = scores[-2:]
    found = Candidate("last", last.mean().item(), 0.0, 0.0)
    if len(scores) == 2:  # of a single layer, and of it once more
        return (found,)
    return found, Candidate("all", together.mean().item(), *_average(together - last))


# --- costs ---------------------------------------------------------------------------------------


def _count_trained(network: Network, recipe: Recipe, num_classes: int) -> dict[str, int]:
    """Return how many parameters each strategy trains, with a linear classifier for these classes."""
    head = (network.layers.all[-1].num_features("auto") + 1) * num_classes
    counts = {}
    for name in dict.fromkeys(cell.name for cell in CELLS.values()):
        settings = recipe.strategy.model_copy(update={"name": name})
        plan = lay_plan(network.backbone.network, network.backbone.stages, settings, 1.0, 1)
        counts[name] = head + sum(row.num_parameters for row in plan.trained if row.group != "head")
    return counts


def _estimate(network: Network, recipe: Recipe, num_train: int) -> dict[str, float]:
    """Return estimated seconds by strategy, from the measured time of a forward pass."""
    size, placement = network.backbone.card.preprocessing.input_size, network.placement
    forward = time_forward(network.backbone.network, size, placement.device, placement.channels_last)
    below = network.layers.stages[-1 - recipe.strategy.top_stages :][:1]
    trunk = below[0].share if below else 0.0
    epochs = recipe.training.epochs
    views = recipe.cache.views
    views = compute_views("top", recipe.input.augmentation, epochs) if views == "auto" else views
    rest = BACKWARD * epochs * (1 - trunk)
    times = {
        "freeze": 1.0,
        "top": min(views, epochs) * trunk + rest,
        "full": float(BACKWARD * epochs),
    }
    return {name: round(num_train * forward * passes, 1) for name, passes in times.items()}
