"""The layers whose feature maps are looked at, by the names that a user gives."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import UsageError
from finetune.explain.positions import MapPosition, find_position, find_positions
from finetune.features.network import Network
from finetune.recipe.flags import split_words
from pretrained.graph.layers import Layer

_WILD = "*?["


def find_map_layers(network: Network, names: str) -> dict[str, MapPosition]:
    """Return layers by name, in the order in which they were named.

    Args:
        network: the network.
        names: stages, modules, keywords and patterns, separated by commas. What ``all`` or a pattern
            matches that is no feature map is left out.

    Raises:
        UsageError: there is no such layer (the message lists similar names), or it is no feature map.
    """
    model, size = network.backbone.network, network.backbone.card.preprocessing.input_size
    found: dict[str, MapPosition] = {}
    for name in split_words(names):
        layers = network.find_layers([name])
        if name == "all" or any(character in name for character in _WILD):
            found |= _keep_maps(network, layers)
        else:
            found |= {layer.name: find_position(model, layer, size) for layer in layers}
    if not found:
        fix = "Name a layer with two positions or more in each direction (`finetune extract --layers list`)."
        raise UsageError(f"--layer {names}", "none of these layers is a feature map", fix)
    return found


def find_map_layer(network: Network, name: str | None) -> tuple[str, MapPosition]:
    """Return one layer and its name.

    Args:
        network: the network.
        name: a stage or a module; None for the last stage that is a feature map.

    Raises:
        UsageError: there is no such layer (the message lists similar names), it is no feature map, or none
            of the stages is one.
    """
    if name is not None:
        return next(iter(find_map_layers(network, network.find_layer(name).name).items()))
    stages = _keep_maps(network, network.layers.stages)
    if not stages:
        fix = "Take larger images (--img-size), or name a module with --layer."
        raise UsageError(f"the stages of {network.backbone.card.name}", "none is a feature map", fix)
    return list(stages.items())[-1]


def find_all(network: Network) -> tuple[dict[str, MapPosition], list[str]]:
    """Return the modules with a window, convolutions and poolings, and the stages, in order of execution.

    Returns:
        Those whose output is a feature map, by name; and the names of the stages among them.
    """
    modules, stages = dict(network.backbone.network.named_modules()), network.layers.stages
    layers = {
        name: layer
        for name, layer in network.layers.modules().items()
        if hasattr(modules[name], "kernel_size")
    }
    layers |= {layer.name: layer for layer in stages}
    found = _keep_maps(network, sorted(layers.values(), key=lambda layer: layer.share))
    return found, [layer.name for layer in stages if layer.name in found]


def _keep_maps(network: Network, layers: Sequence[Layer]) -> dict[str, MapPosition]:
    model, size = network.backbone.network, network.backbone.card.preprocessing.input_size
    positions = find_positions(model, layers, size)
    return {
        layer.name: position
        for layer, position in zip(layers, positions, strict=True)
        if isinstance(position, MapPosition)
    }
