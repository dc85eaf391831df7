"""Where in a network an image's features still lie as in the image: the places that heat maps come from.

A place is a tensor that everything from the image to the logits passes (:mod:`pretrained.graph.cuts`), below
the classifier, with more than one position. The deepest counts; between the same two layers with weights it
is the one with the most positions (VGG's last convolution, and not the pooling after it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from pretrained.graph.classifier import classifier_layers
from pretrained.graph.cuts import Cut, Trace, find_cuts, trace_calls
from pretrained.graph.layers import count_prefix_tokens
from pretrained.graph.pooling import Form, find_form
from pretrained.graph.recorder import FeaturePoint
from pretrained.graph.structures import shapes_in

LEAST_SHARE = 0.5
"""Of the network's work, done at a place: what comes before knows edges and colours only. (Where branches run
side by side from early on, no later tensor is passed by everything.)"""


@dataclass(frozen=True)
class MapPosition:
    """A tensor of a network, and how its axes are to be read.

    Attributes:
        point: whose call gives or takes it.
        form: of the tensor; it has more than one position.
    """

    point: FeaturePoint
    form: Form


def find_map_positions(network: nn.Module, input_size: tuple[int, int, int]) -> Iterator[MapPosition]:
    """Yield places, the deepest first.

    Args:
        network: in eval mode; left as it is.
        input_size: (C, H, W) of the images.

    Raises:
        UsageError: a trial forward fails at that size.
    """
    trace = trace_calls(network, input_size)
    prefix, limit = count_prefix_tokens(network), _head_began(network, trace)
    cuts = [cut for cut in find_cuts(trace, ()) if cut.time <= limit and cut.share >= LEAST_SHARE]
    for _, same_depth in groupby(cuts, key=lambda cut: cut.depth):
        places = [
            (cut, form) for cut in same_depth if (form := _find_map(cut, input_size, prefix)) is not None
        ]
        if places:
            cut, form = max(places, key=lambda pair: (pair[1].num_positions, pair[0].time))
            yield MapPosition(cut.point, form)


def _head_began(network: nn.Module, trace: Trace) -> int:
    names = {module: name for name, module in network.named_modules()}
    wanted = {names[layer] for layer in classifier_layers(network)}
    return min((call.began for call in trace.calls if call.name in wanted), default=2**62)


def _find_map(cut: Cut, input_size: tuple[int, int, int], prefix: int) -> Form | None:
    """The form of what a cut carries; None where that is no single map, a row for each image.

    Windows that are folded into the batch axis lie in an order of the network's own.
    """
    shapes = [shape for shape in shapes_in(cut.carries) if shape.dtype.is_floating_point]
    if len(shapes) != 1 or shapes[0].growth[0] != 1:
        return None
    form = find_form(shapes[0].of(1), input_size, prefix)
    return form if form is not None and form.num_positions > 1 and 1 not in (form.size or ()) else None
