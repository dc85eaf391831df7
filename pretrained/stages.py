"""The stages of any network, from stem to head: the parts that are frozen or given a learning rate together.

The order is that of the data (:mod:`pretrained.flow`), never of names or of registration. The labels come
from timm's own ``group_matcher`` where there is one, else from the grid that a layer works on:

    resnet18   conv1 | layer1 | layer2 | layer3 | layer4 | head
    vgg16      features.0-2 | features.5-7 | ... | features.24-28 | neck (fc6, fc7) | head
    vit_tiny   patch_embed | blocks.0-2 | blocks.3-5 | blocks.6-8 | blocks.9-11 | head

A network of many like blocks is folded, so that a stage means about the same on every backbone.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from typing import Literal, TypeAlias

from torch import Tensor, nn

from finetune.errors import UsageError, suggest
from pretrained.flow import Flow, trace_flow

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
class Stage:
    """One stage of a network.

    Attributes:
        name: unique in its network: ``layer4``, ``blocks.9-11``, ``neck``, ``head``.
        role: the first stage is the ``stem``; a ``neck`` stands between the last grid and the ``head``.
        parameters: names as in ``network.named_parameters()``.
        modules: names, as in ``network.named_modules()``, of the modules that live wholly in this stage.
    """

    name: str
    role: Role
    parameters: tuple[str, ...]
    modules: tuple[str, ...]


def find_stages(
    network: nn.Module, input_size: tuple[int, int, int], head: Collection[str] | None = None
) -> tuple[Stage, ...]:
    """Divide ``network`` into ordered stages; every parameter is in exactly one.

    Args:
        network: a network of timm, of torchvision or of anybody, on any device; it is left as it was.
        input_size: channels, height and width of the pictures it takes.
        head: names of the head's parameters; found when not given.

    Returns:
        Stem first, head last. A network without a classifier has no head, one without parameters no stages.

    Raises:
        UsageError: a trial forward fails at ``input_size``, or ``head`` names what is no parameter.
    """
    _check_names(network, head)
    flow = trace_flow(network, input_size)
    anatomy = _Anatomy(network, flow)
    heads = frozenset(_find_head(anatomy) if head is None else head)
    labels = _timm_labels(network)
    body, neck = _divide(anatomy, heads, labels, input_size)
    drafts = _drafts(body, neck, tuple(name for name in anatomy.shapes if name in heads))
    drafts = _with_unused(anatomy, drafts, labels)
    modules = _assign_modules(anatomy, drafts)
    names = _name_stages(anatomy, drafts)
    return tuple(
        Stage(name, draft.role, draft.parameters, tuple(held))
        for name, draft, held in zip(names, drafts, modules, strict=True)
    )


def _check_names(network: nn.Module, head: Collection[str] | None) -> None:
    known = [name for name, _ in network.named_parameters()]
    for name in sorted(set(head or ()) - set(known)):
        raise UsageError(
            f"the head parameter {name!r} of {type(network).__name__}",
            f"there is no such parameter{suggest(name, known)}",
            "Give names as network.named_parameters() lists them.",
        )


class _Anatomy:
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
        called = (calls[module] for module in _ancestors(name) if module in calls)
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


def _ancestors(name: str) -> Iterator[str]:
    """The dotted names above ``name``, nearest first, the root ``""`` last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


# --------------------------------------------------------------------------------------------- the head


def _find_head(anatomy: _Anatomy) -> set[str]:
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


def _used_after(anatomy: _Anatomy, head: set[str]) -> set[str]:
    """What is first used after the head began: it makes class scores too (VOLO's second classifier)."""
    began = min((anatomy.order(name) for name in anatomy.used if name in head), default=None)
    return {name for name in anatomy.used if began is not None and anatomy.order(name) > began}


def _last_layer(anatomy: _Anatomy) -> set[str]:
    """The last executed module that holds a weight, and whatever is used after it (a scale of the logits)."""
    used = anatomy.used
    last = next((name for name in reversed(used) if anatomy.holds_weight([name])), None)
    if last is None:
        return set()
    after = used[used.index(last) :]
    return {name for name in used if _owner(name) == _owner(last) or name in after}


# --------------------------------------------------------------------------------------------- the body


@dataclass(frozen=True)
class _Part:
    """Parameters that stay together, and the grid of the tensor they end in (0 for a vector)."""

    parameters: tuple[str, ...]
    grid: int


_Division: TypeAlias = tuple[list[_Part], tuple[str, ...]]  # stem and body, and the parameters of the neck


def _divide(
    anatomy: _Anatomy, head: frozenset[str], labels: _Labels | None, input_size: tuple[int, int, int]
) -> _Division:
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
class _Labels:
    """timm's coarse group of every parameter; ``rest`` is that of what no rule matched (norm, neck, head)."""

    of: Mapping[str, int]
    rest: int


_NO_PARAMETER = "?"  # no rule can match it, so its group is the group of whatever is not matched


def _timm_labels(network: nn.Module) -> _Labels | None:
    """What the network's own ``group_matcher`` says, ``None`` where it has none or it fails."""
    matcher = getattr(network, "group_matcher", None)
    if not callable(matcher):
        return None
    from timm.models import group_parameters

    try:
        return _read_labels(network, matcher(coarse=True), group_parameters)
    except Exception:  # rdnet asserts that coarse groups are not implemented; others may fail otherwise
        return None


def _read_labels(network: nn.Module, matcher: object, group: Callable[..., dict[str, int]]) -> _Labels:
    """Apply a matcher of timm, with one more name that tells the group of what is not matched."""

    class Named:
        def named_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
            yield from network.named_parameters()
            yield _NO_PARAMETER, None

    labels = dict(group(Named(), matcher, reverse=True))
    return _Labels(rest=labels.pop(_NO_PARAMETER), of=labels)


def _divide_by_label(anatomy: _Anatomy, used: Sequence[str], labels: _Labels) -> _Division:
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
    parts = [_Part(tuple(names), anatomy.grid(names)) for names in groups.values()]
    return _join_weightless(anatomy, parts), tuple(after[len(norms) :])


def _group_at(anatomy: _Anatomy, groups: Mapping[int, list[str]], name: str) -> list[str]:
    """The last group that begins no later than ``name`` is used."""
    begun = [names for names in groups.values() if anatomy.order(names[0]) <= anatomy.order(name)]
    return begun[-1] if begun else next(iter(groups.values()))


def _layers(anatomy: _Anatomy, used: Sequence[str]) -> list[_Part]:
    """The smallest parts that data flow tells apart: one a segment, each with a weight."""
    segments = groupby(used, key=lambda name: anatomy.flow.segments[name])
    parts = [_Part(tuple(names), anatomy.flow.grids[segment]) for segment, names in segments]
    return _join_weightless(anatomy, parts)


def _join_weightless(anatomy: _Anatomy, parts: Sequence[_Part]) -> list[_Part]:
    """Let norms and tokens join the part before; a norm that opens a module (of several) the part after."""
    joined: list[_Part] = []
    ahead: tuple[str, ...] = ()
    for place, part in enumerate(parts):
        following = parts[place + 1] if place + 1 < len(parts) else None
        if anatomy.holds_weight(part.parameters):
            joined.append(_Part(ahead + part.parameters, part.grid))
            ahead = ()
        elif following and (not joined or _opens(anatomy, part, joined[-1], following)):
            ahead += part.parameters
        elif joined:
            joined[-1] = replace(joined[-1], parameters=joined[-1].parameters + part.parameters)
        else:  # nothing but norms
            joined.append(part)
    return joined


def _opens(anatomy: _Anatomy, part: _Part, before: _Part, after: _Part) -> bool:
    """Whether a layer (not a token of a container) is nearer in the module tree to what follows."""
    first = part.parameters[0]
    return _owner(first) not in anatomy.containers and _kinship(first, after) > _kinship(first, before)


def _kinship(name: str, part: _Part) -> int:
    """How many modules above ``name`` are also above a parameter of ``part``."""
    above = set(_ancestors(name))
    return max(len(above.intersection(_ancestors(other))) for other in part.parameters)


def _split_neck(layers: list[_Part]) -> _Division:
    """Take off the layers on plain vectors that come after the last grid (none, if there is no grid)."""
    ends = [place + 1 for place, layer in enumerate(layers) if layer.grid]
    end = ends[-1] if ends else len(layers)
    return layers[:end], tuple(name for layer in layers[end:] for name in layer.parameters)


# ---------------------------------------------------------------------------------------------- folding


def _fold_layers(layers: Sequence[_Part], pixels: int) -> list[_Part]:
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


def _branch(layer: _Part) -> list[str]:
    return _owner(layer.parameters[0]).split(".")


def _fold(parts: Sequence[_Part], pixels: int) -> list[_Part]:
    """Fold ordered parts by grid; where the grid hardly changes, the stem and equal shares of the others."""
    by_grid = _fold_by_grid(parts, pixels)
    if FEWEST <= len(by_grid) <= MOST:
        return by_grid
    blocks = parts[1:]
    shares = min(QUARTERS, len(blocks))
    bounds = [len(blocks) * share // shares for share in range(shares + 1)] if shares else []
    return [*parts[:1], *(_merge(blocks[low:high]) for low, high in pairwise(bounds))]


def _fold_by_grid(parts: Sequence[_Part], pixels: int) -> list[_Part]:
    """Merge neighbours that work on about the same grid; a stem that cuts patches stays alone."""
    runs: list[list[_Part]] = []
    for part in parts:
        if not runs or _is_patches(runs, pixels) or not _alike(runs[-1][-1].grid, part.grid):
            runs.append([])
        runs[-1].append(part)
    return [_merge(run) for run in runs]


def _is_patches(runs: Sequence[Sequence[_Part]], pixels: int) -> bool:
    return len(runs) == len(runs[0]) == 1 and pixels >= _PATCHES * max(runs[0][0].grid, 1)


def _alike(one: int, other: int) -> bool:
    return max(one, other) < _COARSER * max(min(one, other), 1)


def _merge(parts: Sequence[_Part]) -> _Part:
    return _Part(tuple(name for part in parts for name in part.parameters), parts[-1].grid)


# --------------------------------------------------------------------------------------------- the drafts


@dataclass(frozen=True)
class _Draft:
    """A stage before it has a name."""

    role: Role
    parameters: tuple[str, ...]


def _drafts(body: Sequence[_Part], neck: tuple[str, ...], head: tuple[str, ...]) -> list[_Draft]:
    drafts = [_Draft("body", part.parameters) for part in body]
    if drafts:
        drafts[0] = replace(drafts[0], role="stem")
    ends: tuple[tuple[Role, tuple[str, ...]], ...] = (("neck", neck), ("head", head))
    return drafts + [_Draft(role, names) for role, names in ends if names]


def _with_unused(anatomy: _Anatomy, drafts: Sequence[_Draft], labels: _Labels | None) -> list[_Draft]:
    """Give what no output depends on (mask tokens, auxiliary heads) to its kin."""
    place = {name: index for index, draft in enumerate(drafts) for name in draft.parameters}
    lost = [name for name in anatomy.shapes if name not in place]
    if lost and not drafts:
        return [_Draft("stem", tuple(lost))]
    place |= {name: _place_of_kin(name, place, labels) for name in lost}
    return [
        replace(draft, parameters=tuple(name for name in anatomy.shapes if place[name] == index))
        for index, draft in enumerate(drafts)
    ]


def _place_of_kin(name: str, place: Mapping[str, int], labels: _Labels | None) -> int:
    """The stage of timm's label, else of the nearest module above ``name`` that is in one, else the stem."""
    if labels is not None and labels.of[name] != labels.rest:
        for other, index in place.items():
            if labels.of[other] == labels.of[name]:
                return index
    for module in takewhile(bool, _ancestors(name)):
        for other, index in place.items():
            if other.startswith(f"{module}."):
                return index
    return 0


# --------------------------------------------------------------------------------------------- the modules


def _assign_modules(anatomy: _Anatomy, drafts: Sequence[_Draft]) -> list[list[str]]:
    """The modules of every stage. Those without parameters follow the module around them, else the calls."""
    parameters = dict(anatomy.network.named_parameters())
    place = {id(parameters[name]): index for index, draft in enumerate(drafts) for name in draft.parameters}
    places = {
        name: {place[id(parameter)] for parameter in module.parameters()}
        for name, module in anatomy.network.named_modules()
    }
    timetable = _timetable(anatomy, places)
    held: list[list[str]] = [[] for _ in drafts]
    for name in filter(None, places):
        found = places[name] or next((places[above] for above in _ancestors(name) if places[above]), set())
        if len(found) == 1:
            held[next(iter(found))].append(name)
        elif not places[name] and name in anatomy.flow.calls and timetable:
            held[_next_place(timetable, anatomy.flow.calls[name])].append(name)
    return held


def _timetable(anatomy: _Anatomy, places: Mapping[str, set[int]]) -> list[tuple[int, int]]:
    """``(rank of the call, stage)`` of each called module that owns parameters, all of one stage."""
    owners = {_owner(name) for name in anatomy.shapes} - {""}
    calls = anatomy.flow.calls
    alone = (name for name in owners if name in calls and len(places[name]) == 1)
    return sorted((calls[name], next(iter(places[name]))) for name in alone)


def _next_place(timetable: Sequence[tuple[int, int]], call: int) -> int:
    """The stage of the first owner called after ``call``, or of the last owner."""
    following = bisect_right(timetable, (call, len(timetable)))
    return timetable[min(following, len(timetable) - 1)][1]


# --------------------------------------------------------------------------------------------- the names


def _name_stages(anatomy: _Anatomy, drafts: Sequence[_Draft]) -> list[str]:
    """A unique name for every stage, after the modules that hold its parameters."""
    names: list[str] = []
    taken = {"neck", "head"}
    for draft in drafts:
        if draft.role in ("neck", "head"):
            names.append(draft.role)
            continue
        used = [name for name in anatomy.used if name in set(draft.parameters)] or list(draft.parameters)
        name = _free(_name_of(anatomy, used, draft.role == "stem") or draft.role, taken)
        taken.add(name)
        names.append(name)
    return names


def _free(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}-{count}" for count in range(2, len(taken) + 3))
    return next(free for free in (name, *numbered) if free not in taken)


def _name_of(anatomy: _Anatomy, names: Sequence[str], is_stem: bool) -> str:
    """``layer4`` for a whole module, ``blocks.0-2`` for some of its children, else after one of them.

    That is the first for a stem (``patch_embed``), else the one of most layers (``denseblock1``).
    """
    outside = {above for name in set(anatomy.shapes) - set(names) for above in _ancestors(name)} | {""}
    part = list(names)
    while True:
        above = _common_module(part)
        if above not in outside:  # a whole module: the highest one that is
            return list(takewhile(lambda module: module not in outside, _ancestors(f"{above}.")))[-1]
        children = _children(above, part)
        weights = {
            child: sum(anatomy.holds_weight([name]) for name in held) for child, held in children.items()
        }
        run = _range([child for child, count in weights.items() if count])
        if run or not children:
            return ".".join(filter(None, (above, run)))
        part = children[max(weights, key=lambda child: min(weights[child], 1) if is_stem else weights[child])]


def _common_module(names: Sequence[str]) -> str:
    shared = set(_ancestors(names[0])).intersection(*(_ancestors(name) for name in names))
    return max(shared, key=len)


def _children(above: str, names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters below each child module of ``above``; its own parameters are left out."""
    children: dict[str, list[str]] = {}
    for name in names:
        child, dot, _ = name[len(above) + bool(above) :].partition(".")
        if dot:
            children.setdefault(child, []).append(name)
    return children


def _range(children: Sequence[str]) -> str | None:
    """``block0-2`` for ``block0, block1, block2``; nothing for fewer than two, or names that do not count."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*children, strict=False))
    shared = "".join(letters[0] for letters in same).rstrip("0123456789")
    rest = [child.removeprefix(shared) for child in children]
    if len(children) < 2 or not all(name[:1].isdigit() for name in rest):
        return None
    first, *_, last = sorted(rest, key=_natural)
    return f"{shared}{first}-{last}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort ``10`` after ``9``."""
    return [(int(digits or 0), letters) for digits, letters in re.findall(r"(\d*)(\D*)", name)]
