"""Where a network can be cut in two: the module calls that everything from the image to the logits passes.

A forward of the meta twin (:mod:`pretrained.graph.flow`) notes every call of a module, and which tensors of
the autograd graph went in and came out. A call is a *place to cut* when no path from the image to an output
goes around its outputs (one tensor or several), or around its first argument. A second forward, of another
number of images, tells how shapes grow with the batch, and counts the multiplications done so far.

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
from pretrained.graph.flow import Graph, Value, cut_values, graph_of, meta_twin, values_of
from pretrained.graph.recorder import FeaturePoint, observe_calls
from pretrained.graph.structures import Shape, Structure, map_tensors, shapes_in, tensors_in

BATCHES = (2, 3)
"""Numbers of images that are traced; shapes in between and beyond follow in a straight line."""
MOST_TENSORS = 16
"""That a cut may carry."""


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: of the module, as in ``network.named_modules()``.
        number: how many calls of that module came before.
        began: on the clock of the forward.
        ended: on the same clock.
        multiplied: multiplications and additions of the forward before it and up to its end, by image.
        outputs: what it returned.
        argument: its first positional argument, where that is a tensor.
        came: the tensor of the graph that the argument is.
        went: the tensors of the graph that it returned.
    """

    name: str
    number: int
    began: int = 0
    ended: int = 0
    multiplied: tuple[int, int] = (0, 0)
    outputs: Structure = None
    argument: Shape | None = None
    came: Value | None = None
    went: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A place to cut.

    Attributes:
        call: the call whose outputs, or whose first argument, everything passes.
        at_input: it is the argument.
        carries: what goes from the trunk to the rest.
        share: of the network's multiplications that the trunk does, in [0, 1].
        depth: how many calls with parameters of their own the trunk makes.
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
        """When it is reached."""
        return self.call.began if self.at_input else self.call.ended

    @property
    def numel(self) -> int:
        """Numbers that it carries for one image."""
        return sum(shape.numel for shape in shapes_in(self.carries))


@dataclass
class Trace:
    """All calls of one forward in the order in which they began, and the graph behind its outputs."""

    calls: list[Call] = field(default_factory=list)
    graph: Graph = field(default_factory=dict)
    source: Value | None = None
    sinks: list[Value] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    flops: int = 0


# ------------------------------------------------------------------------------------------------ tracing


def trace_calls(network: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Trace eval forwards of a network, without touching it.

    Raises:
        UsageError: shapes do not grow with the batch in a straight line, or the forward fails.
    """
    with ExitStack() as modes:
        for mode in (torch.inference_mode(False), torch.enable_grad(), torch.device("meta")):
            modes.enter_context(mode)
        try:
            trace = _trace(meta_twin(network), input_size)
            other = _trace_shapes(meta_twin(network), input_size)
            _merge(trace, other)
        except Exception as error:  # whatever a stranger's forward raises
            asked = f"cutting {type(network).__name__} in two"
            fix = "Set cache.trunk to false; training goes through the whole network then."
            raise UsageError(asked, f"a trial forward failed: {error}", fix) from error
    return trace


def _trace(twin: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    trace = Trace()
    leaf = torch.empty(BATCHES[0], *input_size, dtype=_dtype(twin), requires_grad=True)
    image = leaf * 1  # a forward may begin with an operation in place, which a leaf forbids
    with _noted(twin, trace, lambda: 0):
        logits = twin(image)
    [trace.source] = values_of([image])
    trace.sinks = values_of(tensors_in(logits))
    trace.graph = graph_of([node for node, _ in trace.sinks])
    trace.names = {id(parameter): name for name, parameter in twin.named_parameters()}
    return trace


def _trace_shapes(twin: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    trace = Trace()
    twin.requires_grad_(False)  # the counter stumbles over parameters that are handed from module to module
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, _noted(twin, trace, counter.get_total_flops):
        twin(torch.empty(BATCHES[1], *input_size, dtype=_dtype(twin)))
    trace.flops = counter.get_total_flops() // BATCHES[1]
    return trace


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _noted(twin: nn.Module, trace: Trace, count: Callable[[], int]) -> Iterator[None]:
    """Note every call while the block runs."""
    numbers: Counter[str] = Counter()
    open_calls: list[Call] = []
    clock = itertools.count()

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        call = Call(name, numbers[name], next(clock))
        numbers[name] += 1
        call.multiplied = (count(), 0)
        if arguments and isinstance(arguments[0], Tensor):
            call.argument = _shape_of(arguments[0])
            call.came = next(iter(values_of([arguments[0]])), None)
        trace.calls.append(call)
        open_calls.append(call)

    def after(name: str, outputs: Any) -> None:
        call = open_calls.pop()
        while call.name != name:  # left by an exception, as a forward that knows enough leaves
            call = open_calls.pop()
        call.ended, call.multiplied = next(clock), (call.multiplied[0], count())
        call.outputs, call.went = map_tensors(_shape_of, outputs), tuple(values_of(tensors_in(outputs)))

    with observe_calls(dict(twin.named_modules()), before, after):
        yield


def _shape_of(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), (0,) * tensor.ndim, tensor.dtype)


def _merge(trace: Trace, other: Trace) -> None:
    """Put what the second forward tells into the calls of the first."""
    for one, two in zip(trace.calls, other.calls, strict=True):
        if (one.name, one.number) != (two.name, two.number):
            raise ValueError("other modules are called for another number of images")
        one.outputs = _merge_shapes(one.outputs, shapes_in(two.outputs))
        if one.argument is not None and two.argument is not None:
            one.argument = _line(one.argument, two.argument)
        one.multiplied = (two.multiplied[0] // BATCHES[1], two.multiplied[1] // BATCHES[1])
    trace.flops = other.flops


def _merge_shapes(structure: Structure, others: list[Shape]) -> Structure:
    remaining = iter(others)
    return map_tensors(lambda shape: _line(shape, next(remaining)), structure)


def _line(one: Shape, two: Shape) -> Shape:
    """The straight line through the shapes of two batches."""
    grows = tuple(b - a for a, b in zip(one.grows, two.grows, strict=True))
    fixed = tuple(a - slope * BATCHES[0] for a, slope in zip(one.grows, grows, strict=True))
    if min(fixed, default=0) < 0:
        raise ValueError(f"a shape does not grow with the batch in a straight line: {one.grows}, {two.grows}")
    return Shape(grows, fixed, one.dtype)


# --------------------------------------------------------------------------------------------------- cuts


def find_cuts(trace: Trace, trained: Collection[str]) -> list[Cut]:
    """Return the places above everything that learns, the best first.

    The deepest come first, and of those between the same two layers the one that carries the fewest
    numbers, since all of them save the same work.

    Args:
        trace: of the network.
        trained: names of the parameters that learn; none of them is above a cut.
    """
    if trace.source is None or trace.source[0] not in trace.graph:
        return []
    passed = set(cut_values(trace.graph, trace.source, trace.sinks))
    tainted = _tainted(trace, trained)
    owners = {name.rpartition(".")[0] for name in trace.names.values()}
    weighty = sorted(call.ended for call in trace.calls if call.name in owners)
    found = []
    for values, cut in _places(trace, weighty):
        by_image = all(shape.is_by_image for shape in shapes_in(cut.carries))
        if not by_image or not cut.depth or any(node in tainted for node, _ in values):
            continue
        if values <= passed or (1 < len(values) <= MOST_TENSORS and _is_passed(trace, values)):
            found.append(cut)
    return sorted(found, key=lambda cut: (-cut.depth, cut.numel, cut.time))


def _places(trace: Trace, weighty: Sequence[int]) -> Iterator[tuple[frozenset[Value], Cut]]:
    """Each set of tensors that goes in or out somewhere, with the one place where it can be taken and given.

    That is the outermost call that returns it and began before another one read it; where there is none, the
    first call that reads it.
    """
    readers: dict[Value, Call] = {}
    makers: dict[frozenset[Value], list[Call]] = {}
    returned: set[Value] = set()
    for call in trace.calls:
        if call.came is not None:
            readers.setdefault(call.came, call)
        makers.setdefault(frozenset(call.went), []).append(call)
    for values, calls in makers.items():
        first_read = min((readers[value].began for value in values if value in readers), default=2**62)
        before = [call for call in calls if call.began < first_read]
        if values and before and trace.source not in values:
            returned |= values if len(values) == 1 else set()
            call = max(before, key=lambda one: one.ended)
            share = call.multiplied[1] / max(trace.flops, 1)
            yield values, Cut(call, False, call.outputs, share, sum(end <= call.ended for end in weighty))
    for value, call in readers.items():
        if value != trace.source and value not in returned:
            share = call.multiplied[0] / max(trace.flops, 1)
            depth = sum(end < call.began for end in weighty)
            yield frozenset([value]), Cut(call, True, call.argument, share, depth)


def _tainted(trace: Trace, trained: Collection[str]) -> set[Any]:
    """The nodes of the graph that a learning parameter has a part in."""
    tainted = set()
    for node, inputs in trace.graph.items():
        name = trace.names.get(id(getattr(node, "variable", None)))
        if name in trained or any(parent in tainted for parent, _ in inputs):
            tainted.add(node)
    return tainted


def _is_passed(trace: Trace, values: Collection[Value]) -> bool:
    """Whether no path from an output back to the image goes around these tensors."""
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
