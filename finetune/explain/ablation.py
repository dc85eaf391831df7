"""Remove a block of a network without training it again: the block returns its input.

A block can be removed if it lies between two points that every path from the image to the logits passes, and
the tensors there have the same shape: a residual block, a block of a transformer, a convolution with as many
outputs as inputs. The residual connection is part of the block then; removing a branch inside it would leave
another network. Veit et al. (arXiv:1605.06431) removed the blocks of a ResNet in this way.

Shape legend: B batch, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pretrained.graph.cuts import Call, trace_calls
from pretrained.graph.flow import cut_values
from pretrained.graph.recorder import observe_calls
from pretrained.graph.structures import shapes_in

_LEAST_AXES = 2
"""A weight with fewer axes belongs to a normalisation, which is no block."""


@dataclass(frozen=True)
class Block:
    """A part of a network that can be removed.

    Attributes:
        name: of the module, as in ``network.named_modules()``.
        kind: its class.
        num_parameters: number of its parameters.
    """

    name: str
    kind: str
    num_parameters: int


def find_blocks(network: nn.Module, input_size: tuple[int, int, int]) -> list[Block]:
    """Return the blocks that can be removed, in the order of execution; there may be none.

    Args:
        network: in eval mode; it is not modified.
        input_size: (C, H, W) of its images.

    Raises:
        UsageError: a trial forward pass fails at that size.
    """
    trace = trace_calls(network, input_size)
    assert trace.source is not None
    passed = set(cut_values(trace.graph, trace.source, trace.sinks))
    calls = Counter(call.name for call in trace.calls)
    found = [
        call
        for call in trace.calls
        if call.name and calls[call.name] == 1 and _joins(call, passed) and _has_weights(network, call)
    ]
    return [_describe(network, call) for call in found if not any(_is_inside(other, call) for other in found)]


def _joins(call: Call, passed: set[Any]) -> bool:
    """Return whether a call leads from one point that all paths pass to another, of the same shape."""
    shapes = shapes_in(call.outputs)
    return (
        len(call.output_values) == 1
        and call.output_values[0] != call.input_value
        and {call.input_value, call.output_values[0]} <= passed
        and shapes == [call.argument]
    )


def _has_weights(network: nn.Module, call: Call) -> bool:
    return any(weight.ndim >= _LEAST_AXES for weight in network.get_submodule(call.name).parameters())


def _is_inside(inner: Call, outer: Call) -> bool:
    return outer.began < inner.began and inner.ended < outer.ended


def _describe(network: nn.Module, call: Call) -> Block:
    module = network.get_submodule(call.name)
    size = sum(parameter.numel() for parameter in module.parameters())
    return Block(call.name, type(module).__name__, size)


@contextmanager
def without_block(network: nn.Module, block: Block) -> Iterator[None]:
    """Let a block return its input while the context is open."""
    inputs: list[Tensor] = []

    def before(_: str, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].clone())  # the block may change it in place

    def after(_: str, __: object) -> Tensor:
        return inputs.pop()

    with observe_calls({block.name: network.get_submodule(block.name)}, before, after):
        yield
