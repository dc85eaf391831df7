"""The layers of a network as a graph: what each reads, and the sizes of the tensors between them.

The graph is that of autograd on the meta device (:mod:`pretrained.graph.flow`), in which each operation is
attributed to the innermost module that was running. What a module without other modules computes is one node.
What a block computes itself is one node for each operation (an addition, a concatenation), but views and
rearrangements belong to the tensor that they rearrange. A normalisation or activation that is the only reader
of a layer shares its node.

::

    input --3x224x224--> features.0 Conv2d 3x3 + features.1 ReLU --64x224x224--> ...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from finetune.errors import UsageError
from pretrained.graph.costs import FusedAttention, describe_settings
from pretrained.graph.flow import Graph, Value, downstream, graph_of, meta_replica, shape_of, values_of
from pretrained.graph.recorder import observe_calls
from pretrained.graph.structures import tensors_in

_REARRANGES = re.compile(
    r"_?(Unsafe)?(View|ReshapeAlias|Permute|Transpose|T|Expand|Slice|Select|Unbind|Split|SplitWithSizes|Clone|"
    r"ToCopy|Unsqueeze|Squeeze|Alias|AsStrided|Roll|CopySlices|MoveDim|Index|Repeat|Unfold|Contiguous)"
    r"(Backward\d*)?"
)
_FOLLOWS = re.compile(r"(?i).*(norm|relu|gelu|silu|elu|swish|sigmoid|tanh|dropout|layer.?scale).*")
"""Kinds that share the node of the layer before them."""
_MOST_LINES = 4
_WORDS = {"cat": "concatenate", "mul": "multiply", "div": "divide", "sub": "subtract", "addmm": "linear"}


@dataclass
class LayerNode:
    """One or a few layers, or an operation of a block.

    Attributes:
        lines: a line for each layer: its name, class and settings.
        kind: class of the module, or name of the operation.
        is_layer: whether it is a module; otherwise it is an operation of a block, the input or the output.
    """

    lines: list[str]
    kind: str
    is_layer: bool


@dataclass(frozen=True)
class LayerEdge:
    """A tensor that a node reads.

    Attributes:
        source: index of the node that makes it.
        target: index of the node that reads it.
        size: its shape for one image, such as ``64x56x56``.
    """

    source: int
    target: int
    size: str


@dataclass(frozen=True)
class LayerGraph:
    """The layers of a network and the tensors between them.

    Attributes:
        nodes: in the order of execution; the first is the input, the last the output.
        edges: each leads from an earlier to a later node.
    """

    nodes: tuple[LayerNode, ...]
    edges: tuple[LayerEdge, ...]


def trace_layers(network: nn.Module, input_size: tuple[int, int, int]) -> LayerGraph:
    """Return the graph of a network's layers; the network does not change.

    Args:
        network: (B, C, H, W) -> logits, on any device.
        input_size: (C, H, W) of its images.

    Raises:
        UsageError: a forward pass fails at that size, or no output depends on the image.
    """
    asked = f"the graph of {type(network).__name__} at {input_size[1]} x {input_size[2]} pixels"
    with ExitStack() as modes:
        for mode in (torch.inference_mode(False), torch.enable_grad(), torch.device("meta")):
            modes.enter_context(mode)
        try:
            pass_ = _forward(meta_replica(network).requires_grad_(False), input_size)
        except Exception as error:  # the forward of any network may raise anything
            found = f"a trial forward failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            raise UsageError(asked, found, "Take another network.") from error
    if pass_.source[0] not in pass_.graph:
        raise UsageError(asked, "none of its outputs depends on the image", "Take another network.")
    groups = _group(pass_)
    return _to_graph(network, pass_, groups)


# --- tracing -------------------------------------------------------------------------------------


@dataclass
class _Call:
    """A call of a module; autograd numbers its nodes from ``began`` to before ``ended``."""

    name: str
    began: int
    ended: int = 0
    is_leaf: bool = True


@dataclass
class _Pass:
    """A forward pass: its calls, the outer before the inner, and its graph from the image on."""

    source: Value
    sinks: list[Value]
    calls: list[_Call]
    graph: Graph = field(default_factory=dict)


def _forward(replica: nn.Module, input_size: tuple[int, int, int]) -> _Pass:
    leaf = torch.empty(1, *input_size, requires_grad=True)
    image = leaf * 1  # a forward may begin with an in-place operation, which a leaf does not allow
    calls: list[_Call] = []
    stack: list[_Call] = []

    def before(name: str, _: object) -> None:
        if stack:
            stack[-1].is_leaf = False
        stack.append(_Call(name, _next_number()))
        calls.append(stack[-1])

    def after(name: str, _: object) -> None:
        call = stack.pop()
        while call.name != name:
            call = stack.pop()
        call.ended = _next_number()

    with FusedAttention(), observe_calls(dict(replica.named_modules()), before, after):
        output = replica(image)
    [source] = values_of([image])
    found = _Pass(source, values_of(tensors_in(output)), calls)
    found.graph = graph_of([node for node, _ in found.sinks])
    return found


def _next_number() -> int:
    """Return the number that autograd gives to the next node."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # torch exports it, not its stubs
    return number


# --- grouping ------------------------------------------------------------------------------------


def _group(pass_: _Pass) -> dict[Node, Node]:
    """Return the first node of the group of every node that depends on the image, in execution order."""
    order = sorted(downstream(pass_.graph, pass_.source[0]), key=lambda node: node._sequence_nr())
    owners = _find_owners(pass_, [node._sequence_nr() for node in order])
    first: dict[int, Node] = {}
    group: dict[Node, Node] = {}
    for node in order:
        owner = owners[node._sequence_nr()]
        if owner is not None and pass_.calls[owner].is_leaf:
            group[node] = first.setdefault(owner, node)
            continue
        read = {group[parent] for parent, _ in pass_.graph[node] if parent in group}
        joins = len(read) == 1 and _REARRANGES.fullmatch(node.name())
        group[node] = read.pop() if joins else node
    return group


def _find_owners(pass_: _Pass, numbers: Sequence[int]) -> dict[int, int | None]:
    """Return, for the number of each node, the index of the innermost call that made it."""
    owners: dict[int, int | None] = dict.fromkeys(numbers)
    for index, call in enumerate(pass_.calls):  # an inner call comes after the outer one
        owners |= {number: index for number in numbers if call.began <= number < call.ended}
    return owners


def _to_graph(network: nn.Module, pass_: _Pass, group: Mapping[Node, Node]) -> LayerGraph:
    owners = _find_owners(pass_, [node._sequence_nr() for node in group])
    edges = _find_edges(pass_, group)
    nodes = {node: _describe(network, pass_, node, owners) for node in dict.fromkeys(group.values())}
    nodes[pass_.source[0]] = LayerNode(["input"], "input", False)
    merged = _merge_followers(nodes, edges)
    kept = [node for node in nodes if merged[node] is node]
    index = {node: number for number, node in enumerate(kept)}
    drawn = {
        LayerEdge(index[merged[source]], index[merged[target]], size): None
        for source, target, size in edges
        if merged[source] is not merged[target]
    }
    ends = dict.fromkeys(
        LayerEdge(index[merged[group[node]]], len(kept), _size((node, number)))
        for node, number in pass_.sinks
        if node in group
    )
    return LayerGraph(
        (*(nodes[node] for node in kept), LayerNode(["output"], "output", False)), (*drawn, *ends)
    )


def _find_edges(pass_: _Pass, group: Mapping[Node, Node]) -> list[tuple[Node, Node, str]]:
    """Return the tensors that pass from group to group, each with its size."""
    found = {
        (group[parent], group[node], _size((parent, number))): None
        for node in group
        for parent, number in pass_.graph[node]
        if parent in group and group[parent] is not group[node]
    }
    return list(found)


def _size(value: Value) -> str:
    shape = shape_of(value)
    return "x".join(map(str, shape[1:] if shape[:1] == (1,) else shape))


def _describe(network: nn.Module, pass_: _Pass, node: Node, owners: Mapping[int, int | None]) -> LayerNode:
    owner = owners[node._sequence_nr()]
    if owner is None or not pass_.calls[owner].is_leaf:
        operation = _name_operation(node)
        return LayerNode([operation], operation, False)
    name = pass_.calls[owner].name
    module = network.get_submodule(name)
    kind = type(module).__name__
    words = [name, kind, describe_settings(module)]
    return LayerNode([" ".join(word for word in words if word)], kind, True)


def _name_operation(node: Node) -> str:
    """Return the name of an operation: ``add`` for ``AddBackward0``."""
    name = re.sub(r"Backward\d*$", "", node.name()).strip("_")
    if "Attention" in name:
        return "attention"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return _WORDS.get(words, words)


def _merge_followers(
    nodes: dict[Node, LayerNode], edges: Sequence[tuple[Node, Node, str]]
) -> dict[Node, Node]:
    """Give normalisations and activations to the layer that only they read; return where each node went."""
    readers: Counter[Any] = Counter(source for source, _, _ in edges)
    sources: dict[Node, list[Node]] = {node: [] for node in nodes}
    for source, target, _ in edges:
        sources[target].append(source)
    merged: dict[Node, Node] = {}
    for node, described in nodes.items():
        before = sources[node][0] if len(sources[node]) == 1 else None
        merged[node] = node
        if before is None or readers[before] != 1 or not _FOLLOWS.fullmatch(described.kind):
            continue
        into = nodes[merged[before]]
        if into.kind != "input" and len(into.lines) < _MOST_LINES:
            merged[node] = merged[before]
            into.lines.extend(described.lines)
    return merged
