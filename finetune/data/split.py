"""Split a validation part off the training images, the same way on every machine.

The order of a class's images comes from a hash of seed, class and path, so neither the order in which
a file system lists them nor the library version of a random generator can move an image across.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256


def split_off(paths_by_class: Mapping[str, Sequence[str]], fraction: float, seed: int) -> set[str]:
    """Return the paths that become validation images, chosen class by class.

    Args:
        paths_by_class: the training paths of each class, in any order.
        fraction: share of each class to take, 0 < fraction < 1.
        seed: another seed gives another choice.

    Of n images of a class ``round(n * fraction)`` are taken, at least one, and at least one is left;
    a class with a single image therefore keeps it for training.
    """
    taken: set[str] = set()
    for name, paths in paths_by_class.items():
        wanted = max(1, round(len(paths) * fraction))
        taken.update(_shuffled(name, paths, seed)[: max(0, min(wanted, len(paths) - 1))])
    return taken


def _shuffled(name: str, paths: Sequence[str], seed: int) -> list[str]:
    """Return the paths ordered by their hash: random to look at, but a function of names alone."""
    return sorted(paths, key=lambda path: (sha256(f"{seed}/{name}/{path}".encode()).digest(), path))
