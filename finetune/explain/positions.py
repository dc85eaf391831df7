"""Where in a network heat maps can be computed: tensors whose axes still correspond to the image.

Such a tensor is a cut: everything from the image to the logits passes through it
(:mod:`pretrained.graph.cuts`). It lies below the classifier and has more than one position. The deepest is
used; between the same two layers with weights, the one with the most positions (VGG's last convolution, not
the pooling after it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from finetune.errors import UsageError
from pretrained.graph.classifier import classifier_layers
from pretrained.graph.cuts import Cut, Trace, find_cuts, trace_calls
from pretrained.graph.layers import Layer, count_prefix_tokens
from pretrained.graph.pooling import Form, find_form
from pretrained.graph.recorder import FeaturePoint, FeatureRecorder
from pretrained.graph.structures import shapes_in, tensors_in

LEAST_SHARE = 0.5
"""Smallest share of the network's computation before the tensor: earlier features are edges and colours only.
(If branches run in parallel from early on, there is no later cut.)"""


@dataclass(frozen=True)
class MapPosition:
    """A tensor of a network, and the meaning of its axes.

    Attributes:
        point: the module call that returns or takes the tensor.
        form: the layout of the tensor, which has more than one position.
    """

    point: FeaturePoint
    form: Form


def find_map_positions(network: nn.Module, input_size: tuple[int, int, int]) -> Iterator[MapPosition]:
    """Yield the positions of heat maps in a network, the deepest first.

    Args:
        network: a network in eval mode; it is not modified.
        input_size: the shape (C, H, W) of the images.

    Raises:
        UsageError: a trial forward pass fails at that size.
    """
    trace = trace_calls(network, input_size)
    prefix, limit = count_prefix_tokens(network), _start_of_head(network, trace)
    cuts = [cut for cut in find_cuts(trace, ()) if cut.time <= limit and cut.share >= LEAST_SHARE]
    for _, same_depth in groupby(cuts, key=lambda cut: cut.depth):
        candidates = [
            (cut, form) for cut in same_depth if (form := _find_map(cut, input_size, prefix)) is not None
        ]
        if candidates:
            cut, form = max(candidates, key=lambda pair: (pair[1].num_positions, pair[0].time))
            yield MapPosition(cut.point, form)


def find_position(network: nn.Module, layer: Layer, input_size: tuple[int, int, int]) -> MapPosition:
    """Return the position of a layer that the user named.

    Args:
        network: a network in eval mode; it is not modified.
        layer: a layer of the network.
        input_size: the shape (C, H, W) of the images.

    Raises:
        UsageError: the layer is no map: it has a single position, several tensors, or windows in the batch
            axis, whose order depends on the network.
    """
    [found] = find_positions(network, [layer], input_size)
    if isinstance(found, str):
        fix = "Name a layer with two positions or more in each direction (`finetune extract --layers list`)."
        raise UsageError(f"--layer {layer.name}", found, fix)
    return found


@torch.no_grad()
def find_positions(
    network: nn.Module, layers: Sequence[Layer], input_size: tuple[int, int, int]
) -> list[MapPosition | str]:
    """Return the position of each layer, or why it is no map; one forward pass finds all.

    Args:
        network: a network in eval mode; it is not modified.
        layers: layers of the network.
        input_size: the shape (C, H, W) of the images.
    """
    weight = next(network.parameters())
    recorder = FeatureRecorder(network, [layer.point for layer in layers], [_count_windows for _ in layers])
    windows = recorder.record(weight.new_zeros(1, *input_size)) if layers else []
    refused = [_refuse(layer, number) for layer, number in zip(layers, windows, strict=True)]
    return [
        reason or MapPosition(layer.point, layer.forms[0])
        for layer, reason in zip(layers, refused, strict=True)
    ]


def _count_windows(value: Any) -> int:
    """Return the length of the first axis for one image."""
    return len(next(tensor for tensor in tensors_in(value) if tensor.is_floating_point()))


def _refuse(layer: Layer, num_windows: int) -> str:
    """Return why a layer is no map; empty if it is one."""
    if len(layer.forms) != 1:
        return f"it gives {len(layer.forms)} tensors, and not one map"
    if layer.forms[0].size is None or 1 in layer.forms[0].size:
        return f"it is no map: its features are {layer.size}"
    return "" if num_windows == 1 else f"it gives {num_windows} windows of an image, and not one map"


def has_single_cell(network: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Return whether the deep features have one position only at this size, since the images are small.

    Args:
        network: a network in eval mode, without a map at this size.
        input_size: the shape (C, H, W) of the images.
    """
    prefix = count_prefix_tokens(network)
    trace = trace_calls(network, input_size)
    limit = _start_of_head(network, trace)
    deep = [cut for cut in find_cuts(trace, ()) if cut.time <= limit and cut.share >= LEAST_SHARE]
    shapes = [shape.of(1) for cut in deep for shape in shapes_in(cut.carries)]
    forms = [find_form(shape, input_size, prefix) for shape in shapes]
    return any(form is not None and form.size == (1, 1) for form in forms)


def _start_of_head(network: nn.Module, trace: Trace) -> int:
    names = {module: name for name, module in network.named_modules()}
    wanted = {names[layer] for layer in classifier_layers(network)}
    return min((call.began for call in trace.calls if call.name in wanted), default=2**62)


def _find_map(cut: Cut, input_size: tuple[int, int, int], prefix: int) -> Form | None:
    """Return the layout of a cut's tensor; None if it is not a single map with one entry for each image.

    Windows that are folded into the batch axis are skipped: their order depends on the network.
    """
    shapes = [shape for shape in shapes_in(cut.carries) if shape.dtype.is_floating_point]
    if len(shapes) != 1 or shapes[0].growth[0] != 1:
        return None
    form = find_form(shapes[0].of(1), input_size, prefix)
    return form if form is not None and form.num_positions > 1 and 1 not in (form.size or ()) else None
