"""A linear classifier on cached features, solved to its optimum and put on the backbone for export.

::

    strategy.features    last | best | all | a layer's name
      -> layers          best: the one with the highest leave-one-out score on training images
      -> linear head     regularisation by cross-validation on training images, solved by L-BFGS
      -> network         the backbone with this head, or a StageClassifier if it reads other layers

No choice here uses validation images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from finetune.data.dataset import Dataset, Split
from finetune.errors import DataError
from finetune.evaluation.predictions import Predictions
from finetune.features.extraction import Features, Source, open_features
from finetune.features.look_alikes import find_groups
from finetune.features.network import Network
from finetune.features.ridge import score_left_out
from finetune.features.rows import ConcatRows, Rows
from finetune.features.solvers import LinearClassifier, fit
from finetune.launch.processes import is_in_job, is_started_here
from finetune.pipeline.context import FitContext
from finetune.pipeline.setup import RunSetup
from finetune.system.device import available_cores
from finetune.system.display import Advance
from pretrained.backbone import Backbone
from pretrained.graph.classifier import classifier_layers
from pretrained.graph.layers import Layer, Layers
from pretrained.heads import change_head
from pretrained.stage_classifier import StageClassifier


@dataclass(frozen=True)
class LinearHead:
    """A solved linear classifier and its predictions.

    Attributes:
        layers: layers whose features it reads, concatenated.
        is_last: whether these are the features that the backbone's own classifier reads.
        classifier: weights for unscaled features, on the CPU.
        predictions: predictions on the val and test splits.
    """

    layers: tuple[Layer, ...]
    is_last: bool
    classifier: LinearClassifier
    predictions: Mapping[Split, Predictions]

    @property
    def description(self) -> str:
        """One line for the user: ``a linear classifier on layer3 (1,024 features, C = 0.1)``."""
        names = ", ".join(layer.name for layer in self.layers)
        shape = f"{self.classifier.weight.shape[1]:,} features, C = {self.classifier.strength:.3g}"
        return f"a linear classifier on {names} ({shape})"


def solve_head(context: FitContext, choice: str) -> LinearHead:
    """Solve a linear classifier on features of training images.

    All ranks compute the features; rank 0 solves.

    Args:
        context: the running attempt; its backbone is pretrained.
        choice: ``last``, ``best``, ``all`` or the name of a layer.

    Raises:
        DataError: an image can no longer be read.
    """
    setup, backbone = context.setup, context.setup.backbone
    network = backbone.network.eval()
    layers = Layers(network, backbone.stages, backbone.card.preprocessing.input_size)
    dataset = replace(context.dataset.readable, unreadable=())  # the check of the images has warned of them
    source = Source(Network(backbone, setup.placement, layers), dataset, setup.recipe, context.display)
    wanted = layers.all if choice in ("best", "all") else layers.all[-1:]
    if choice not in ("last", "best", "all"):
        wanted = layers.select([choice])
    with open_features(source, wanted, "auto", distributed=context.distributed.machine) as features:
        _refuse_lost(features)
        return context.distributed.share(lambda: _solve(source, features, choice))


@contextmanager
def _every_core() -> Iterator[None]:
    """Compute with every core: torchrun gives each process one thread, and the others only wait now.

    Where the user or ``--processes`` names a number of threads, it stays.
    """
    before = torch.get_num_threads()
    if before == 1 and is_in_job() and not is_started_here():
        torch.set_num_threads(available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_every_core()
def _solve(source: Source, features: Features, choice: str) -> LinearHead:
    dataset, seed, device = source.dataset, source.recipe.seed, source.network.placement.device
    total = 1 + (len(features.layers) if choice == "best" else 0)
    with source.display.track("solving linear classifiers", total) as advance:
        chosen = _choose(source, features, choice, advance)
        rows = _concat_rows(features, chosen)
        indices = _indices_of(dataset, "train")
        labels = _labels(dataset, indices)
        names = ", ".join(layer.name for layer in chosen)
        advance(0, names)
        groups = _find_groups(source, features, indices)
        kind = dataset.target.solver
        classifier = fit(rows, indices, labels, dataset.num_classes, kind, seed, device, groups)
        advance(1, names)
        splits: list[Split] = ["val", "test"]
        predictions = {
            split: _predict(classifier, rows, dataset, split) for split in splits if dataset.of(split)
        }
    is_last = chosen == source.network.layers.all[-1:]
    return LinearHead(chosen, is_last, classifier, predictions)


def _refuse_lost(features: Features) -> None:
    if features.lost:
        found = "; ".join(f"{path} ({reason})" for path, reason in features.lost.items())
        fix = "Restore or remove the file, and run the command again."
        raise DataError("reading an image that was readable before", found, fix)


def _choose(source: Source, features: Features, choice: str, advance: Advance) -> tuple[Layer, ...]:
    """Return the layers to read; ``best`` is the stage with the highest leave-one-out score."""
    if choice != "best":
        return features.layers
    dataset, device = source.dataset, source.network.placement.device
    indices = _indices_of(dataset, "train")
    labels = _labels(dataset, indices)
    groups = _find_groups(source, features, indices)
    scores = []
    for layer, rows in zip(features.layers, features.rows, strict=True):
        advance(0, layer.name)
        found = score_left_out(rows, indices, labels, dataset.num_classes, dataset.target, device, groups)
        scores.append(found.mean().item())
        advance(1, layer.name)
    best = max(range(len(scores)), key=lambda index: (scores[index], index))
    return (features.layers[best],)


def _find_groups(source: Source, features: Features, indices: Tensor) -> Tensor:
    samples = [source.dataset.samples[index] for index in indices.tolist()]
    labels, named = torch.tensor([sample.label for sample in samples]), [sample.group for sample in samples]
    return find_groups(features.rows[-1], indices, labels, named)


def _concat_rows(features: Features, chosen: Sequence[Layer]) -> Rows:
    rows = [features.rows[features.layers.index(layer)] for layer in chosen]
    return rows[0] if len(rows) == 1 else ConcatRows(rows)


def _indices_of(dataset: Dataset, split: Split) -> Tensor:
    return torch.tensor([i for i, sample in enumerate(dataset.samples) if sample.split == split])


def _labels(dataset: Dataset, indices: Tensor) -> Tensor:
    return dataset.encode([dataset.samples[index] for index in indices.tolist()])


def _predict(classifier: LinearClassifier, rows: Rows, dataset: Dataset, split: Split) -> Predictions:
    indices = _indices_of(dataset, split)
    logits = torch.cat([classifier.scores(rows[batch]) for batch in torch.split(indices, 1024)])
    return Predictions(logits.float(), _labels(dataset, indices), dataset.target)


# --- the network ---------------------------------------------------------------------------------


def find_plain_head(network: nn.Module, solution: LinearHead) -> nn.Linear | nn.Conv2d | None:
    """Return the network's own classifier layer if its shape fits the solved classifier."""
    layers = classifier_layers(network)
    if not solution.is_last or len(layers) != 1 or layers[0].bias is None:
        return None
    width = layers[0].weight.flatten(1).shape[1]
    return layers[0] if width == solution.classifier.weight.shape[1] else None


@torch.no_grad()
def fill_head(layer: nn.Linear | nn.Conv2d, solution: LinearHead) -> None:
    """Copy a solved classifier into a layer of the same shape."""
    assert layer.bias is not None
    layer.weight.copy_(solution.classifier.weight.view_as(layer.weight))
    layer.bias.copy_(solution.classifier.bias)


def build_solved(setup: RunSetup, solution: LinearHead) -> Backbone:
    """Return the pretrained backbone with the solved classifier, in eval mode."""
    backbone = setup.backbone
    head = find_plain_head(backbone.network, solution)
    if head is not None:
        fill_head(head, solution)
        backbone.network.eval()
        return backbone
    weight = solution.classifier.weight
    _drop_head(backbone.network)
    network = StageClassifier(backbone.network, solution.layers, "auto", len(weight))
    device = setup.placement.device
    network.classifier.to(device)
    fill_head(network.classifier, solution)
    points = (layer.point for layer in solution.layers)
    taps = tuple((point.module, point.number, point.at_input) for point in points)
    card = replace(backbone.card, taps=taps)
    return replace(backbone, network=network.eval(), card=card)


@torch.no_grad()
def _drop_head(network: nn.Module) -> None:
    """Replace the unused classifier by the smallest one: a single class with zero weights."""
    change_head(network, 1, "replace")
    for layer in classifier_layers(network):
        for parameter in layer.parameters():
            parameter.zero_()
