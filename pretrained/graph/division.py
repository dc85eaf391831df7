"""Find the head among a network's parameters, divide the others into parts, and merge many parts into few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from typing import Literal, TypeAlias

from torch import Tensor, nn

from pretrained.graph.flow import Flow

Role: TypeAlias = Literal["stem", "body", "neck", "head"]

MIN_PARTS = 3
"""Fewer parts than this before the neck, including the stem, distinguish too little by depth."""
MAX_PARTS = 8
"""More parts than this after the stem are merged."""
NUM_EQUAL_PARTS = 4
"""Blocks that differ in depth only are merged into this many stages."""

_GRID_RATIO = 1.5
"""Grids differ if one has 1.5 times as many positions; a class token or a lost border makes no new grid."""
_PATCH_RATIO = 12.0
"""A first layer that reduces the positions by this factor embeds patches, and is a stem of its own."""


@dataclass(frozen=True)
class StageDraft:
    """A stage before it has a name."""

    role: Role
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Parameters that stay together, and the number of positions of their last tensor (0 for a vector)."""

    parameters: tuple[str, ...]
    grid: int


Division: TypeAlias = tuple[list[Part], tuple[str, ...]]
"""The parts of stem and body, and the parameters of the neck."""


# ------------------------------------------------------------------------------------ the parameters


class ParameterInfo:
    """The parameters of a network: their shapes, their modules, and their order in the data flow."""

    def __init__(self, network: nn.Module, flow: Flow) -> None:
        self.network, self.flow = network, flow
        self.shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        self.containers = {
            name for name, module in network.named_modules() if next(module.children(), None) is not None
        }

    @cached_property
    def used(self) -> list[str]:
        """The parameters that an output depends on, in the order of the data flow."""
        return sorted(self.flow.segments, key=self.order)

    def order(self, name: str) -> tuple[int, int]:
        """Sort key of the first use of a parameter: its segment, then the first call of its module."""
        calls = self.flow.calls
        called = (calls[module] for module in ancestors(name) if module in calls)
        return self.flow.segments[name], next(called, 0)

    def holds_weight(self, names: Iterable[str]) -> bool:
        """Whether one is a weight matrix or kernel, and not a norm, bias, scale, token or position table."""
        shapes = (self.shapes[name] for name in names)
        return any(shape[0] > 1 and sum(size > 1 for size in shape) > 1 for shape in shapes if shape)

    def grid(self, names: Sequence[str]) -> int:
        """The coarsest grid of the tensors behind the weights among ``names``.

        Pooled tensors (one position) count only if there are no others. So a block has the right grid also if
        it begins on a finer one, or is grouped with a layer behind the pooling.
        """
        weights = [name for name in names if self.holds_weight([name])] or names
        grids = {self.flow.grids[self.flow.segments[name]] for name in weights}
        return min((grid for grid in grids if grid > 1), default=max(grids))


def ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules that contain ``name``, innermost first, the root ``""`` last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def owner(name: str) -> str:
    """Return the name of the module that holds a parameter."""
    return name.rpartition(".")[0]


def find_head(info: ParameterInfo) -> set[str]:
    """Return the classifier's parameters: those that the network declares, else those of the last layer."""
    declared = getattr(info.network, "get_classifier", None)
    if callable(declared):
        held = {id(parameter) for module in _modules_in(declared()) for parameter in module.parameters()}
        head = {name for name, parameter in info.network.named_parameters() if id(parameter) in held}
        return head | _used_after(info, head)
    return _last_layer(info) if info.flow.is_classifier else set()


def _modules_in(item: object) -> Iterator[nn.Module]:
    if isinstance(item, nn.Module):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _modules_in(part)


def _used_after(info: ParameterInfo, head: set[str]) -> set[str]:
    """Parameters first used after the first one of the head: they compute logits too (VOLO)."""
    began = min((info.order(name) for name in info.used if name in head), default=None)
    return {name for name in info.used if began is not None and info.order(name) > began}


def _last_layer(info: ParameterInfo) -> set[str]:
    """Parameters of the last module with a weight, and those used after it (a scale of the logits)."""
    used = info.used
    last = next((name for name in reversed(used) if info.holds_weight([name])), None)
    if last is None:
        return set()
    after = used[used.index(last) :]
    return {name for name in used if owner(name) == owner(last) or name in after}


# --------------------------------------------------------------------------------------- the division


def divide(
    info: ParameterInfo, head: frozenset[str], labels: Labels | None, input_size: tuple[int, int, int]
) -> Division:
    """Divide the used parameters without the head into at most ``MAX_PARTS`` + 1 ordered parts and a neck."""
    used = [name for name in info.used if name not in head]
    pixels = input_size[1] * input_size[2]
    if labels is not None:
        parts, neck = _divide_by_label(info, used, labels)
        if MIN_PARTS <= len(parts) <= MAX_PARTS + 1:
            return parts, neck
        if len(parts) > MAX_PARTS + 1:
            return _merge_to_few(parts, pixels), neck
    layers, neck = _split_neck(_layers(info, used))
    return _merge_layers(layers, pixels), neck


@dataclass(frozen=True)
class Labels:
    """timm's coarse group of every parameter; ``rest`` is the group of unmatched ones (norm, neck, head)."""

    of: Mapping[str, int]
    rest: int


_NO_PARAMETER = "?"
"""A name that no rule matches: timm puts it into the group of unmatched parameters."""


def timm_labels(network: nn.Module) -> Labels | None:
    """Return the groups of the network's own ``group_matcher``, None if it has none or it fails."""
    matcher = getattr(network, "group_matcher", None)
    if not callable(matcher):
        return None
    from timm.models import group_parameters

    try:
        return _read_labels(network, matcher(coarse=True), group_parameters)
    except Exception:  # rdnet raises AssertionError for coarse groups; other networks may fail in other ways
        return None


def _read_labels(network: nn.Module, matcher: object, group: Callable[..., dict[str, int]]) -> Labels:
    """Apply a matcher of timm, with one additional name to find the group of unmatched parameters."""

    class Named:
        def named_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
            yield from network.named_parameters()
            yield _NO_PARAMETER, None

    labels = dict(group(Named(), matcher, reverse=True))
    return Labels(rest=labels.pop(_NO_PARAMETER), of=labels)


def _divide_by_label(info: ParameterInfo, used: Sequence[str], labels: Labels) -> Division:
    """One part per label, ordered by first use; unmatched parameters are placed by the data flow."""
    groups: dict[int, list[str]] = {}
    for name in used:  # in the order of the data flow, which is then also that of the groups
        if labels.of[name] != labels.rest:
            groups.setdefault(labels.of[name], []).append(name)
    unmatched = [name for name in used if labels.of[name] == labels.rest]
    if not groups:
        return [], ()
    last = max(info.order(name) for names in groups.values() for name in names)
    for name in unmatched:
        if info.order(name) <= last:
            _group_at(info, groups, name).append(name)
    after = [name for name in unmatched if info.order(name) > last]
    # A norm after the last block belongs to that block; from the first weight on, the rest is a neck.
    norms = list(takewhile(lambda name: not info.holds_weight([name]), after))
    groups[next(reversed(groups))].extend(norms)
    parts = [Part(tuple(names), info.grid(names)) for names in groups.values()]
    return _join_weightless(info, parts), tuple(after[len(norms) :])


def _group_at(info: ParameterInfo, groups: Mapping[int, list[str]], name: str) -> list[str]:
    """The last group whose first use is not after that of ``name``."""
    begun = [names for names in groups.values() if info.order(names[0]) <= info.order(name)]
    return begun[-1] if begun else next(iter(groups.values()))


def _layers(info: ParameterInfo, used: Sequence[str]) -> list[Part]:
    """The smallest parts that the data flow distinguishes: one per segment, each with a weight."""
    segments = groupby(used, key=lambda name: info.flow.segments[name])
    parts = [Part(tuple(names), info.flow.grids[segment]) for segment, names in segments]
    return _join_weightless(info, parts)


def _join_weightless(info: ParameterInfo, parts: Sequence[Part]) -> list[Part]:
    """Merge norms and tokens into the part before them; a norm that begins a block into the part after."""
    joined: list[Part] = []
    ahead: tuple[str, ...] = ()
    for place, part in enumerate(parts):
        following = parts[place + 1] if place + 1 < len(parts) else None
        if info.holds_weight(part.parameters):
            joined.append(Part(ahead + part.parameters, part.grid))
            ahead = ()
        elif following and (not joined or _opens(info, part, joined[-1], following)):
            ahead += part.parameters
        elif joined:
            joined[-1] = replace(joined[-1], parameters=joined[-1].parameters + part.parameters)
        else:  # nothing but norms
            joined.append(part)
    return joined


def _opens(info: ParameterInfo, part: Part, before: Part, after: Part) -> bool:
    """Whether a layer (not a token of a container) is closer to the following part in the module tree."""
    first = part.parameters[0]
    is_closer = num_shared_ancestors(first, after) > num_shared_ancestors(first, before)
    return is_closer and owner(first) not in info.containers


def num_shared_ancestors(name: str, part: Part) -> int:
    """Return how many modules that contain ``name`` also contain a parameter of ``part``."""
    above = set(ancestors(name))
    return max(len(above.intersection(ancestors(other))) for other in part.parameters)


def _split_neck(layers: list[Part]) -> Division:
    """Separate the layers on vectors after the last grid; there are none if no layer has a grid."""
    ends = [place + 1 for place, layer in enumerate(layers) if layer.grid]
    end = ends[-1] if ends else len(layers)
    return layers[:end], tuple(name for layer in layers[end:] for name in layer.parameters)


# ---------------------------------------------------------------------------------------------- merging


def _merge_layers(layers: Sequence[Part], pixels: int) -> list[Part]:
    """Merge layers by module, at the highest level of the module tree that still shows all changes of grid.

    This keeps blocks whole (an inverted residual begins on the old grid and continues on the new one), and
    leaves enough modules to distribute if the grid hardly changes.
    """
    runs = len(_merge_by_grid(layers, pixels))
    for depth in range(1, 1 + max((len(_branch(layer)) for layer in layers), default=0)):
        blocks = [_merge(list(run)) for _, run in groupby(layers, key=lambda layer: _branch(layer)[:depth])]
        num_runs = len(_merge_by_grid(blocks, pixels))
        if num_runs >= runs if runs >= MIN_PARTS else len(blocks) > NUM_EQUAL_PARTS:
            return _merge_to_few(blocks, pixels)
    return _merge_to_few(layers, pixels)


def _branch(layer: Part) -> list[str]:
    return owner(layer.parameters[0]).split(".")


def _merge_to_few(parts: Sequence[Part], pixels: int) -> list[Part]:
    """Merge ordered parts by grid; if it hardly changes, keep the stem and merge others in equal shares."""
    by_grid = _merge_by_grid(parts, pixels)
    if MIN_PARTS <= len(by_grid) <= MAX_PARTS:
        return by_grid
    blocks = parts[1:]
    shares = min(NUM_EQUAL_PARTS, len(blocks))
    bounds = [len(blocks) * share // shares for share in range(shares + 1)] if shares else []
    return [*parts[:1], *(_merge(blocks[low:high]) for low, high in pairwise(bounds))]


def _merge_by_grid(parts: Sequence[Part], pixels: int) -> list[Part]:
    """Merge neighbours on about the same grid; a stem that embeds patches stays separate."""
    runs: list[list[Part]] = []
    for part in parts:
        if not runs or _is_patches(runs, pixels) or not _is_same_grid(runs[-1][-1].grid, part.grid):
            runs.append([])
        runs[-1].append(part)
    return [_merge(run) for run in runs]


def _is_patches(runs: Sequence[Sequence[Part]], pixels: int) -> bool:
    return len(runs) == len(runs[0]) == 1 and pixels >= _PATCH_RATIO * max(runs[0][0].grid, 1)


def _is_same_grid(one: int, other: int) -> bool:
    return max(one, other) < _GRID_RATIO * max(min(one, other), 1)


def _merge(parts: Sequence[Part]) -> Part:
    return Part(tuple(name for part in parts for name in part.parameters), parts[-1].grid)
