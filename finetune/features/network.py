"""Weights that are not on this machine yet, fetched where one can see how far that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from finetune.data.loader import Placement
from finetune.errors import FinetuneError, UsageError, sanitize
from finetune.recipe import Recipe
from finetune.recipe.schema import BackboneSettings
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.device import (
    resolve_device,
    resolve_threads,
    set_deterministic,
)
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from pretrained.backbone import Backbone, load_source
from pretrained.catalog import Card, Preprocessing, find_card
from pretrained.default_backbone import DefaultChoice, choose_best
from pretrained.graph.layers import Layers
from pretrained.network import is_convolutional
from pretrained.state_dict import digest_tensors
from pretrained.weights import find_cached, find_weights


def fetch(card: Card, offline: bool, display: Display) -> Path:
    """Return the file of a backbone's weights, from this machine or by download.

    A download that goes on is a sign of life, however slow the server is.

    Raises:
        UsageError: it has none.
        EnvironmentFaultError: it is not here and cannot be had.
    """
    if find_cached(card) is not None:
        return find_weights(card)
    with display.fetch(f"fetching {card.name}") as tell:
        return find_weights(card, offline=offline, on_progress=tell)


@dataclass(frozen=True)
class Pulled:
    """A backbone whose weights were asked for.

    Attributes:
        name: its full name, or what was asked for where there is none.
        path: the file on this machine, None where it could not be had.
        was_here: nothing had to be fetched.
        error: why there is no file.
    """

    name: str
    path: Path | None = None
    was_here: bool = False
    error: FinetuneError | None = None


def pull(names: Sequence[str], offline: bool, display: Display) -> list[Pulled]:
    """Fetch the weights of several backbones; one that cannot be had keeps no other from coming.

    Args:
        names: backbones, at least one.
        offline: only say what is here.
        display: shows progress.
    """
    pulled = []
    for name in names:
        try:
            card = find_card(name, offline)
            if card.place == "none":
                raise UsageError(name, "no weights were ever published for it", "Take another backbone.")
            was_here = find_cached(card) is not None
            pulled.append(Pulled(card.name, fetch(card, offline, display), was_here))
        except FinetuneError as error:
            error.asked = sanitize(f"pull {name}")
            pulled.append(Pulled(name, error=error))
    return pulled


# --- Which backbone a command works with when none was named ---


_SHOWN = 3
"""Backbones that were passed over, of those that are shown."""


def name_backbone(recipe: Recipe, output: Path | None, display: Display) -> Recipe:
    """Return the recipe with a backbone: the one that was named, that the run began with, or the best here.

    Args:
        recipe: what was asked for.
        output: the run folder, if one was named. A run that was begun keeps its backbone and its weights,
            whatever has been fetched since.
        display: is told which it is.

    Raises:
        UsageError: weights were named, and no network that they belong to; or nothing says which network is
            to be trained from random weights.
    """
    asked = recipe.backbone
    if asked.name:
        return recipe
    began = _read_begun(output)
    if began is not None:
        update = {"name": began.name, "weights": asked.weights or began.weights}
        return recipe.model_copy(update={"backbone": asked.model_copy(update=update)})
    _check_choosable(recipe)
    with display.busy("looking for weights on this machine"):
        choice = choose_best(resolve_device(recipe.device).type == "cuda")
    display.say(f"no backbone was named: {choice.best.card.name}, {_describe(choice)}")
    backbone = asked.model_copy(update={"name": choice.best.card.name})
    return recipe.model_copy(update={"backbone": backbone})


def _check_choosable(recipe: Recipe) -> None:
    fix = "Add --backbone NAME (see `finetune backbones`)."
    if recipe.backbone.weights:
        found = "no backbone was named that they belong to"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, fix)
    if recipe.strategy.starts_random:
        found = "no backbone was named, and what weights there are says nothing of what to train without any"
        raise UsageError(f"--strategy {recipe.strategy.name}", found, fix)


def _read_begun(output: Path | None) -> BackboneSettings | None:
    """The backbone of a run that was begun in this folder."""
    if output is None:
        return None
    began = RunReader(RunFolder(output), tolerant=True).recipe  # the claim refuses a damaged one
    return began.backbone if began is not None and began.backbone.name else None


def _describe(choice: DefaultChoice) -> str:
    """Say why it is this one, and which others are here."""
    if choice.best.accuracy is not None:
        reason = f"the best whose weights are on this machine ({choice.best.accuracy:.1f} % on ImageNet)"
    elif choice.skipped:
        reason = "which comes with the installation"
    else:
        return "which comes with the installation (`finetune pull NAME` fetches a larger one)"
    if not choice.skipped:
        return reason
    shown = [f"{card.name} ({why})" for card, why in choice.skipped[:_SHOWN]]
    more = [f"{len(choice.skipped) - _SHOWN} more"] if len(choice.skipped) > _SHOWN else []
    return f"{reason}; here too, if you name it: {', '.join([*shown, *more])}"


def prepare_machine(recipe: Recipe, distributed: Distributed = SINGLE_PROCESS) -> torch.device:
    """Set threads and kernels as a recipe says, and return the device of this process."""
    set_deterministic(recipe.deterministic)
    device = resolve_device(recipe.device, distributed)
    torch.set_num_threads(resolve_threads(distributed.machine.size))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and pinned memory belong to the current one
    return device


def place_network(network: nn.Module, placement: Placement) -> nn.Module:
    """Move a network to its device and layout, in place."""
    layout = torch.channels_last if placement.channels_last else torch.preserve_format
    return network.to(placement.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def resolve_preprocessing(recipe: Recipe, card: Card) -> Preprocessing:
    """Return the card's own preprocessing, except where the recipe says otherwise."""
    own = card.preprocessing.to_dict()
    asked = {key: value for key, value in dict(recipe.input).items() if key in own and value != "auto"}
    return Preprocessing(**own | asked)


LEAST_SOURCE_CLASSES = 1_000
"""Of a classifier that is asked how similar data are: ImageNet's. One of three classes called the same ants
and bees different that ImageNet's calls similar."""


@dataclass(frozen=True)
class Network:
    """A network with its own classifier, on its device, and its layers by name."""

    backbone: Backbone
    placement: Placement
    layers: Layers

    @property
    def has_classifier(self) -> bool:
        """Whether a classifier of many classes came with its weights."""
        match = self.backbone.match
        is_there = bool(match.head) and not match.head_replaced
        return is_there and self.backbone.card.num_classes >= LEAST_SOURCE_CLASSES

    @cached_property
    def weights(self) -> str:
        """Sha256 of all weights."""
        return digest_tensors(self.backbone.network, ())

    @cached_property
    def weights_below_head(self) -> str:
        """Sha256 of what runs that replace the head share."""
        last = self.backbone.stages[-1]
        if last.role != "head":
            return self.weights
        return digest_tensors(self.backbone.network, last.parameters, last.modules)


def open_network(recipe: Recipe, display: Display, distributed: Distributed = SINGLE_PROCESS) -> Network:
    """Load a network as it was published, and find its layers.

    Raises:
        UsageError: there is none of that name, or the weights belong to another.
        EnvironmentFaultError: the weights are not here and cannot be had.
    """
    recipe = name_backbone(recipe, None, display)
    name = str(recipe.backbone.name)
    device = prepare_machine(recipe, distributed)
    card = find_card(name, recipe.backbone.offline)
    if not recipe.backbone.weights:
        fetch(card, recipe.backbone.offline, display)
    with display.busy(f"loading {name}"):
        card = card.with_input(resolve_preprocessing(recipe, card))
        backbone = load_source(card, recipe.backbone.weights, recipe.backbone.offline)
        layout = recipe.training.channels_last
        in_channels_last = is_convolutional(backbone.network) if layout == "auto" else bool(layout)
        placement = Placement(device, in_channels_last)
        network = place_network(backbone.network, placement).eval()
        layers = Layers(network, backbone.stages, card.preprocessing.input_size)
    display.say(f"backbone {backbone.card.name}: {backbone.match}")
    return Network(backbone, placement, layers)
