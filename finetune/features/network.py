"""Opening a network for use: download its weights, choose a default backbone, load it onto its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from finetune.data.channels.arrays import count_channels, find_array_shape
from finetune.data.channels.depth import ValueRange
from finetune.data.dataset import Dataset
from finetune.data.loader import Placement
from finetune.errors import FinetuneError, UsageError, count, sanitize
from finetune.recipe import Recipe
from finetune.recipe.sections import BackboneSettings
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.device import (
    resolve_device,
    resolve_threads,
    set_deterministic,
)
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.gpu import explain_unused_gpu
from pretrained.backbone import Backbone, load_source
from pretrained.catalog import Card, find_card
from pretrained.default_backbone import DefaultChoice, choose_best
from pretrained.graph.layers import Layer, Layers
from pretrained.graph.pooling import Pool
from pretrained.loading import check_complete
from pretrained.network import is_convolutional
from pretrained.preprocessing import MOST_CHANNELS, Preprocessing
from pretrained.state_dict import digest_tensors
from pretrained.weights import find_cached, find_weights


def fetch(card: Card, offline: bool, display: Display) -> Path:
    """Return the file of a backbone's weights, which is downloaded if it is not on this machine.

    A download in progress counts as a heartbeat, however slow the server is.

    Raises:
        UsageError: the backbone has no published weights.
        EnvironmentFaultError: the weights are not on this machine and cannot be downloaded.
    """
    if find_cached(card) is not None:
        return find_weights(card)
    with display.fetch(f"fetching {card.name}") as on_progress:
        return find_weights(card, offline=offline, on_progress=on_progress)


@dataclass(frozen=True)
class Pulled:
    """A backbone whose weights were asked for.

    Attributes:
        name: its full name, or the name as given if it is unknown.
        path: the file on this machine; None if it could not be downloaded.
        was_here: whether the file was on this machine before.
        error: why there is no file.
    """

    name: str
    path: Path | None = None
    was_here: bool = False
    error: FinetuneError | None = None


def pull(names: Sequence[str], offline: bool, display: Display) -> list[Pulled]:
    """Download the weights of several backbones; a failure does not stop the others.

    Args:
        names: backbones, at least one.
        offline: only report what is on this machine.
        display: shows progress.
    """
    pulled = []
    for name in names:
        try:
            card = find_card(name, offline)
            if card.place == "none":
                raise UsageError(name, "no weights were published for it", "Choose another backbone.")
            was_here = find_cached(card) is not None
            pulled.append(Pulled(card.name, fetch(card, offline, display), was_here))
        except FinetuneError as error:
            error.asked = sanitize(f"pull {name}")
            pulled.append(Pulled(name, error=error))
    return pulled


# --- the default backbone ------------------------------------------------------------------------


_SHOWN = 3
"""Other backbones on this machine that are named in the message."""


def name_backbone(recipe: Recipe, output: Path | None, display: Display) -> Recipe:
    """Return the recipe with a backbone: the named one, that of a resumed run, or the best on this machine.

    Args:
        recipe: the recipe, perhaps without a backbone.
        output: the run folder, if one was named. A run that is resumed keeps its backbone and its weights,
            whatever has been downloaded since.
        display: shows the chosen backbone.

    Raises:
        UsageError: no backbone is named, but weights are, or the strategy trains from random weights.
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
        found = "no backbone was named for these weights"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, fix)
    if recipe.strategy.starts_random:
        found = (
            "no backbone was named, and the default depends on pretrained weights, which are not used here"
        )
        raise UsageError(f"--strategy {recipe.strategy.name}", found, fix)


def _read_begun(output: Path | None) -> BackboneSettings | None:
    """Return the backbone of the run in this folder; None if there is no run yet."""
    if output is None:
        return None
    began = RunReader(RunFolder(output), tolerant=True).recipe  # claiming the folder refuses a damaged recipe
    return began.backbone if began is not None and began.backbone.name else None


def _describe(choice: DefaultChoice) -> str:
    """Say why this backbone was chosen, and which others are on this machine."""
    reason = f"the best whose weights are on this machine ({choice.best.accuracy:.1f} % on ImageNet"
    is_alone = choice.best.card.place == "package" and not choice.skipped
    reason += "; `finetune pull NAME` fetches a larger one)" if is_alone else ")"
    if not choice.skipped:
        return reason
    shown = [f"{card.name} ({why})" for card, why in choice.skipped[:_SHOWN]]
    more = [f"{len(choice.skipped) - _SHOWN} more"] if len(choice.skipped) > _SHOWN else []
    return f"{reason}; also on this machine: {', '.join([*shown, *more])}"


# --- the network on its device -------------------------------------------------------------------


def prepare_machine(
    recipe: Recipe, display: Display, distributed: Distributed = SINGLE_PROCESS
) -> torch.device:
    """Set the number of threads and deterministic kernels, and return the device of this process."""
    set_deterministic(recipe.deterministic)
    device = resolve_device(recipe.device, distributed)
    if obstacle := explain_unused_gpu(recipe.device):
        display.warn(obstacle)
    torch.set_num_threads(resolve_threads(distributed.machine.size))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and pinned memory belong to the current one
    return device


def place_network(network: nn.Module, placement: Placement) -> nn.Module:
    """Move a network to its device and memory format, in place."""
    layout = torch.channels_last if placement.channels_last else torch.preserve_format
    return network.to(placement.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def resolve_preprocessing(recipe: Recipe, card: Card) -> Preprocessing:
    """Return the card's preprocessing with the values that the recipe sets.

    If the recipe alone wants an image squashed or padded, it wants to see all of it: nothing is cropped. Mean
    and deviation of bands are empty until they are measured, unless the recipe has them.

    Raises:
        UsageError: the network takes other channels, or there is not one mean and deviation for each.
    """
    own = card.preprocessing.to_dict()
    asked = {key: value for key, value in dict(recipe.input).items() if key in own and value != "auto"}
    if asked.get("resize", "crop") not in ("crop", own["resize"]):
        asked = {"crop_pct": 1.0} | asked
    view = _take_channels(card, asked.pop("channels", own["channels"]))
    view = replace(view, **asked)
    for key in ("mean", "std") if view.kind != "array" else ():
        number = len(getattr(view, key))
        if number != view.channels and (key in asked or view.is_rgb):
            found = f"it has {count(number, 'value')}, and the images have {count(view.channels, 'channel')}"
            raise UsageError(f"input.{key}", found, "Give one for each channel, or leave it out.")
    if view.kind == "bands" and asked.get("interpolation") == "lanczos":
        raise UsageError("input.interpolation=lanczos", "it is for 8-bit RGB only", "Take bicubic.")
    return view


def _take_channels(card: Card, channels: int | str) -> Preprocessing:
    """Return the preprocessing of a network that takes these channels."""
    view = card.preprocessing
    number = {"rgb": 3, "grey": 1}.get(str(channels), channels)
    is_own = view.kind == "bands" and channels != "rgb" and number == view.channels
    if is_own or channels == view.to_dict()["channels"]:
        return view
    if view.is_rgb and channels != "array":
        known = "bicubic" if view.interpolation == "lanczos" else view.interpolation  # no lanczos
        number = int(number)
        return replace(
            view, channels=number, kind="bands", interpolation=known, mean=(), std=(), value_range=None
        )
    takes = {"rgb": "RGB", "bands": count(view.channels, "channel"), "array": "arrays"}[view.kind]
    raise UsageError(
        f"--channels {channels}", f"the network takes {takes}", "Leave it out, or take another backbone."
    )


def take_channels(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return the recipe with the channels of arrays, if it says nothing and the network takes images."""
    shape, name = find_array_shape(dataset), recipe.backbone.name
    if recipe.input.channels != "auto" or shape is None:
        return recipe
    if name is not None and not find_card(name, recipe.backbone.offline).preprocessing.is_rgb:
        return recipe
    fitting = [number for number in count_channels(shape) if number <= MOST_CHANNELS]
    if not fitting:
        return recipe  # refused as arrays that no network of images takes
    return recipe.model_copy(update={"input": recipe.input.model_copy(update={"channels": fitting[0]})})


LEAST_SOURCE_CLASSES = 1_000
"""Smallest number of classes (ImageNet's) of a classifier that similarity is measured with. A classifier of
three classes called the same data different that ImageNet's calls similar."""


@dataclass(frozen=True)
class Network:
    """A pretrained network with its own classifier, on its device, and its layers by name."""

    backbone: Backbone
    placement: Placement
    layers: Layers

    @property
    def has_classifier(self) -> bool:
        """Whether its weights include a classifier of at least :data:`LEAST_SOURCE_CLASSES` classes."""
        match = self.backbone.match
        is_there = bool(match.head) and not match.head_replaced
        return is_there and self.backbone.card.num_classes >= LEAST_SOURCE_CLASSES

    def with_value_range(self, value_range: ValueRange | None) -> Network:
        """Return the same network with another range of values; None keeps its own."""
        if value_range is None:
            return self
        return replace(self, backbone=self.backbone.with_value_range(value_range))

    def find_layer(self, name: str, pool: Pool = "auto") -> Layer:
        """Return one layer by its name.

        Raises:
            UsageError: there is no such layer (the message lists similar names), the name is a pattern of
                several, or the pool does not fit.
        """
        layers = self.find_layers([name], pool)
        if len(layers) != 1:
            found = f"it matches {len(layers)} layers"
            raise UsageError(f"--layer {name}", found, "Name one layer (`finetune extract --layers list`).")
        return layers[0]

    def find_layers(self, names: Sequence[str], pool: Pool = "auto") -> tuple[Layer, ...]:
        """Return layers by names, keywords and patterns, each once (:mod:`pretrained.graph.layers`).

        Raises:
            UsageError: there is no such layer (the message lists similar names), or the pool does not fit.
        """
        try:
            return self.layers.select(names, pool)
        except UsageError as error:  # the original message speaks of --layers
            asked = error.asked.replace("--layers", "--layer")
            fix = error.fix.replace("`--layers list`", "`finetune extract --layers list`")
            raise UsageError(asked, error.found, fix.replace("--layers last", "--layer last")) from None

    @cached_property
    def weights(self) -> str:
        """The sha256 of all weights."""
        return digest_tensors(self.backbone.network, ())

    @cached_property
    def weights_below_head(self) -> str:
        """The sha256 of all weights but the head's: runs that replace the head share features by it."""
        last = self.backbone.stages[-1]
        if last.role != "head":
            return self.weights
        return digest_tensors(self.backbone.network, last.parameters, last.modules)


def open_network(recipe: Recipe, display: Display, distributed: Distributed = SINGLE_PROCESS) -> Network:
    """Load a network with its published weights and classifier, and find its layers.

    Raises:
        UsageError: there is no such network, or the weights do not fit it.
        EnvironmentFaultError: the weights are not on this machine and cannot be downloaded.
    """
    recipe = name_backbone(recipe, None, display)
    name = str(recipe.backbone.name)
    device = prepare_machine(recipe, display, distributed)
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
    for note in backbone.match.notes:
        display.warn(note)
    check_complete(backbone.match, backbone.match.missing, card)  # features are computed with all of them
    return Network(backbone, placement, layers)
