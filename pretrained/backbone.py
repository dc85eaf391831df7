"""Load a backbone: a network with its card, its stages and a report of the loaded weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import nn

from finetune.errors import UsageError, count
from pretrained.catalog import Card, HeadChoice
from pretrained.graph.classifier import classifier_layers, head_parameters
from pretrained.graph.stages import Stage, find_stages
from pretrained.heads import change_head, read_rows, write_rows
from pretrained.loading import Match, load_weights
from pretrained.network import build_network, build_outline, with_published_dropout
from pretrained.patches import check_patches
from pretrained.preprocessing import Preprocessing
from pretrained.state_dict import check_digest
from pretrained.twins import check_twins
from pretrained.weights import find_weights


@dataclass(frozen=True)
class Backbone:
    """A network with all facts that a strategy needs.

    Attributes:
        network: float32, on the CPU, in train mode; (B, C, H, W) -> (B, K).
        card: its metadata, with its current preprocessing and number of classes.
        stages: from stem to head; every parameter is in exactly one.
        match: which of its tensors were loaded.
    """

    network: nn.Module
    card: Card
    stages: tuple[Stage, ...]
    match: Match

    def with_input(self, preprocessing: Preprocessing) -> Backbone:
        """Return the same network with other preprocessing of images of the same size."""
        return replace(self, card=self.card.with_input(preprocessing))

    def with_value_range(self, value_range: tuple[float, float]) -> Backbone:
        """Return the same network with another range of values of images of more than 8 bits."""
        return replace(self, card=self.card.with_value_range(value_range))


def load_backbone(
    card: Card,
    *,
    classes: Sequence[str],
    head: HeadChoice = "replace",
    dropout: float | None = None,
    weights: str | None = None,
    offline: bool = False,
    pretrained: bool = True,
    keeps_rows: bool = False,
) -> Backbone:
    """Build a network for these classes and load its weights.

    Args:
        card: the network, with the preprocessing that it will be used with.
        classes: names in index order.
        head: ``replace``, ``keep`` (same labels) or ``drop_fc`` (VGG, AlexNet).
        dropout: dropout rate before a new classifier, or of a network of the zoo; None: the network's own in
            the zoo, else 0.
        weights: file or folder to use instead of the card's weights.
        offline: never access the internet.
        pretrained: False keeps random weights (strategy ``scratch``).
        keeps_rows: the new classifier begins with the rows of the classes that the network knows by name.

    Raises:
        UsageError: the head cannot be replaced or kept, none of its classes is known, or the weights belong
            to another network.
        EnvironmentFaultError: the weights are not on this machine and cannot be downloaded.
    """
    if head == "keep":
        check_same_labels(card, classes)
    elif card.head == "drop_fc":
        head = "replace"  # its fully connected layers were dropped already
    card = with_published_dropout(card)
    if dropout is None:
        dropout = card.dropout if card.source == "zoo" else 0.0
    if not card.num_classes:  # published without a classifier: build it with the new one, if possible
        card = replace(card, num_classes=len(classes))
    network = build_network(card, None if head == "keep" else dropout)
    if not classifier_layers(network):
        found = "it is an encoder that gives features only, and cannot hold a classifier"
        raise UsageError(f"--backbone {card.name}", found, "Take another one (see `finetune backbones`).")
    check_patches(network, card)
    path = find_weights(card, weights, offline) if pretrained else None
    if path is not None and weights is None:
        check_digest(path, card.sha256)
    old_head = head_parameters(network)
    if path is not None:
        match = load_weights(network, card, path, old_head, load_head=keeps_rows or head == "keep")
        if weights is not None:
            match = _with_note(match, check_twins(network, card, path))
    else:
        match = Match("", 0, len(network.state_dict()))
        card = _without_weights(card)
    rows = read_rows(network) if keeps_rows else []
    change_head(network, len(classes), head, dropout)
    if keeps_rows and pretrained:
        write_rows(network, rows, card.label_names, classes)
    new_card = replace(
        card,
        num_classes=len(classes),
        label_names=tuple(classes),
        head=card.head if head == "keep" or card.head == "drop_fc" else head,
        dropout=card.dropout if head == "keep" else dropout,
        temperature=card.temperature if head == "keep" else 1.0,
        target=card.target if head == "keep" else (),
    )
    return Backbone(network, new_card, _stages_of(network, card.preprocessing), match)


def load_source(card: Card, weights: str | None = None, offline: bool = False) -> Backbone:
    """Build a network as it was published, with its own classifier, and load its weights.

    ``match.head_replaced`` is True if the file has no classifier that fits.

    Args:
        card: the network, with the preprocessing that it will be used with.
        weights: file or folder to use instead of the card's weights.
        offline: never access the internet.

    Raises:
        UsageError: the weights belong to another network.
        EnvironmentFaultError: the weights are not on this machine and cannot be downloaded.
    """
    path = find_weights(card, weights, offline)
    if weights is None:
        check_digest(path, card.sha256)
    network = build_network(card)
    if card.place != "folder":  # an exported network is used as it was trained
        check_patches(network, card)
    head = head_parameters(network)
    match = load_weights(network, card, path, head, load_head=False)
    if head:
        with suppress(UsageError):
            match = load_weights(network, card, path, head, load_head=True)
    if weights is not None:
        match = _with_note(match, check_twins(network, card, path))
    return Backbone(network, card, _stages_of(network, card.preprocessing), match)


def _with_note(match: Match, note: str) -> Match:
    return replace(match, notes=(*match.notes, note)) if note else match


def _without_weights(card: Card) -> Card:
    """Return the card of the architecture alone, without licence and origin of weights that are not used."""
    name = f"{card.source}/{card.architecture}"
    return replace(card, name=name, tag="", place="none", location="", license="", origin="")


def describe_stages(card: Card) -> tuple[tuple[Stage, ...], dict[str, int]]:
    """Return the stages of a network with its own classifier, and the size of each parameter."""
    network = build_outline(card)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return _stages_of(network, card.preprocessing), sizes


def _stages_of(network: nn.Module, preprocessing: Preprocessing) -> tuple[Stage, ...]:
    """Find stages; of timm networks the head too, as more may run after the classifier (VOLO)."""
    head = None if hasattr(network, "get_classifier") else head_parameters(network)
    return find_stages(network, preprocessing.input_size, head=head)


def check_same_labels(card: Card, classes: Sequence[str]) -> None:
    """Refuse to keep a classifier whose outputs are other classes.

    Raises:
        UsageError: the number of classes differs, or the network has other label names from an earlier run.
    """
    if card.num_classes != len(classes):
        found = f"the network's classifier has {count(card.num_classes, 'output')}, the data "
        found += count(len(classes), "class", "classes")
        raise UsageError("strategy.head=keep", found, "Take head=replace for other labels.")
    if card.place == "folder" and card.label_names and tuple(classes) != card.label_names:
        other = [name for name in classes if name not in card.label_names] or list(classes)
        found = f"the network was trained for other labels or another order (here: {', '.join(other[:3])})"
        raise UsageError("strategy.head=keep", found, "Take head=replace for other labels.")
