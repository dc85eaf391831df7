"""``finetune advise --backbones``: rank backbones on the same images by nearest neighbours.

Among 24 scores that rank backbones without training, nearest-neighbour accuracy was the best over 16 data
sets (arXiv:2503.18528); LEEP, LogME and H-scores rank worse. For labels that are not one class an image it is
``Target.additive_score``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.data.prepare import draw_evenly, read_images, require_labels
from finetune.features.extraction import open_features, open_images, open_source
from finetune.features.look_alikes import find_groups
from finetune.features.network import open_network
from finetune.features.transferability import MOST_IMAGES, score_neighbours
from finetune.recipe import Recipe
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from pretrained.catalog import find_card


@dataclass(frozen=True)
class RankedBackbone:
    """The score of one backbone.

    Attributes:
        backbone: the name of the backbone.
        metric: what the score is: ``accuracy``, or ``r2`` for several labels and numbers.
        score: of the five nearest neighbours on its last features, leave-one-out; at most 1.
        error: standard error of the score.
        num_features: features of an image (D).
        num_parameters: parameters of the network with its own classifier.
        num_images: training images that were used.
    """

    backbone: str
    metric: str
    score: float
    error: float
    num_features: int
    num_parameters: int
    num_images: int


def rank_backbones(recipe: Recipe, names: Sequence[str], display: Display) -> list[RankedBackbone]:
    """Return backbones in descending order of the score of nearest neighbours.

    Args:
        recipe: settings of data, input and machine; its backbone name is ignored.
        names: backbones, at least one.
        display: shows progress.
    """
    for name in names:
        find_card(name, recipe.backbone.offline)  # raises before anything is computed
    with translated_errors():
        return _rank(recipe, names, display)


def _rank(recipe: Recipe, names: Sequence[str], display: Display) -> list[RankedBackbone]:
    dataset = open_images(recipe, display)
    require_labels(dataset, recipe)
    target = dataset.target
    prepared = read_images(recipe, dataset, display)
    few = draw_evenly(prepared, MOST_IMAGES, recipe.seed)
    ranked = []
    for name in names:
        backbone = recipe.backbone.model_copy(update={"name": name})
        network = open_network(recipe.model_copy(update={"backbone": backbone}), display)
        source = open_source(recipe, network, few, display)
        last = network.layers.all[-1]
        with open_features(source, [last], "auto", splits=("train",)) as features:
            samples = source.dataset.of("train")
            usable = features.usable(samples)
            used = [samples[index] for index in usable.tolist()]
            labels = torch.tensor([sample.label for sample in used])
            groups = find_groups(features.rows[0], usable, labels, [sample.group for sample in used])
            encoded = dataset.encode(used)
            scores = score_neighbours(features.rows[0], usable, encoded, dataset.num_classes, target, groups)
        ranked.append(
            RankedBackbone(
                network.backbone.card.name,
                target.additive_score,
                scores.mean().item(),
                scores.std(correction=0).item() / len(scores) ** 0.5,
                last.num_features("auto"),
                sum(parameter.numel() for parameter in network.backbone.network.parameters()),
                len(scores),
            )
        )
    return sorted(ranked, key=lambda ranking: -ranking.score)
