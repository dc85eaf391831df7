"""The data flow of a network: the tensors that every path passes, and the order in which weights are used.

A forward pass runs on a *meta replica*: the same tree of modules with weights on the meta device, so nothing
is computed and the network itself does not change. The autograd graph of that pass is then read backwards.

    image --> o --> o --+--> o --+--> o --> logits
              ^     ^   +--------+    ^
             cut   cut  (a residual)  cut

A *cut* is a tensor that every path from image to output goes through. The cuts divide the network into
*segments*; segment i ends at cut i. A parameter belongs to the first segment whose end depends on it.

Shapes: B batch, C channels, H W pixels, L tokens, D width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from finetune.errors import UsageError
from pretrained.graph.pooling import MAX_SKEW, skew
from pretrained.graph.recorder import observe_calls
from pretrained.graph.structures import tensors_in

TRACED_BATCH_SIZE = 2
"""With two images, tokens or windows that are folded into the batch axis can be recognised."""

Value: TypeAlias = tuple[Node, int]
"""A tensor of the autograd graph: the node that computed it, and the index among the node's outputs."""
Graph: TypeAlias = dict[Node, tuple[Value, ...]]
"""Each node with the values it reads; inputs come before outputs."""


@dataclass(frozen=True)
class Flow:
    """The data flow of one forward pass.

    Attributes:
        segments: for every parameter that an output depends on, by name, the segment that reads it first.
        grids: for every segment, the number of positions (H*W or L) of the tensor at its end; 0 for a plain
            vector ``(B, D)``.
        calls: for every module that was called, by name, the rank of its first call.
        is_classifier: whether an output is one vector per image, ``(B, K)``.
    """

    segments: Mapping[str, int]
    grids: tuple[int, ...]
    calls: Mapping[str, int]
    is_classifier: bool


def trace_flow(network: nn.Module, input_size: tuple[int, int, int]) -> Flow:
    """Trace one forward pass of ``network`` in eval mode on images of ``input_size`` (C, H, W).

    The network does not change.

    Raises:
        UsageError: the forward fails at that size, or no output depends on the image.
    """
    asked = f"the stages of {type(network).__name__} at input size {'x'.join(map(str, input_size))}"
    try:
        with ExitStack() as modes:
            # The caller's modes must have no effect; tensors that a forward creates must be on meta as well.
            for mode in (torch.inference_mode(False), torch.enable_grad(), torch.device("meta")):
                modes.enter_context(mode)
            replica = meta_replica(network)
            source, sinks, calls = _forward(replica, input_size)
    except Exception as error:  # the forward of any network may raise anything
        raise UsageError(asked, _reason(error), _FIX) from error
    graph = graph_of([node for node, _ in sinks])
    if source[0] not in graph:
        raise UsageError(asked, "none of its outputs depends on the image", _FIX)
    cuts = cut_values(graph, source, sinks)
    # The last segment ends at the outputs; it is empty if the output is itself a cut.
    ends = [*cuts, sinks[0]]
    return Flow(
        segments=_segments_of_parameters(replica, graph, [node for node, _ in cuts]),
        grids=tuple(grid_of(shape_of(value), input_size) for value in ends),
        calls=calls,
        is_classifier=any(_is_vector(shape_of(value)) for value in sinks),
    )


_FIX = (
    "Give the size (channels, height, width) that the network takes; its forward must run on a batch of "
    "images and return class scores."
)


def _reason(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"a trial forward failed with {type(error).__name__}: {first_line}"


# ---------------------------------------------------------------------------------------------- the replica


def meta_replica(network: nn.Module) -> nn.Module:
    """Return a copy of a network with weights on the meta device, in eval mode, that all require gradients.

    No tensor is copied, and neither are hooks that a user registered.
    """
    return replicate(network, _meta)


def replicate(network: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of a network in eval mode with other tensors, and without hooks that a user registered.

    Args:
        network: it does not change.
        replace: returns the tensor in place of a parameter, a buffer or another tensor of a module.
    """
    memo: dict[int, object] = {}
    for module in network.modules():
        memo |= {id(value): replace(value) for value in tensors_in(list(_state(module).values()))}
        memo |= {id(hooks): _torch_hooks(hooks) for hooks in _hook_tables(module)}
    replica = copy.deepcopy(network, memo).eval()
    disable_checkpointing = getattr(replica, "set_grad_checkpointing", None)
    if callable(disable_checkpointing):  # recomputation needs another pass, and its outputs are not used
        disable_checkpointing(False)
    return replica


def _state(module: nn.Module) -> dict[str, object]:
    """All attributes that may hold a tensor: parameters, buffers, and plain ones such as cached tables."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return {**plain, **module._parameters, **module._buffers}


def _meta(value: Tensor) -> Tensor:
    replica = torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(replica, requires_grad=replica.is_floating_point())
    return replica


def _hook_tables(module: nn.Module) -> Iterator[dict[int, object]]:
    return (
        table for key, table in vars(module).items() if key.endswith("_hooks") and isinstance(table, dict)
    )


def _torch_hooks(table: dict[int, object]) -> dict[int, object]:
    """Keep only the hooks of torch itself (weight_norm computes the weight in one), not those of a user."""
    kept = [(key, hook) for key, hook in table.items() if str(hook.__module__).startswith("torch.")]
    return type(table)(kept)


# ------------------------------------------------------------------------------------------- the forward


def _forward(
    replica: nn.Module, input_size: tuple[int, int, int]
) -> tuple[Value, list[Value], dict[str, int]]:
    """Run the replica once; return the values of image and outputs, and the rank of each first call."""
    calls: dict[str, int] = {}

    def note(name: str, _: object) -> None:
        calls.setdefault(name, len(calls))

    dtype = next((p.dtype for p in replica.parameters() if p.is_floating_point()), torch.float32)
    leaf = torch.empty(TRACED_BATCH_SIZE, *input_size, dtype=dtype, device="meta", requires_grad=True)
    image = leaf * 1  # a forward may begin with an in-place operation, which a leaf does not allow
    [source] = values_of([image])
    with observe_calls(dict(replica.named_modules()), before=note):
        sinks = values_of(tensors_in(replica(image)))
    return source, sinks, calls


def values_of(tensors: Iterable[Tensor]) -> list[Value]:
    """Return the graph values of these tensors; tensors without a gradient function are left out."""
    return [(tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None]


# --------------------------------------------------------------------------------------------- the graph


def graph_of(sinks: Iterable[Node]) -> Graph:
    """Return all nodes that ``sinks`` depend on, each after the nodes it reads (depth first, iterative)."""
    graph: Graph = {}
    inputs: Graph = {}
    stack = list(sinks)
    while stack:
        node = stack[-1]
        if node in inputs:
            graph.setdefault(stack.pop(), inputs[node])
            continue
        inputs[node] = tuple((parent, number) for parent, number in node.next_functions if parent is not None)
        stack.extend(parent for parent, _ in inputs[node] if parent not in inputs)
    return graph


def cut_values(graph: Graph, source: Value, sinks: list[Value]) -> list[Value]:
    """Return the values that every path from ``source`` to a sink passes, in topological order.

    In any topological order a node is on every path exactly if no edge skips it. This takes linear time and
    is exact, while the number of paths grows exponentially.
    """
    rank = downstream(graph, source[0])
    furthest = dict.fromkeys(rank, 0)  # rank of the last node that reads this one
    outputs: dict[Node, set[int]] = {node: set() for node in rank}  # which of its outputs are read
    for node, place in rank.items():
        for parent, number in graph[node]:
            if parent in rank:
                furthest[parent] = place
                outputs[parent].add(number)
    for node, number in sinks:
        if node in rank:
            furthest[node] = len(rank)
            outputs[node].add(number)
    cuts: list[Value] = []
    horizon = 0
    for node, place in rank.items():
        if horizon <= place and len(outputs[node]) == 1:
            cuts.append((node, next(iter(outputs[node]))))
        horizon = max(horizon, furthest[node])
    return cuts


def downstream(graph: Graph, source: Node) -> dict[Node, int]:
    """Return the nodes that depend on ``source``, with their rank in topological order."""
    rank = {source: 0}
    for node, inputs in graph.items():
        if any(parent in rank for parent, _ in inputs):
            rank.setdefault(node, len(rank))
    return rank


def _segments_of_parameters(replica: nn.Module, graph: Graph, cuts: list[Node]) -> dict[str, int]:
    """Return the first segment that reads each parameter, by one walk from the outputs backwards."""
    names = {id(parameter): name for name, parameter in replica.named_parameters()}
    own = {node: index for index, node in enumerate(cuts)}
    segment: dict[Node, int] = {}
    found: dict[str, int] = {}
    for node, inputs in reversed(graph.items()):
        here = own.get(node, segment.get(node, len(cuts)))
        for parent, _ in inputs:
            segment[parent] = min(here, segment.get(parent, here))
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            found[name] = here
    return {name: found[name] for name in names.values() if name in found}


# -------------------------------------------------------------------------------------------- the shapes


def shape_of(value: Value) -> tuple[int, ...]:
    """Return the shape of a tensor of the graph; ``()`` if a custom function does not provide it."""
    node, number = value
    described = getattr(node, "_input_metadata", ())  # an incoming gradient has the shape of the output
    return tuple(described[number].shape) if number < len(described) else ()


def _is_vector(shape: tuple[int, ...]) -> bool:
    return shape[:1] == (TRACED_BATCH_SIZE,) and sum(size > 1 for size in shape[1:]) <= 1


def grid_of(shape: tuple[int, ...], input_size: tuple[int, int, int]) -> int:
    """Return the number of positions per image of a tensor with a batch of two; 0 for a vector ``(B, D)``.

    Supports ``(B, C, H, W)``, ``(B, H, W, C)``, ``(B, windows, L, D)``, ``(B, L, D)``, and the same with
    windows or tokens folded into the batch axis, as in Swin and before linear layers.
    """
    if len(shape) <= 2:
        folded = shape[0] // TRACED_BATCH_SIZE if len(shape) == 2 else 0
        return folded if folded > 1 else 0
    inner = shape[1:-1]
    if len(shape) == 4:
        first, last = (skew(pair, input_size) for pair in (shape[1:3], shape[2:4]))
        inner = shape[2:4] if last <= min(first, MAX_SKEW) else shape[1:3]
    positions = shape[0] // TRACED_BATCH_SIZE
    for size in inner:
        positions *= size
    return positions
