"""Images to predict, one after the other: a file, a folder, a CSV file, a pattern, or standard input.

Nothing holds all of them but a pattern, so that memory does not grow with their number.
"""

from __future__ import annotations

import csv
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from finetune.data.archive import Progress
from finetune.data.dataset import SPLITS, Dataset, Sample, Split
from finetune.data.discover import read_data
from finetune.data.folders import is_image, walk_images
from finetune.data.layout import LayoutReader, count, extensions, printable, some
from finetune.data.samples import is_sample, open_sample
from finetune.errors import DataError, UsageError, suggest

STANDARD_INPUT = "-"
FLAG = "--follow-links"
NOT_UTF8 = "its name is not UTF-8, which rows are"
_BLOCK = 2**16


class Input(NamedTuple):
    """An image: what its row calls it, where it lies, and what forbids to look at it."""

    path: str
    file: Path
    fault: str = ""


@dataclass(frozen=True)
class Inputs:
    """Images, in an order that is the same every time.

    Attributes:
        asked: the user's own words.
        open: walks over all of them; standard input only once.
        is_countable: a second walk costs little.
        folder: that was named; nothing is written into it.
        home: a folder that may hold both images and what is written: a CSV file's own, or where we are.
    """

    asked: str
    open: Callable[[], Iterator[Input]]
    is_countable: bool = True
    folder: Path | None = None
    home: Path = Path()


def find_inputs(
    words: str, standard_input: BinaryIO | None, *, nul: bool = False, follow_links: bool = False
) -> Inputs:
    """Tell what the user named.

    Args:
        words: a file, a folder (every image below it), a ``.csv`` with a column ``path`` (relative to the
            file), a pattern (``photos/**/*.jpg``), a sample, or ``-`` for one path a line.
        standard_input: that ``-`` means; None where it is closed.
        nul: paths on standard input end with a zero byte instead of a line end.
        follow_links: links, and rows of a CSV file, may lead out of the folder.

    Raises:
        DataError: there is no such file or folder.
        UsageError: standard input is closed, or there is no sample of this name.
    """
    path = Path(words)
    if words == STANDARD_INPUT:
        stream, end = _check_open(standard_input), b"\0" if nul else b"\n"
        return Inputs("standard input", lambda: _of_stream(stream, end), False)
    if is_sample(words):
        path = open_sample(words)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises on a name that is too long
        finding = LayoutReader(
            printable(words), path.absolute(), follow_links=follow_links, takes_any_name=True
        )
        return Inputs(printable(words), lambda: _of_folder(finding), folder=path)
    if os.path.lexists(path):
        if path.suffix.lower() != ".csv":
            return Inputs(printable(words), lambda: iter([_of_name(words)]), home=path.parent)
        finding = LayoutReader(printable(words), path.parent.absolute(), follow_links=follow_links)
        return Inputs(printable(words), lambda: _of_table(finding, path), home=path.parent)
    if glob.has_magic(words):
        found = sorted(name for name in glob.iglob(words, recursive=True) if is_image(name))  # noqa: PTH207
        return Inputs(printable(words), lambda: map(_of_name, found))
    raise DataError(printable(words), "there is no such file or folder", "Check the path.")


def _check_open(stream: BinaryIO | None) -> BinaryIO:
    if stream is None or stream.closed:
        fix = "Give it paths, one a line, or name a file, a folder, a CSV file or a pattern."
        raise UsageError("standard input", "it is closed", fix)
    return stream


def _of_name(name: str, root: Path = Path()) -> Input:
    """Rows are UTF-8, and must lead back to their images: another name could not be looked up in them."""
    shown = printable(name)
    return Input(shown, root / name, "" if shown == name else NOT_UTF8)


def _of_stream(stream: BinaryIO, end: bytes) -> Iterator[Input]:
    """Yield an image for each path that has ended, as soon as it has."""
    rest = b""
    while block := stream.read1(_BLOCK) if hasattr(stream, "read1") else stream.read(_BLOCK):
        *lines, rest = (rest + block).split(end)
        yield from _of_lines(lines, end)
    yield from _of_lines([rest], end)


def _of_lines(lines: list[bytes], end: bytes) -> Iterator[Input]:
    for line in lines:
        name = os.fsdecode(line.removesuffix(b"\r") if end == b"\n" else line)
        if "\0" in name:
            yield Input(printable(name.replace("\0", "\\0")), Path(), "is not a path: it holds a zero byte")
        elif name:
            yield _of_name(name)


def _of_folder(finding: LayoutReader) -> Iterator[Input]:
    others: Counter[str] = Counter()
    is_empty = True
    for path in walk_images(finding, "", others):
        is_empty = False
        yield _of_name(path, finding.root)
    finding.check_links(FLAG)
    if is_empty:
        raise finding.refuse(f"holds no images{extensions(others, ', only ')}", "Name a folder of images.")


def _of_table(finding: LayoutReader, file: Path) -> Iterator[Input]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines)
            column = _column(finding, next(reader, []))
            for row in reader:
                if row:
                    yield _of_row(finding, row[column] if column < len(row) else "")
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise finding.refuse(found, "Save it as UTF-8.") from None
    except csv.Error as error:
        raise finding.refuse(f"is not a table ({error})", "Quote cells that hold commas.") from None
    except OSError as error:
        raise finding.refuse(f"cannot be read ({error.strerror})", "Make the file readable.") from None


def _column(finding: LayoutReader, header: list[str]) -> int:
    names = [name.strip() for name in header]
    if names.count("path") == 1:
        return names.index("path")
    found = f"has no column 'path' (columns: {some(names) or 'none'}{suggest('path', names)})"
    raise finding.refuse(
        found if "path" not in names else "has more than one column 'path'",
        "Name the column of the images' paths `path` in the first line.",
    )


def _of_row(finding: LayoutReader, cell: str) -> Input:
    path = cell.strip()
    shown = printable(path)
    if not path or "\0" in path:
        return Input(
            shown, Path(), "the path is empty" if not path else "is not a path: it holds a zero byte"
        )
    file = finding.root / path
    if finding.outside(path) is not None:
        return Input(shown, file, f"lies outside the folder of the CSV file ({FLAG} allows it)")
    return Input(shown, file)


# --- Labelled images to judge a finished model by: nothing is trained, and the model's classes count ---


EvalSplit = Literal["train", "val", "test", "all"]


def read_split_name(word: str | None) -> EvalSplit | None:
    """Return the split of a name.

    Raises:
        UsageError: there is none of that name.
    """
    names: dict[str, EvalSplit] = {"train": "train", "val": "val", "test": "test", "all": "all"}
    if word is None:
        return None
    if word not in names:
        raise UsageError(f"--split {word}", "there is no such split", f"Take {', '.join(names)}.")
    return names[word]


def find_labelled(
    data: Path,
    classes: Sequence[str],
    part: EvalSplit | None = None,
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
    finding = LayoutReader(
        f"--data {printable(data)}", data.absolute(), follow_links=follow_links, to_judge=True
    )
    is_table = read_data(finding, data, on_progress)
    samples = _number(finding, _choose_parts(finding, part), classes)
    return Dataset(finding.root, tuple(classes), samples, tuple(finding.warnings), is_folder=not is_table)


def _choose_parts(
    finding: LayoutReader, part: EvalSplit | None
) -> Mapping[Split, Mapping[str, Sequence[str]]]:
    given = [split for split in SPLITS if split in finding.parts]
    if part == "all":
        return finding.parts
    chosen = {split: finding.parts[split] for split in given if split == (part or given[-1])}
    if not chosen:
        raise finding.refuse(f"has no part {part}", f"Take --split {', '.join(given)} or all.")
    return chosen


def _number(
    finding: LayoutReader, parts: Mapping[Split, Mapping[str, Sequence[str]]], classes: Sequence[str]
) -> tuple[Sample, ...]:
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted({name for found in parts.values() for name in found} - index.keys())
    if unknown:
        which = count(len(unknown), "class", "classes")
        raise finding.refuse(
            f"has {which} that the model does not know: {some(unknown)}{suggest(unknown[0], classes)}",
            "Give the class the model's name for it, or leave it out.",
        )
    return tuple(
        Sample(path, index[name], split)
        for split in SPLITS
        for path, name in sorted(
            (path, name) for name, paths in parts.get(split, {}).items() for path in paths
        )
    )
