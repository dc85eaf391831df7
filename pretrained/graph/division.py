"""Find the head among a network's parameters, divide the others into parts, and fold many parts into few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from typing import Literal, TypeAlias

from torch import Tensor, nn

from pretrained.graph.flow import Flow

Role: TypeAlias = Literal["stem", "body", "neck", "head"]

FEWEST = 3
"""Fewer parts than this before the neck, the stem included, say too little about depth."""
MOST = 8
"""More parts than this after the stem are folded."""
QUARTERS = 4
"""Where nothing but depth tells like blocks apart, they are folded into this many stages."""

_COARSER = 1.5  # a grid with 1.5 times fewer positions is another one; a class token or a lost border is not
_PATCHES = 12.0  # a first layer that leaves 12 times fewer positions cuts patches: a stem of its own


@dataclass(frozen=True)
class Draft:
    """A stage before it has a name."""

    role: Role
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Parameters that stay together, and the grid of the tensor they end in (0 for a vector)."""

    parameters: tuple[str, ...]
    grid: int


Division: TypeAlias = tuple[list[Part], tuple[str, ...]]  # stem and body, and the parameters of the neck


# ------------------------------------------------------------------------------------ the parameters


class Anatomy:
    """What is known of a network's parameters: shapes, owners, and their place in the flow."""

    def __init__(self, network: nn.Module, flow: Flow) -> None:
        self.network, self.flow = network, flow
        self.shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        self.containers = {
            name for name, module in network.named_modules() if next(module.children(), None) is not None
        }

    @cached_property
    def used(self) -> list[str]:
        """The parameters that an output depends on, in the order of the flow."""
        return sorted(self.flow.segments, key=self.order)

    def order(self, name: str) -> tuple[int, int]:
        """When a parameter is first used: by segment, then by the first call of the module around it."""
        calls = self.flow.calls
        called = (calls[module] for module in ancestors(name) if module in calls)
        return self.flow.segments[name], next(called, 0)

    def holds_weight(self, names: Iterable[str]) -> bool:
        """Whether a matrix is among them; norms, biases, scales, tokens and position tables are none."""
        shapes = (self.shapes[name] for name in names)
        return any(shape[0] > 1 and sum(size > 1 for size in shape) > 1 for shape in shapes if shape)

    def grid(self, names: Sequence[str]) -> int:
        """The coarsest grid that the weights among ``names`` leave; a pooled tensor counts where all are.

        Blocks that begin on a finer grid, or are grouped with a layer behind the pooling, are so told right.
        """
        weights = [name for name in names if self.holds_weight([name])] or names
        grids = {self.flow.grids[self.flow.segments[name]] for name in weights}
        return min((grid for grid in grids if grid > 1), default=max(grids))


def ancestors(name: str) -> Iterator[str]:
    """The dotted names above ``name``, nearest first, the root ``""`` last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def owner(name: str) -> str:
    """The module that holds a parameter, by name."""
    return name.rpartition(".")[0]


def find_head(anatomy: Anatomy) -> set[str]:
    """The classifier's parameters: declared by the network, else the last layer executed."""
    declared = getattr(anatomy.network, "get_classifier", None)
    if callable(declared):
        held = {id(parameter) for module in _modules_in(declared()) for parameter in module.parameters()}
        head = {name for name, parameter in anatomy.network.named_parameters() if id(parameter) in held}
        return head | _used_after(anatomy, head)
    return _last_layer(anatomy) if anatomy.flow.is_classifier else set()


def _modules_in(item: object) -> Iterator[nn.Module]:
    if isinstance(item, nn.Module):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _modules_in(part)


def _used_after(anatomy: Anatomy, head: set[str]) -> set[str]:
    """What is first used after the head began: it makes class scores too (VOLO's second classifier)."""
    began = min((anatomy.order(name) for name in anatomy.used if name in head), default=None)
    return {name for name in anatomy.used if began is not None and anatomy.order(name) > began}


def _last_layer(anatomy: Anatomy) -> set[str]:
    """The last executed module that holds a weight, and whatever is used after it (a scale of the logits)."""
    used = anatomy.used
    last = next((name for name in reversed(used) if anatomy.holds_weight([name])), None)
    if last is None:
        return set()
    after = used[used.index(last) :]
    return {name for name in used if owner(name) == owner(last) or name in after}


# --------------------------------------------------------------------------------------- the division


def divide(
    anatomy: Anatomy, head: frozenset[str], labels: Labels | None, input_size: tuple[int, int, int]
) -> Division:
    """Divide what an output depends on, head apart, into at most ``MOST`` + 1 ordered parts and a neck."""
    used = [name for name in anatomy.used if name not in head]
    pixels = input_size[1] * input_size[2]
    if labels is not None:
        parts, neck = _divide_by_label(anatomy, used, labels)
        if FEWEST <= len(parts) <= MOST + 1:
            return parts, neck
        if len(parts) > MOST + 1:
            return _fold(parts, pixels), neck
    layers, neck = _split_neck(_layers(anatomy, used))
    return _fold_layers(layers, pixels), neck


@dataclass(frozen=True)
class Labels:
    """timm's coarse group of every parameter; ``rest`` is that of what no rule matched (norm, neck, head)."""

    of: Mapping[str, int]
    rest: int


_NO_PARAMETER = "?"  # no rule can match it, so its group is the group of whatever is not matched


def timm_labels(network: nn.Module) -> Labels | None:
    """What the network's own ``group_matcher`` says, ``None`` where it has none or it fails."""
    matcher = getattr(network, "group_matcher", None)
    if not callable(matcher):
        return None
    from timm.models import group_parameters

    try:
        return _read_labels(network, matcher(coarse=True), group_parameters)
    except Exception:  # rdnet asserts that coarse groups are not implemented; others may fail otherwise
        return None


def _read_labels(network: nn.Module, matcher: object, group: Callable[..., dict[str, int]]) -> Labels:
    """Apply a matcher of timm, with one more name that tells the group of what is not matched."""

    class Named:
        def named_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
            yield from network.named_parameters()
            yield _NO_PARAMETER, None

    labels = dict(group(Named(), matcher, reverse=True))
    return Labels(rest=labels.pop(_NO_PARAMETER), of=labels)


def _divide_by_label(anatomy: Anatomy, used: Sequence[str], labels: Labels) -> Division:
    """One part a label, ordered by first use; what no rule matched goes by its place in the flow."""
    groups: dict[int, list[str]] = {}
    for name in used:  # in the order of the flow, so the groups come in it as well
        if labels.of[name] != labels.rest:
            groups.setdefault(labels.of[name], []).append(name)
    unmatched = [name for name in used if labels.of[name] == labels.rest]
    if not groups:
        return [], ()
    last = max(anatomy.order(name) for names in groups.values() for name in names)
    for name in unmatched:
        if anatomy.order(name) <= last:
            _group_at(anatomy, groups, name).append(name)
    after = [name for name in unmatched if anatomy.order(name) > last]
    # A norm after the last block belongs to it; from the first matrix on it is a neck.
    norms = list(takewhile(lambda name: not anatomy.holds_weight([name]), after))
    groups[next(reversed(groups))].extend(norms)
    parts = [Part(tuple(names), anatomy.grid(names)) for names in groups.values()]
    return _join_weightless(anatomy, parts), tuple(after[len(norms) :])


def _group_at(anatomy: Anatomy, groups: Mapping[int, list[str]], name: str) -> list[str]:
    """The last group that begins no later than ``name`` is used."""
    begun = [names for names in groups.values() if anatomy.order(names[0]) <= anatomy.order(name)]
    return begun[-1] if begun else next(iter(groups.values()))


def _layers(anatomy: Anatomy, used: Sequence[str]) -> list[Part]:
    """The smallest parts that data flow tells apart: one a segment, each with a weight."""
    segments = groupby(used, key=lambda name: anatomy.flow.segments[name])
    parts = [Part(tuple(names), anatomy.flow.grids[segment]) for segment, names in segments]
    return _join_weightless(anatomy, parts)


def _join_weightless(anatomy: Anatomy, parts: Sequence[Part]) -> list[Part]:
    """Let norms and tokens join the part before; a norm that opens a module (of several) the part after."""
    joined: list[Part] = []
    ahead: tuple[str, ...] = ()
    for place, part in enumerate(parts):
        following = parts[place + 1] if place + 1 < len(parts) else None
        if anatomy.holds_weight(part.parameters):
            joined.append(Part(ahead + part.parameters, part.grid))
            ahead = ()
        elif following and (not joined or _opens(anatomy, part, joined[-1], following)):
            ahead += part.parameters
        elif joined:
            joined[-1] = replace(joined[-1], parameters=joined[-1].parameters + part.parameters)
        else:  # nothing but norms
            joined.append(part)
    return joined


def _opens(anatomy: Anatomy, part: Part, before: Part, after: Part) -> bool:
    """Whether a layer (not a token of a container) is nearer in the module tree to what follows."""
    first = part.parameters[0]
    return owner(first) not in anatomy.containers and kinship(first, after) > kinship(first, before)


def kinship(name: str, part: Part) -> int:
    """How many modules above ``name`` are also above a parameter of ``part``."""
    above = set(ancestors(name))
    return max(len(above.intersection(ancestors(other))) for other in part.parameters)


def _split_neck(layers: list[Part]) -> Division:
    """Take off the layers on plain vectors that come after the last grid (none, if there is no grid)."""
    ends = [place + 1 for place, layer in enumerate(layers) if layer.grid]
    end = ends[-1] if ends else len(layers)
    return layers[:end], tuple(name for layer in layers[end:] for name in layer.parameters)


# ---------------------------------------------------------------------------------------------- folding


def _fold_layers(layers: Sequence[Part], pixels: int) -> list[Part]:
    """Fold single layers by modules, as high in the tree as still shows every change of the grid.

    So no block is torn apart (an inverted residual widens on the old grid and goes on on the new one), and
    where the grid hardly changes there are enough modules left to share out.
    """
    runs = len(_fold_by_grid(layers, pixels))
    for depth in range(1, 1 + max((len(_branch(layer)) for layer in layers), default=0)):
        blocks = [_merge(list(run)) for _, run in groupby(layers, key=lambda layer: _branch(layer)[:depth])]
        enough = len(_fold_by_grid(blocks, pixels)) >= runs if runs >= FEWEST else len(blocks) > QUARTERS
        if enough:
            return _fold(blocks, pixels)
    return _fold(layers, pixels)


def _branch(layer: Part) -> list[str]:
    return owner(layer.parameters[0]).split(".")


def _fold(parts: Sequence[Part], pixels: int) -> list[Part]:
    """Fold ordered parts by grid; where the grid hardly changes, the stem and equal shares of the others."""
    by_grid = _fold_by_grid(parts, pixels)
    if FEWEST <= len(by_grid) <= MOST:
        return by_grid
    blocks = parts[1:]
    shares = min(QUARTERS, len(blocks))
    bounds = [len(blocks) * share // shares for share in range(shares + 1)] if shares else []
    return [*parts[:1], *(_merge(blocks[low:high]) for low, high in pairwise(bounds))]


def _fold_by_grid(parts: Sequence[Part], pixels: int) -> list[Part]:
    """Merge neighbours that work on about the same grid; a stem that cuts patches stays alone."""
    runs: list[list[Part]] = []
    for part in parts:
        if not runs or _is_patches(runs, pixels) or not _alike(runs[-1][-1].grid, part.grid):
            runs.append([])
        runs[-1].append(part)
    return [_merge(run) for run in runs]


def _is_patches(runs: Sequence[Sequence[Part]], pixels: int) -> bool:
    return len(runs) == len(runs[0]) == 1 and pixels >= _PATCHES * max(runs[0][0].grid, 1)


def _alike(one: int, other: int) -> bool:
    return max(one, other) < _COARSER * max(min(one, other), 1)


def _merge(parts: Sequence[Part]) -> Part:
    return Part(tuple(name for part in parts for name in part.parameters), parts[-1].grid)
