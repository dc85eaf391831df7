"""Exact copies of images: across splits, under two labels, and the same one again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.dataset import SPLITS, Issue, Severity
from finetune.data.layout import count
from finetune.data.quality.subject import ScannedDataset

REPEATED = 4
"""Copies of one image from which it looks like the image for "no image"."""
WHOLE = 0.9
"""Share of a part's images that lie in another too, from which it is called that part once more."""

Group = Sequence[int]
"""Places of images in ``ScannedDataset.samples``."""


@dataclass(frozen=True)
class Copies:
    """Images that are there more than once, byte for byte; each a group of two images or more.

    Attributes:
        leaks: in more than one split.
        conflicts: under more than one label.
        repeated: ``REPEATED`` times or more.
        within: more than once in one split, under one label.
    """

    leaks: tuple[Group, ...] = ()
    conflicts: tuple[Group, ...] = ()
    repeated: tuple[Group, ...] = ()
    within: tuple[Group, ...] = ()


def find_copies(seen: ScannedDataset) -> Copies:
    """Return groups of images with the same sha256."""
    groups = _group(seen)

    def those(is_one: list[bool]) -> tuple[Group, ...]:
        return tuple(group for group, one in zip(groups, is_one, strict=True) if one)

    kinds = [Counter(zip(seen.splits[group], seen.labels[group], strict=True)) for group in groups]
    return Copies(
        leaks=those([len({part for part, _ in kind}) > 1 for kind in kinds]),
        conflicts=those([len({label for _, label in kind}) > 1 for kind in kinds]),
        repeated=those([len(group) >= REPEATED for group in groups]),
        within=those([max(kind.values()) > 1 for kind in kinds]),
    )


def _group(seen: ScannedDataset) -> list[list[int]]:
    if not seen.samples:
        return []
    digests = np.ascontiguousarray(seen.scan.rows["sha256"]).view("V32").reshape(-1)
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(digests[order][1:] != digests[order][:-1]) + 1
    groups = [part.tolist() for part in np.split(order, starts) if len(part) > 1]
    return sorted(groups)


def find_copy_issues(seen: ScannedDataset, copies: Copies, allow_leaks: bool) -> Iterator[Issue]:
    """Yield what is to be said of exact copies."""
    severity: Severity = "warning" if allow_leaks else "error"
    yield from _find_leak_issues(seen, copies, severity)
    if copies.conflicts:
        yield Issue(
            "label-conflict",
            "warning",
            f"{count(len(copies.conflicts), 'image lies', 'images lie')} under more than one label, byte "
            "for byte the same.",
            "Decide which label is right, and remove the other copies.",
            len(copies.conflicts),
            seen.paths(place for group in copies.conflicts for place in group),
        )
    if copies.repeated:
        most = max(len(group) for group in copies.repeated)
        which = count(len(copies.repeated), "image comes", "images come")
        yield Issue(
            "picture-repeated",
            "warning",
            f"{which} repeatedly, up to {most} times, as a placeholder does.",
            "Look at it, and remove it if it is a placeholder.",
            len(copies.repeated),
            seen.paths(place for group in copies.repeated for place in group),
        )
    if copies.within:
        surplus = [place for group in copies.within for place in _surplus(seen, group)]
        said = count(len(surplus), "image is an exact copy", "images are exact copies")
        yield Issue(
            "duplicate",
            "warning",
            f"{said} of another image of the same split and label; they count more than the others.",
            "Remove the copies.",
            len(surplus),
            seen.paths(surplus),
        )


def _find_leak_issues(seen: ScannedDataset, copies: Copies, severity: Severity) -> Iterator[Issue]:
    """Yield an issue for each pair of splits that share images."""
    for later in (1, 2):
        for earlier in range(later):
            shared = [group for group in copies.leaks if {earlier, later} <= set(seen.splits[group].tolist())]
            if not shared:
                continue
            one, other = SPLITS[earlier], SPLITS[later]
            held = [place for group in shared for place in group if seen.splits[place] == later]
            total = int((seen.splits == later).sum())
            both = [place for group in shared for place in group if seen.splits[place] in (earlier, later)]
            if len(held) >= WHOLE * total:
                yield Issue(
                    "part-repeated",
                    severity,
                    f"{other} repeats {one}: {len(held)} of its {total} images are also in {one}.",
                    f"Give {other} images of its own.",
                    len(held),
                    seen.paths(held),
                )
            are = "is an exact copy of one" if len(held) == 1 else "are exact copies of images"
            yield Issue(
                "leak",
                severity,
                f"{len(held)} of {total} {other} images {are} in {one}: the metrics reward memorised images.",
                "Remove the copies from one of the two splits, or continue with --allow-leaks.",
                len(held),
                seen.paths(both),
            )


def _surplus(seen: ScannedDataset, group: Group) -> Iterator[int]:
    """Yield the images of a group that an earlier one of the same split and label repeats."""
    met = set()
    for place in group:
        kind = seen.splits[place], seen.labels[place]
        if kind in met:
            yield place
        met.add(kind)
