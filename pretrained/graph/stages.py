"""Divide any network into stages, from stem to head. A stage is frozen, or has a learning rate, as a whole.

The order is that of the data flow (:mod:`pretrained.graph.flow`), not of names or registration. The division
follows timm's own ``group_matcher`` if the network has one, otherwise the grids on which layers work:

    resnet18   conv1 | layer1 | layer2 | layer3 | layer4 | head
    vgg16      features.0-2 | features.5-7 | ... | features.24-28 | neck (fc6, fc7) | head
    vit_tiny   patch_embed | blocks.0-2 | blocks.3-5 | blocks.6-8 | blocks.9-11 | head

Many equal blocks are merged into a few stages, so that stages are comparable between backbones.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from finetune.errors import UsageError, suggest
from pretrained.graph.division import (
    Labels,
    ParameterInfo,
    Part,
    Role,
    StageDraft,
    ancestors,
    divide,
    find_head,
    owner,
    timm_labels,
)
from pretrained.graph.flow import trace_flow


@dataclass(frozen=True)
class Stage:
    """One stage of a network.

    Attributes:
        name: unique in the network: ``layer4``, ``blocks.9-11``, ``neck``, ``head``.
        role: the first stage is the ``stem``; a ``neck`` is between the last grid and the ``head``.
        parameters: names as in ``network.named_parameters()``.
        modules: names, as in ``network.named_modules()``, of modules whose parameters are all in this stage.
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
        network: any network, on any device; it does not change.
        input_size: (C, H, W) of its images.
        head: names of the head's parameters; by default they are found.

    Returns:
        Stages from stem to head. A network without a classifier has no head, and one without parameters has
        no stages.

    Raises:
        UsageError: a forward pass fails at ``input_size``, or a name in ``head`` is no parameter.
    """
    _check_names(network, head)
    flow = trace_flow(network, input_size)
    info = ParameterInfo(network, flow)
    heads = frozenset(find_head(info) if head is None else head)
    labels = timm_labels(network)
    body, neck = divide(info, heads, labels, input_size)
    drafts = _make_drafts(body, neck, tuple(name for name in info.shapes if name in heads))
    drafts = _with_unused(info, drafts, labels)
    modules = _assign_modules(info, drafts)
    names = name_stages(info, drafts)
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


# --------------------------------------------------------------------------------------------- the drafts


def _make_drafts(body: Sequence[Part], neck: tuple[str, ...], head: tuple[str, ...]) -> list[StageDraft]:
    drafts = [StageDraft("body", part.parameters) for part in body]
    if drafts:
        drafts[0] = replace(drafts[0], role="stem")
    ends: tuple[tuple[Role, tuple[str, ...]], ...] = (("neck", neck), ("head", head))
    return drafts + [StageDraft(role, names) for role, names in ends if names]


def _with_unused(
    info: ParameterInfo, drafts: Sequence[StageDraft], labels: Labels | None
) -> list[StageDraft]:
    """Add parameters that no output depends on (mask tokens, auxiliary heads) to related stages."""
    place = {name: index for index, draft in enumerate(drafts) for name in draft.parameters}
    lost = [name for name in info.shapes if name not in place]
    if lost and not drafts:
        return [StageDraft("stem", tuple(lost))]
    place |= {name: _nearest_draft(name, place, labels) for name in lost}
    return [
        replace(draft, parameters=tuple(name for name in info.shapes if place[name] == index))
        for index, draft in enumerate(drafts)
    ]


def _nearest_draft(name: str, place: Mapping[str, int], labels: Labels | None) -> int:
    """The stage of its timm group, else of the innermost module around it that has a stage, else the stem."""
    if labels is not None and labels.of[name] != labels.rest:
        for other, index in place.items():
            if labels.of[other] == labels.of[name]:
                return index
    for module in takewhile(bool, ancestors(name)):
        for other, index in place.items():
            if other.startswith(f"{module}."):
                return index
    return 0


# --------------------------------------------------------------------------------------------- the modules


def _assign_modules(info: ParameterInfo, drafts: Sequence[StageDraft]) -> list[list[str]]:
    """The modules of every stage; one without parameters follows its parent, else the order of calls."""
    parameters = dict(info.network.named_parameters())
    place = {id(parameters[name]): index for index, draft in enumerate(drafts) for name in draft.parameters}
    places = {
        name: {place[id(parameter)] for parameter in module.parameters()}
        for name, module in info.network.named_modules()
    }
    timetable = _timetable(info, places)
    held: list[list[str]] = [[] for _ in drafts]
    for name in filter(None, places):
        found = places[name] or next((places[above] for above in ancestors(name) if places[above]), set())
        if len(found) == 1:
            held[next(iter(found))].append(name)
        elif not places[name] and name in info.flow.calls and timetable:
            held[_next_place(timetable, info.flow.calls[name])].append(name)
    return held


def _timetable(info: ParameterInfo, places: Mapping[str, set[int]]) -> list[tuple[int, int]]:
    """``(rank of the call, stage)`` of each called module whose own parameters are in one stage."""
    owners = {owner(name) for name in info.shapes} - {""}
    calls = info.flow.calls
    alone = (name for name in owners if name in calls and len(places[name]) == 1)
    return sorted((calls[name], next(iter(places[name]))) for name in alone)


def _next_place(timetable: Sequence[tuple[int, int]], call: int) -> int:
    """The stage of the first module of the timetable that is called after ``call``, or of the last one."""
    following = bisect_right(timetable, (call, len(timetable)))
    return timetable[min(following, len(timetable) - 1)][1]


# ----------------------------------------------------------------------------------------------- the names


def name_stages(info: ParameterInfo, drafts: Sequence[StageDraft]) -> list[str]:
    """Return a unique name for every stage, after the modules that hold its parameters."""
    names: list[str] = []
    taken = {"neck", "head"}
    for draft in drafts:
        if draft.role in ("neck", "head"):
            names.append(draft.role)
            continue
        used = [name for name in info.used if name in set(draft.parameters)] or list(draft.parameters)
        name = _free(_name_of(info, used, draft.role == "stem") or draft.role, taken)
        taken.add(name)
        names.append(name)
    return names


def _free(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}-{count}" for count in range(2, len(taken) + 3))
    return next(free for free in (name, *numbered) if free not in taken)


def _name_of(info: ParameterInfo, names: Sequence[str], is_stem: bool) -> str:
    """Name a whole module (``layer4``), a range of its children (``blocks.0-2``), or one of the children.

    The one child is the first for a stem (``patch_embed``), else the one with the most weights
    (``denseblock1``).
    """
    outside = {above for name in set(info.shapes) - set(names) for above in ancestors(name)} | {""}
    part = list(names)
    while True:
        above = _common_module(part)
        if above not in outside:  # a whole module: take the outermost one that is whole
            return list(takewhile(lambda module: module not in outside, ancestors(f"{above}.")))[-1]
        children = _children(above, part)
        weights = {child: sum(info.holds_weight([name]) for name in held) for child, held in children.items()}
        run = _range([child for child, count in weights.items() if count])
        if run or not children:
            return ".".join(filter(None, (above, run)))
        part = children[max(weights, key=lambda child: min(weights[child], 1) if is_stem else weights[child])]


def _common_module(names: Sequence[str]) -> str:
    shared = set(ancestors(names[0])).intersection(*(ancestors(name) for name in names))
    return max(shared, key=len)


def _children(above: str, names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters in each child module of ``above``, without its own parameters."""
    children: dict[str, list[str]] = {}
    for name in names:
        child, dot, _ = name[len(above) + bool(above) :].partition(".")
        if dot:
            children.setdefault(child, []).append(name)
    return children


def _range(children: Sequence[str]) -> str | None:
    """``block0-2`` for ``block0, block1, block2``; None for fewer than two or names without numbers."""
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
