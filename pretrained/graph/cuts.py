"""Find the points where a network can be cut in two: every path from the image to the logits passes them.

A forward pass of the meta replica (:mod:`pretrained.graph.flow`) records every call of a module with the
autograd values of its input and outputs. The network can be cut at a call if no path from the image to an
output bypasses its outputs (one tensor or several), or its first argument. A second forward pass with another
batch size shows how shapes depend on the batch size, and counts floating-point operations.

Shapes: B batch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.errors import UsageError
from pretrained.graph.flow import Graph, Value, cut_values, graph_of, meta_replica, values_of
from pretrained.graph.recorder import FeaturePoint, observe_calls
from pretrained.graph.structures import Shape, Structure, map_tensors, shapes_in, tensors_in

TRACED_BATCH_SIZES = (2, 3)
"""The shapes of other batch sizes are extrapolated linearly from these two."""
MAX_CUT_TENSORS = 16
"""A cut passes on at most this many tensors."""


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: name of the module, as in ``network.named_modules()``.
        number: how many calls of that module came before.
        began: time of its begin; begins and ends of calls are numbered consecutively.
        ended: time of its end.
        flops: floating-point operations of the forward pass per image, before the call and up to its end.
        outputs: shapes of what it returned.
        argument: shape of its first positional argument, if that is a tensor.
        input_value: the graph value of that argument.
        output_values: the graph values of the outputs.
    """

    name: str
    number: int
    began: int = 0
    ended: int = 0
    flops: tuple[int, int] = (0, 0)
    outputs: Structure = None
    argument: Shape | None = None
    input_value: Value | None = None
    output_values: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A point where the network can be cut.

    Attributes:
        call: the call whose outputs or first argument are on every path.
        at_input: the cut is at the first argument, otherwise at the outputs.
        carries: shapes of the tensors that the trunk passes on to the rest.
        share: the trunk's share of the network's floating-point operations, in [0, 1].
        depth: number of calls in the trunk of modules with parameters of their own.
    """

    call: Call
    at_input: bool
    carries: Structure
    share: float
    depth: int

    @property
    def point(self) -> FeaturePoint:
        """Where it is in a forward pass."""
        return FeaturePoint(self.call.name, self.call.number, self.at_input)

    @property
    def name(self) -> str:
        """``layer3``, or ``input of heads`` for an argument."""
        return str(self.point)

    @property
    def time(self) -> int:
        """Time at which the forward pass reaches the cut."""
        return self.call.began if self.at_input else self.call.ended

    @property
    def numel(self) -> int:
        """Number of elements per image that the trunk passes on."""
        return sum(shape.numel for shape in shapes_in(self.carries))


@dataclass
class Trace:
    """All calls of one forward pass in the order of their begin, and the autograd graph of its outputs."""

    calls: list[Call] = field(default_factory=list)
    graph: Graph = field(default_factory=dict)
    source: Value | None = None
    sinks: list[Value] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    flops: int = 0


# ------------------------------------------------------------------------------------------------ tracing


def trace_calls(network: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Trace forward passes of a network in eval mode; the network does not change.

    Raises:
        UsageError: shapes are not linear in the batch size, or the forward pass fails.
    """
    with ExitStack() as modes:
        for mode in (torch.inference_mode(False), torch.enable_grad(), torch.device("meta")):
            modes.enter_context(mode)
        try:
            trace = _trace(meta_replica(network), input_size)
            other = _trace_shapes(meta_replica(network), input_size)
            _merge(trace, other)
        except Exception as error:  # the forward of any network may raise anything
            asked = f"cutting {type(network).__name__} in two"
            fix = "Set cache.trunk to false; training goes through the whole network then."
            raise UsageError(asked, f"a trial forward failed: {error}", fix) from error
    return trace


def _trace(replica: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    trace = Trace()
    leaf = torch.empty(TRACED_BATCH_SIZES[0], *input_size, dtype=_dtype(replica), requires_grad=True)
    image = leaf * 1  # a forward may begin with an in-place operation, which a leaf does not allow
    with _record_calls(replica, trace, lambda: 0):
        logits = replica(image)
    [trace.source] = values_of([image])
    trace.sinks = values_of(tensors_in(logits))
    trace.graph = graph_of([node for node, _ in trace.sinks])
    trace.names = {id(parameter): name for name, parameter in replica.named_parameters()}
    return trace


def _trace_shapes(replica: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    trace = Trace()
    replica.requires_grad_(False)  # the counter fails on parameters that one module passes to another
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, _record_calls(replica, trace, counter.get_total_flops):
        replica(torch.empty(TRACED_BATCH_SIZES[1], *input_size, dtype=_dtype(replica)))
    trace.flops = counter.get_total_flops() // TRACED_BATCH_SIZES[1]
    return trace


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _record_calls(replica: nn.Module, trace: Trace, count: Callable[[], int]) -> Iterator[None]:
    """Add every call to ``trace`` while the block runs."""
    numbers: Counter[str] = Counter()
    open_calls: list[Call] = []
    clock = itertools.count()

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        call = Call(name, numbers[name], next(clock))
        numbers[name] += 1
        call.flops = (count(), 0)
        if arguments and isinstance(arguments[0], Tensor):
            call.argument = _shape_of(arguments[0])
            call.input_value = next(iter(values_of([arguments[0]])), None)
        trace.calls.append(call)
        open_calls.append(call)

    def after(name: str, outputs: Any) -> None:
        call = open_calls.pop()
        while call.name != name:  # it ended by an exception, as a forward pass that stops early does
            call = open_calls.pop()
        call.ended, call.flops = next(clock), (call.flops[0], count())
        call.outputs = map_tensors(_shape_of, outputs)
        call.output_values = tuple(values_of(tensors_in(outputs)))

    with observe_calls(dict(replica.named_modules()), before, after):
        yield


def _shape_of(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), (0,) * tensor.ndim, tensor.dtype)


def _merge(trace: Trace, other: Trace) -> None:
    """Add the shapes and operation counts of the second forward pass to the calls of the first."""
    for one, two in zip(trace.calls, other.calls, strict=True):
        if (one.name, one.number) != (two.name, two.number):
            raise ValueError("the modules that are called depend on the batch size")
        one.outputs = _merge_shapes(one.outputs, shapes_in(two.outputs))
        if one.argument is not None and two.argument is not None:
            one.argument = _linear_shape(one.argument, two.argument)
        one.flops = (two.flops[0] // TRACED_BATCH_SIZES[1], two.flops[1] // TRACED_BATCH_SIZES[1])
    trace.flops = other.flops


def _merge_shapes(structure: Structure, others: list[Shape]) -> Structure:
    remaining = iter(others)
    return map_tensors(lambda shape: _linear_shape(shape, next(remaining)), structure)


def _linear_shape(one: Shape, two: Shape) -> Shape:
    """The shape for any batch size, linear through the shapes of two."""
    growth = tuple(b - a for a, b in zip(one.growth, two.growth, strict=True))
    fixed = tuple(a - slope * TRACED_BATCH_SIZES[0] for a, slope in zip(one.growth, growth, strict=True))
    if min(fixed, default=0) < 0:
        raise ValueError(f"a shape is not linear in the batch size: {one.growth}, {two.growth}")
    return Shape(growth, fixed, one.dtype)


# --------------------------------------------------------------------------------------------------- cuts


def find_cuts(trace: Trace, trained: Collection[str]) -> list[Cut]:
    """Return the cuts whose trunk has no trained parameter, best first.

    The deepest come first; among cuts between the same two layers, which save the same work, the one that
    passes on the fewest elements comes first.

    Args:
        trace: trace of the network.
        trained: names of the trained parameters.
    """
    if trace.source is None or trace.source[0] not in trace.graph:
        return []
    passed = set(cut_values(trace.graph, trace.source, trace.sinks))
    trained_nodes = _trained_nodes(trace, trained)
    owners = {name.rpartition(".")[0] for name in trace.names.values()}
    weighted_ends = sorted(call.ended for call in trace.calls if call.name in owners)
    found = []
    for values, cut in _candidates(trace, weighted_ends):
        per_image = all(shape.is_per_image for shape in shapes_in(cut.carries))
        if not per_image or not cut.depth or any(node in trained_nodes for node, _ in values):
            continue
        if values <= passed or (1 < len(values) <= MAX_CUT_TENSORS and _separates(trace, values)):
            found.append(cut)
    return sorted(found, key=lambda cut: (-cut.depth, cut.numel, cut.time))


def _candidates(trace: Trace, weighted_ends: Sequence[int]) -> Iterator[tuple[frozenset[Value], Cut]]:
    """Yield each set of values that a call takes or returns, with the point where it can be recorded and fed.

    That point is the outermost call that returns the values and began before another call read them; if there
    is none, the first call that reads the value.
    """
    readers: dict[Value, Call] = {}
    makers: dict[frozenset[Value], list[Call]] = {}
    returned: set[Value] = set()
    for call in trace.calls:
        if call.input_value is not None:
            readers.setdefault(call.input_value, call)
        makers.setdefault(frozenset(call.output_values), []).append(call)
    for values, calls in makers.items():
        first_read = min((readers[value].began for value in values if value in readers), default=2**62)
        before = [call for call in calls if call.began < first_read]
        if values and before and trace.source not in values:
            returned |= values if len(values) == 1 else set()
            call = max(before, key=lambda one: one.ended)
            share = call.flops[1] / max(trace.flops, 1)
            depth = sum(end <= call.ended for end in weighted_ends)
            yield values, Cut(call, False, call.outputs, share, depth)
    for value, call in readers.items():
        if value != trace.source and value not in returned:
            share = call.flops[0] / max(trace.flops, 1)
            depth = sum(end < call.began for end in weighted_ends)
            yield frozenset([value]), Cut(call, True, call.argument, share, depth)


def _trained_nodes(trace: Trace, trained: Collection[str]) -> set[Any]:
    """The nodes of the graph that depend on a trained parameter."""
    trained_nodes = set()
    for node, inputs in trace.graph.items():
        name = trace.names.get(id(getattr(node, "variable", None)))
        if name in trained or any(parent in trained_nodes for parent, _ in inputs):
            trained_nodes.add(node)
    return trained_nodes


def _separates(trace: Trace, values: Collection[Value]) -> bool:
    """Whether every path from the image to an output passes one of these values."""
    stack = [sink for sink in trace.sinks if sink not in values]
    seen = set(stack)
    while stack:
        value = stack.pop()
        if value == trace.source:
            return False
        for parent in trace.graph.get(value[0], ()):
            if parent not in seen and parent not in values:
                seen.add(parent)
                stack.append(parent)
    return True
