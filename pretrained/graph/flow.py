"""How an image flows through a network: the tensors that everything passes, and the order of the weights.

The forward runs on a *meta twin*: the same tree of modules with weights that have a shape but no numbers, so
nothing is computed and the network itself is never touched. Its autograd graph is then read backwards.

    image --> o --> o --+--> o --+--> o --> logits
                ^    ^    +--------+    ^
               cut  cut   (a residual)  cut

A *cut* is a tensor that every path from image to output goes through. The cuts divide the network into
*segments*; segment i ends at cut i. A parameter belongs to the first segment whose end depends on it.

Shapes: B batch, C channels, H W pixels, L tokens, D width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from finetune.errors import UsageError
from pretrained.graph.pooling import TRUE_TO_FORM, skew
from pretrained.graph.recorder import observe_calls
from pretrained.graph.structures import tensors_in

BATCH = 2
"""Two images: enough to tell where tokens or windows are folded into the batch axis."""

Value: TypeAlias = tuple[Node, int]  # one tensor of the graph: what made it, and which of its outputs it is
Graph: TypeAlias = dict[Node, tuple[Value, ...]]  # every node with the values it reads, inputs before outputs


@dataclass(frozen=True)
class Flow:
    """What one forward tells.

    Attributes:
        segments: for every parameter that an output depends on, by name, the segment that reads it first.
        grids: for every segment, the number of positions (H*W or L) of the tensor at its end; 0 for a plain
            vector an image, ``(B, D)``.
        calls: for every module that was called, by name, the rank of its first call.
        is_classifier: whether an output is one vector an image, ``(B, K)``.
    """

    segments: Mapping[str, int]
    grids: tuple[int, ...]
    calls: Mapping[str, int]
    is_classifier: bool


def trace_flow(network: nn.Module, input_size: tuple[int, int, int]) -> Flow:
    """Trace one eval forward of ``network`` on images of ``input_size`` (C, H, W), without touching it.

    Raises:
        UsageError: the forward fails at that size, or no output depends on the image.
    """
    asked = f"the stages of {type(network).__name__} at input size {'x'.join(map(str, input_size))}"
    try:
        with ExitStack() as modes:
            # The caller's modes must not matter, and what a forward makes on the way must be on meta as well.
            for mode in (torch.inference_mode(False), torch.enable_grad(), torch.device("meta")):
                modes.enter_context(mode)
            twin = meta_twin(network)
            source, sinks, calls = _forward(twin, input_size)
    except Exception as error:  # whatever a stranger's forward raises
        raise UsageError(asked, _reason(error), _FIX) from error
    graph = graph_of([node for node, _ in sinks])
    if source[0] not in graph:
        raise UsageError(asked, "none of its outputs depends on the image", _FIX)
    cuts = cut_values(graph, source, sinks)
    # What follows the last cut (nothing, where the output is itself a cut) ends at the outputs.
    ends = [*cuts, sinks[0]]
    return Flow(
        segments=_segments_of_parameters(twin, graph, [node for node, _ in cuts]),
        grids=tuple(grid_of(_shape(value), input_size) for value in ends),
        calls=calls,
        is_classifier=any(_is_vector(_shape(value)) for value in sinks),
    )


_FIX = (
    "Give the size (channels, height, width) that the network takes; its forward must run on a batch of "
    "images and return class scores."
)


def _reason(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"a trial forward failed with {type(error).__name__}: {first_line}"


# ---------------------------------------------------------------------------------------------- the twin


def meta_twin(network: nn.Module) -> nn.Module:
    """The same modules with weights on the meta device, in eval mode, all of them requiring gradients.

    Nothing of the network is copied that is large, and no hook of its user comes along.
    """
    memo: dict[int, object] = {}
    for module in network.modules():
        memo |= {id(value): _meta(value) for value in tensors_in(list(_state(module).values()))}
        memo |= {id(hooks): _torch_hooks(hooks) for hooks in _hook_tables(module)}
    twin = copy.deepcopy(network, memo).eval()
    disable_checkpointing = getattr(twin, "set_grad_checkpointing", None)
    if callable(disable_checkpointing):  # recomputing has nothing to save here
        disable_checkpointing(False)
    return twin


def _state(module: nn.Module) -> dict[str, object]:
    """Everything that may hold a tensor: parameters, buffers, and plain attributes (a cached table, say)."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return {**plain, **module._parameters, **module._buffers}


def _meta(value: Tensor) -> Tensor:
    twin = torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(twin, requires_grad=twin.is_floating_point())
    return twin


def _hook_tables(module: nn.Module) -> Iterator[dict[int, object]]:
    return (
        table for key, table in vars(module).items() if key.endswith("_hooks") and isinstance(table, dict)
    )


def _torch_hooks(table: dict[int, object]) -> dict[int, object]:
    """Keep only torch's own hooks (weight_norm computes the weight in one); a user's might count or store."""
    kept = [(key, hook) for key, hook in table.items() if str(hook.__module__).startswith("torch.")]
    return type(table)(kept)


# ------------------------------------------------------------------------------------------- the forward


def _forward(twin: nn.Module, input_size: tuple[int, int, int]) -> tuple[Value, list[Value], dict[str, int]]:
    """Run the twin once; return the image, the outputs that depend on anything, and the order of calls."""
    calls: dict[str, int] = {}

    def note(name: str, _: object) -> None:
        calls.setdefault(name, len(calls))

    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    leaf = torch.empty(BATCH, *input_size, dtype=dtype, device="meta", requires_grad=True)
    image = leaf * 1  # a forward may begin with an operation in place, which a leaf forbids
    [source] = values_of([image])
    with observe_calls(dict(twin.named_modules()), before=note):
        sinks = values_of(tensors_in(twin(image)))
    return source, sinks, calls


def values_of(tensors: Iterable[Tensor]) -> list[Value]:
    """Return what the graph calls these tensors; those that depend on nothing are left out."""
    return [(tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None]


# --------------------------------------------------------------------------------------------- the graph


def graph_of(sinks: Iterable[Node]) -> Graph:
    """All nodes behind ``sinks``, each after the nodes it reads (depth first, without recursion)."""
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
    """The values that every path from ``source`` to a sink goes through, in the order of the flow.

    Walk the nodes in any order that respects the flow: a node is on every path exactly if no edge jumps over
    it. That is as exact as counting paths, and linear, where the counts themselves grow exponentially.
    """
    rank = downstream(graph, source[0])
    furthest = dict.fromkeys(rank, 0)  # the last node that reads this one
    outputs: dict[Node, set[int]] = {node: set() for node in rank}  # and which of its outputs are read
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
    """The nodes whose value depends on ``source``, ranked in the order of the flow."""
    rank = {source: 0}
    for node, inputs in graph.items():
        if any(parent in rank for parent, _ in inputs):
            rank.setdefault(node, len(rank))
    return rank


def _segments_of_parameters(twin: nn.Module, graph: Graph, cuts: list[Node]) -> dict[str, int]:
    """The first segment that reads each parameter, by one walk from the outputs back."""
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
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


def _shape(value: Value) -> tuple[int, ...]:
    """The shape of a tensor of the graph; ``()`` where a custom function does not tell."""
    node, number = value
    described = getattr(node, "_input_metadata", ())  # the gradient that comes in = the tensor that went out
    return tuple(described[number].shape) if number < len(described) else ()


def _is_vector(shape: tuple[int, ...]) -> bool:
    return shape[:1] == (BATCH,) and sum(size > 1 for size in shape[1:]) <= 1


def grid_of(shape: tuple[int, ...], input_size: tuple[int, int, int]) -> int:
    """The number of positions an image in a tensor of ``shape`` (batch of two); 0 for a vector ``(B, D)``.

    Understands ``(B, C, H, W)``, ``(B, H, W, C)``, ``(B, windows, L, D)``, ``(B, L, D)`` and the same with
    windows or tokens folded into the batch axis, as Swin and every linear layer do it.
    """
    if len(shape) <= 2:
        folded = shape[0] // BATCH if len(shape) == 2 else 0
        return folded if folded > 1 else 0
    inner = shape[1:-1]
    if len(shape) == 4:
        first, last = (skew(pair, input_size) for pair in (shape[1:3], shape[2:4]))
        inner = shape[2:4] if last <= min(first, TRUE_TO_FORM) else shape[1:3]
    positions = shape[0] // BATCH
    for size in inner:
        positions *= size
    return positions
