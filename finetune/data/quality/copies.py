"""Exact copies of images: across splits, under several labels, repeated, and within a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.dataset import SPLITS, Issue, Severity
from finetune.data.quality.subject import ScannedDataset
from finetune.errors import count

REPEATED = 4
"""Number of copies from which an image may be a placeholder for a missing image."""
WHOLE = 0.9
"""Share of shared images from which one split is reported as a copy of another."""

Group = Sequence[int]
"""Indices into ``ScannedDataset.samples``."""


@dataclass(frozen=True)
class Copies:
    """Groups of two or more images with the same bytes. A group may be in several of the lists.

    Attributes:
        leaks: groups that lie in more than one split.
        conflicts: groups with more than one label.
        repeated: groups of ``REPEATED`` images or more.
        within: groups with several images of the same split and label.
    """

    leaks: tuple[Group, ...] = ()
    conflicts: tuple[Group, ...] = ()
    repeated: tuple[Group, ...] = ()
    within: tuple[Group, ...] = ()


def find_copies(scanned: ScannedDataset) -> Copies:
    """Return groups of images with the same sha256."""
    groups = _group(scanned)

    def select(mask: list[bool]) -> tuple[Group, ...]:
        return tuple(group for group, is_selected in zip(groups, mask, strict=True) if is_selected)

    kinds = [Counter(zip(scanned.splits[group], scanned.labels[group], strict=True)) for group in groups]
    return Copies(
        leaks=select([len({split for split, _ in kind}) > 1 for kind in kinds]),
        conflicts=select([len({label for _, label in kind}) > 1 for kind in kinds]),
        repeated=select([len(group) >= REPEATED for group in groups]),
        within=select([max(kind.values()) > 1 for kind in kinds]),
    )


def _group(scanned: ScannedDataset) -> list[list[int]]:
    if not scanned.samples:
        return []
    digests = np.ascontiguousarray(scanned.scan.rows["sha256"]).view("V32").reshape(-1)
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(digests[order][1:] != digests[order][:-1]) + 1
    groups = [equal.tolist() for equal in np.split(order, starts) if len(equal) > 1]
    return sorted(groups)


def find_copy_issues(scanned: ScannedDataset, copies: Copies, allow_leaks: bool) -> Iterator[Issue]:
    """Yield the issues of exact copies."""
    severity: Severity = "warning" if allow_leaks else "error"
    yield from _find_leak_issues(scanned, copies, severity)
    if copies.conflicts:
        yield Issue(
            "label-conflict",
            "warning",
            f"{count(len(copies.conflicts), 'image has', 'images have')} exact copies under another label.",
            "Decide which label is right, and remove the other copies.",
            len(copies.conflicts),
            scanned.paths(index for group in copies.conflicts for index in group),
        )
    if copies.repeated:
        most = max(len(group) for group in copies.repeated)
        which = count(len(copies.repeated), "image comes", "images come")
        yield Issue(
            "picture-repeated",
            "warning",
            f"{which} repeatedly, up to {most} times, like a placeholder for a missing image.",
            "Look at them, and remove placeholders.",
            len(copies.repeated),
            scanned.paths(index for group in copies.repeated for index in group),
        )
    if copies.within:
        surplus = [index for group in copies.within for index in _surplus(scanned, group)]
        copied = count(len(surplus), "image is an exact copy", "images are exact copies")
        yield Issue(
            "duplicate",
            "warning",
            f"{copied} of another image of the same split and label, which counts more than others.",
            "Remove the copies.",
            len(surplus),
            scanned.paths(surplus),
        )


def _find_leak_issues(scanned: ScannedDataset, copies: Copies, severity: Severity) -> Iterator[Issue]:
    """Yield an issue for each pair of splits that share images."""
    for later in (1, 2):
        for earlier in range(later):
            shared = [
                group for group in copies.leaks if {earlier, later} <= set(scanned.splits[group].tolist())
            ]
            if not shared:
                continue
            first, second = SPLITS[earlier], SPLITS[later]
            held = [index for group in shared for index in group if scanned.splits[index] == later]
            total = int((scanned.splits == later).sum())
            both = [index for group in shared for index in group if scanned.splits[index] in (earlier, later)]
            if len(held) >= WHOLE * total:
                yield Issue(
                    "part-repeated",
                    severity,
                    f"{second} repeats {first}: {len(held)} of its {total} images are also in {first}.",
                    f"Give {second} images of its own.",
                    len(held),
                    scanned.paths(held),
                )
            are = "is an exact copy of one" if len(held) == 1 else "are exact copies of images"
            yield Issue(
                "leak",
                severity,
                f"{len(held)} of {total} {second} images {are} in {first}: the metrics reward memorisation.",
                "Remove the copies from one of the two splits, or continue with --allow-leaks.",
                len(held),
                scanned.paths(both),
            )


def _surplus(scanned: ScannedDataset, group: Group) -> Iterator[int]:
    """Yield the images of a group that repeat an earlier one of the same split and label."""
    known = set()
    for index in group:
        kind = scanned.splits[index], scanned.labels[index]
        if kind in known:
            yield index
        known.add(kind)
