"""The stages of any network, from stem to head: the parts that are frozen or given a learning rate together.

The order is that of the data (:mod:`pretrained.flow`), never of names or of registration. The labels come
from timm's own ``group_matcher`` where there is one, else from the grid that a layer works on:

    resnet18   conv1 | layer1 | layer2 | layer3 | layer4 | head
    vgg16      features.0-2 | features.5-7 | ... | features.24-28 | neck (fc6, fc7) | head
    vit_tiny   patch_embed | blocks.0-2 | blocks.3-5 | blocks.6-8 | blocks.9-11 | head

A network of many like blocks is folded, so that a stage means about the same on every backbone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from finetune.errors import UsageError, suggest
from pretrained.anatomy import Anatomy, ancestors, find_head, owner
from pretrained.division import Draft, Labels, Part, Role, divide, timm_labels
from pretrained.flow import trace_flow
from pretrained.stage_names import name_stages


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
    anatomy = Anatomy(network, flow)
    heads = frozenset(find_head(anatomy) if head is None else head)
    labels = timm_labels(network)
    body, neck = divide(anatomy, heads, labels, input_size)
    drafts = _drafts(body, neck, tuple(name for name in anatomy.shapes if name in heads))
    drafts = _with_unused(anatomy, drafts, labels)
    modules = _assign_modules(anatomy, drafts)
    names = name_stages(anatomy, drafts)
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


def _drafts(body: Sequence[Part], neck: tuple[str, ...], head: tuple[str, ...]) -> list[Draft]:
    drafts = [Draft("body", part.parameters) for part in body]
    if drafts:
        drafts[0] = replace(drafts[0], role="stem")
    ends: tuple[tuple[Role, tuple[str, ...]], ...] = (("neck", neck), ("head", head))
    return drafts + [Draft(role, names) for role, names in ends if names]


def _with_unused(anatomy: Anatomy, drafts: Sequence[Draft], labels: Labels | None) -> list[Draft]:
    """Give what no output depends on (mask tokens, auxiliary heads) to its kin."""
    place = {name: index for index, draft in enumerate(drafts) for name in draft.parameters}
    lost = [name for name in anatomy.shapes if name not in place]
    if lost and not drafts:
        return [Draft("stem", tuple(lost))]
    place |= {name: _place_of_kin(name, place, labels) for name in lost}
    return [
        replace(draft, parameters=tuple(name for name in anatomy.shapes if place[name] == index))
        for index, draft in enumerate(drafts)
    ]


def _place_of_kin(name: str, place: Mapping[str, int], labels: Labels | None) -> int:
    """The stage of timm's label, else of the nearest module above ``name`` that is in one, else the stem."""
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


def _assign_modules(anatomy: Anatomy, drafts: Sequence[Draft]) -> list[list[str]]:
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
        found = places[name] or next((places[above] for above in ancestors(name) if places[above]), set())
        if len(found) == 1:
            held[next(iter(found))].append(name)
        elif not places[name] and name in anatomy.flow.calls and timetable:
            held[_next_place(timetable, anatomy.flow.calls[name])].append(name)
    return held


def _timetable(anatomy: Anatomy, places: Mapping[str, set[int]]) -> list[tuple[int, int]]:
    """``(rank of the call, stage)`` of each called module that owns parameters, all of one stage."""
    owners = {owner(name) for name in anatomy.shapes} - {""}
    calls = anatomy.flow.calls
    alone = (name for name in owners if name in calls and len(places[name]) == 1)
    return sorted((calls[name], next(iter(places[name]))) for name in alone)


def _next_place(timetable: Sequence[tuple[int, int]], call: int) -> int:
    """The stage of the first owner called after ``call``, or of the last owner."""
    following = bisect_right(timetable, (call, len(timetable)))
    return timetable[min(following, len(timetable) - 1)][1]
