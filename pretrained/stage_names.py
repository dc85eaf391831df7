"""Name stages after the modules they hold: ``layer4``, ``blocks.9-11``, ``features.3-5``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import takewhile

from pretrained.anatomy import Anatomy, ancestors
from pretrained.division import Draft


def name_stages(anatomy: Anatomy, drafts: Sequence[Draft]) -> list[str]:
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


def _name_of(anatomy: Anatomy, names: Sequence[str], is_stem: bool) -> str:
    """``layer4`` for a whole module, ``blocks.0-2`` for some of its children, else after one of them.

    That is the first for a stem (``patch_embed``), else the one of most layers (``denseblock1``).
    """
    outside = {above for name in set(anatomy.shapes) - set(names) for above in ancestors(name)} | {""}
    part = list(names)
    while True:
        above = _common_module(part)
        if above not in outside:  # a whole module: the highest one that is
            return list(takewhile(lambda module: module not in outside, ancestors(f"{above}.")))[-1]
        children = _children(above, part)
        weights = {
            child: sum(anatomy.holds_weight([name]) for name in held) for child, held in children.items()
        }
        run = _range([child for child, count in weights.items() if count])
        if run or not children:
            return ".".join(filter(None, (above, run)))
        part = children[max(weights, key=lambda child: min(weights[child], 1) if is_stem else weights[child])]


def _common_module(names: Sequence[str]) -> str:
    shared = set(ancestors(names[0])).intersection(*(ancestors(name) for name in names))
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
