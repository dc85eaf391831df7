"""Tell whether a file belongs to a deeper sibling of a network: it has whole further blocks of the same kind.

Every tensor of a ResNet-18 is also in the file of a ResNet-34, under the same name and in the same shape, but
its weights were trained with further blocks in between.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator

_NUMBERED = re.compile(r"(.*?)(\d+)")
_LEAST_LAYERS = 2
"""A block has at least two layers with weights; a single one more may be a leftover."""


def find_further_blocks(own: Collection[str], unused: Collection[str], head: Collection[str]) -> list[str]:
    """Return the blocks that a file has beyond those of a network, such as ``layer1.2``.

    Args:
        own: names of the network's tensors.
        unused: names of the file's tensors that the network does not have.
        head: names of the classifier's tensors; what stands beside them may be another classifier.
    """
    near_head = {name.partition(".")[0] for name in head if "." in name}
    candidates = [name for name in unused if name.partition(".")[0] not in near_head]
    if not candidates:
        return []
    known = _group(own)
    further = _group(candidates)
    siblings: dict[str, list[frozenset[str]]] = defaultdict(list)
    for block, layers in known.items():
        siblings[_kind(block)].append(layers)
    found = [
        block
        for block, layers in further.items()
        if block not in known
        and len(layers) >= _LEAST_LAYERS
        and any(2 * len(layers & other) > len(layers) for other in siblings[_kind(block)])
    ]
    return [block for block in found if not any(block.startswith(f"{outer}.") for outer in found)]


def _group(names: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the layers within each numbered module of these tensors."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for block, layer in _blocks_of(name):
            groups[block].add(layer)
    return {block: frozenset(layers) for block, layers in groups.items()}


def _blocks_of(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".") if len(name) < 1_000 else []
    for position in range(len(parts) - 2):
        if _NUMBERED.fullmatch(parts[position]):
            yield ".".join(parts[: position + 1]), ".".join(parts[position + 1 : -1])


def _kind(block: str) -> str:
    """Return a block's name without its number."""
    parent, dot, last = block.rpartition(".")
    return f"{parent}{dot}{last.rstrip('0123456789')}"
