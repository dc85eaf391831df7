"""Find a network's tensors in a file: under which wrapper, and behind which prefix of their names.

Training scripts put a state dict under a key (``model_state_dict``, ``teacher``), and wrap the network in
another one (``model.``, ``backbone.``). In a flat state dict both are the same: text before the names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
"""Averaged weights are preferred: they are what a training script evaluates."""
PLAIN = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "teacher",
    "student",
    "weights",
    "model_weights",
)
_WRAPPERS = (*AVERAGED, *PLAIN)
_AVERAGED = re.compile(r"(?:\w+_)?(?:ema|swa|averaged)(?:_\w+)?")
_NO_WEIGHTS = re.compile(
    r"optim(?:izer)?(?:_state(?:s|_dict)?)?|opt|grads?|gradients?|exp_avg(?:_sq)?|m|v|mu|nu|velocity"
    r"|momentum(?:_buffers?)?|variances?|masks?|fisher\w*|deltas?"
)
"""Keys of values that have the names and shapes of weights, and are none."""
_MAX_NAME = 1_000
_MAX_CANDIDATES = 16
_CLEAR_SHARE = 0.9


def find_prefixes(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Collection[str], share: float
) -> list[str]:
    """Return prefixes to try, the most probable first.

    Args:
        tensors: content of a file.
        own: state dict of the network.
        names: tensors of its backbone, which decide.
        share: smallest share of ``names`` behind a prefix that counts as the network.
    """
    named, fitting = Counter[str](), Counter[str]()
    for key, value in tensors.items():
        for prefix, rest in _divide(key):
            if rest in names:
                named[prefix] += 1
                fitting[prefix] += own[rest].shape == value.shape
    needed = share * len(names)
    whole = sorted((prefix for prefix in named if fitting[prefix] >= needed), key=_rank)
    partly = sorted((prefix for prefix in named if named[prefix] >= needed), key=_rank)
    others = sorted(_descend(list(tensors), "", 0), key=_rank)  # for names that the library converts
    return list(dict.fromkeys([*whole, *partly, *others[:_MAX_CANDIDATES], ""]))


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors behind a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def describe_names(names: Iterable[str]) -> str:
    """Say what names begin with: ``'layer1.', 'layer2.'``, the most frequent first."""
    begins = Counter(name[:60].partition(".")[0] for name in names)
    shown = [f"{begin!r}" for begin, _ in begins.most_common(4)]
    return ", ".join(shown) + (", ..." if len(begins) > 4 else "")


def _divide(key: str) -> Iterator[tuple[str, str]]:
    """Yield every division of a dotted name into a prefix, which ends with a dot or is empty, and a rest."""
    position = 0
    if len(key) > _MAX_NAME:
        return
    while True:
        yield key[:position], key[position:]
        position = key.find(".", position) + 1
        if not position:
            return


def _rank(prefix: str) -> tuple[int, int]:
    """Averaged weights first, then known wrappers in their order, then the others; the shortest first."""
    words = prefix.rstrip(".").split(".")
    if any(_NO_WEIGHTS.fullmatch(word.lower()) for word in words):
        return len(_WRAPPERS) + 1, len(words)
    ranks = [_WRAPPERS.index(word) for word in words if word in _WRAPPERS]
    if any(_AVERAGED.fullmatch(word.lower()) for word in words):
        ranks.append(len(AVERAGED) - 1)
    averaged = [rank for rank in ranks if rank < len(AVERAGED)]
    return min(averaged or ranks[:1] or [len(_WRAPPERS)]), len(words)


def _descend(keys: list[str], prefix: str, depth: int) -> Iterator[str]:
    """Yield a prefix, and those within it that are wrappers or that nearly all of its names begin with."""
    yield prefix
    inner: dict[str, list[str]] = {}
    for key in keys:
        first, dot, _ = key[len(prefix) :].partition(".")
        if dot:
            inner.setdefault(first, []).append(key)
    for first, found in inner.items():
        if depth < 8 and (first in _WRAPPERS or len(found) >= _CLEAR_SHARE * len(keys)):
            yield from _descend(found, f"{prefix}{first}.", depth + 1)
