"""Tell whether a file belongs to a sibling of a network, with further blocks or further layers in its blocks.

Every tensor of a ResNet-18 is also in the file of a ResNet-34, under the same name and in the same shape, but
its weights were trained with further blocks in between; those of a RegNetY with squeeze and excitation in
each block of a RegNetX.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator

_NUMBERED = re.compile(r"(.*?)(\d+)")
_LEAST_LAYERS = 2
"""A block has at least two layers with weights; a single one more may be a leftover."""
_LEARNED = re.compile(r"weight|bias|gamma(?:_\d)?|tau|v|\w+_gain|\w+_bias_table|logit_scale")
"""Last parts of names of learned values; buffers, masks and counters may be leftovers."""
_STATISTIC = "running_var"
_LEAST_BLOCKS = 2
"""A further layer of a kind is in several blocks; in one it may be a leftover."""


def find_further_blocks(own: Collection[str], unused: Collection[str], head: Collection[str]) -> list[str]:
    """Return the blocks that a file has beyond those of a network, such as ``layer1.2``.

    Args:
        own: names of the network's tensors.
        unused: names of the file's tensors that the network does not have.
        head: names of the classifier's tensors; what stands beside them may be another classifier.
    """
    candidates = _leave_out_head(unused, head)
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


def find_further_layers(own: Collection[str], unused: Collection[str], head: Collection[str]) -> list[str]:
    """Return the layers that a file has inside the network's own blocks, such as ``layer1.0.se.conv``.

    A normalisation with running statistics counts, where the network's has none.

    Args:
        own: names of the network's tensors.
        unused: names of the file's tensors that the network does not have.
        head: names of the classifier's tensors; what stands beside them may be another classifier.
    """
    known, found = _group(own), dict[str, str]()  # from a layer to the innermost block that it is in
    for name in _leave_out_head(unused, head):
        layer, _, last = name.rpartition(".")
        is_other_norm = last == _STATISTIC and f"{layer}.weight" in own
        blocks = [block for block, _ in _blocks_of(name) if block in known]
        if is_other_norm or (blocks and _LEARNED.fullmatch(last)):
            found[layer] = blocks[-1] if blocks else layer
    return list(found) if len(set(found.values())) >= _LEAST_BLOCKS else []


def _leave_out_head(names: Collection[str], head: Collection[str]) -> list[str]:
    near_head = {name.partition(".")[0] for name in head if "." in name}
    return [name for name in names if name.partition(".")[0] not in near_head]


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
