"""Labelled pictures to judge a finished model by: nothing is trained, and the model's classes count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from finetune.data.archive import Progress
from finetune.data.discover import read_data
from finetune.data.finding import Finding, count, printable, some
from finetune.data.sample import SPLITS, Dataset, Sample, Split
from finetune.errors import suggest

Part = Literal["train", "val", "test", "all"]
PARTS: tuple[Part, ...] = (*SPLITS, "all")


def find_labelled(
    data: Path,
    classes: Sequence[str],
    part: Part | None = None,
    follow_links: bool = False,
    on_progress: Progress | None = None,
) -> Dataset:
    """Return labelled images of a folder, a zip archive or a CSV file, numbered as a model's classes are.

    Args:
        data: as for training; a part ``train`` need not be there.
        classes: of the model, in index order.
        part: which images; by default those of ``test`` where there are such, else of ``val``, else all.
        follow_links: read images through links that lead out of the folder.
        on_progress: called with the entries done and their number while an archive is unpacked.

    Returns:
        A data set with these classes, and every image in the part that it is found in.

    Raises:
        DataError: there is nothing, there is no such part, or it has a class that the model does not know.
    """
    finding = Finding(f"--data {printable(data)}", data.absolute(), follow_links=follow_links, to_judge=True)
    is_table = read_data(finding, data, on_progress)
    samples = _number(finding, _choose_parts(finding, part), classes)
    return Dataset(finding.root, tuple(classes), samples, tuple(finding.warnings), is_folder=not is_table)


def _choose_parts(finding: Finding, part: Part | None) -> Mapping[Split, Mapping[str, Sequence[str]]]:
    given = [split for split in SPLITS if split in finding.parts]
    if part == "all":
        return finding.parts
    chosen = {split: finding.parts[split] for split in given if split == (part or given[-1])}
    if not chosen:
        raise finding.refuse(f"has no part {part}", f"Take --split {', '.join(given)} or all.")
    return chosen


def _number(
    finding: Finding, parts: Mapping[Split, Mapping[str, Sequence[str]]], classes: Sequence[str]
) -> tuple[Sample, ...]:
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted({name for found in parts.values() for name in found} - index.keys())
    if unknown:
        which = count(len(unknown), "class", "classes")
        raise finding.refuse(
            f"has {which} that the model does not know: {some(unknown)}{suggest(unknown[0], classes)}",
            "Rename the class as the model calls it, or leave it out.",
        )
    return tuple(
        Sample(path, index[name], split)
        for split in SPLITS
        for path, name in sorted(
            (path, name) for name, paths in parts.get(split, {}).items() for path in paths
        )
    )
