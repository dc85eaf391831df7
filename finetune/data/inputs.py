"""The images that a finished model reads: images to predict, and labelled images to evaluate on.

Images to predict come one after the other from a file, a folder, a CSV file, a pattern or standard input;
only a pattern holds all paths in memory. Labelled images are numbered by the classes of the model.
"""

from __future__ import annotations

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from finetune.data.archives.archive import Progress
from finetune.data.archives.entries import is_archive, is_unread_archive
from finetune.data.dataset import SPLITS, Dataset, Sample, Split
from finetune.data.discover import read_data
from finetune.data.folders import explain_others, tell_hidden, walk_images
from finetune.data.formats import is_array_name, is_image_name
from finetune.data.layout import SHOWN, LayoutReader, extension_counts, extensions, printable, some
from finetune.data.layouts.class_folders import find_inner
from finetune.data.samples import is_sample, open_sample
from finetune.data.tables.columns import find_path_column
from finetune.data.tables.config import BY_NAMES, TableConfig
from finetune.data.tables.files import FETCH, TableFiles, is_address
from finetune.data.tables.format import is_table, read_rows
from finetune.errors import DataError, UsageError, count, suggest
from finetune.targets import SINGLE, Target

STANDARD_INPUT = "-"
FLAG = "--follow-links"
NOT_UTF8 = "its name is not UTF-8, which rows are"
LONGEST_PATH = 4096
"""Bytes of the longest path that Linux opens; rows show as many characters of a longer text."""
_BLOCK = 2**16


class InputImage(NamedTuple):
    """An image to predict: its path as the output names it, its file, and why it must not be read (or "")."""

    path: str
    file: Path
    fault: str = ""


@dataclass
class LeftOut:
    """Files that are not read: their number by extension, the first few paths, and what is hidden."""

    kinds: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)

    def start(self) -> LeftOut:
        """Forget all files, at the start of an iteration."""
        self.kinds.clear()
        self.paths.clear()
        self.hidden.clear()
        return self

    def __str__(self) -> str:
        """Return the number of files with the first few paths, or "" if there are none."""
        total = self.kinds.total()
        shown = some(map(printable, sorted(self.hidden)))
        hidden = f"Hidden images and hidden folders with images have no row: {shown}." if self.hidden else ""
        if not total:
            return hidden
        files = count(total, "file is not an image and has", "files are not images and have")
        more = f" and {total - len(self.paths):,} more" if total > len(self.paths) else ""
        shown = ", ".join(map(printable, self.paths))
        kinds = f" ({extensions(self.kinds, '')})" if total > 1 else ""
        hidden = f" {hidden}" if hidden else ""
        return f"{files} no row: {shown}{more}{kinds}.{explain_others(self.kinds)}{hidden}"


@dataclass(frozen=True)
class InputImages:
    """Images to predict, in a reproducible order.

    Attributes:
        asked: the argument as the user wrote it.
        open: starts an iteration over all images; standard input can be read only once.
        is_countable: whether a second iteration is cheap.
        folder: the folder that the user named; nothing is written into it.
        home: folder that may hold both images and results: the CSV file's, or the working directory.
        left_out: files that the last iteration left out, since their names are not those of images.
    """

    asked: str
    open: Callable[[], Iterator[InputImage]]
    is_countable: bool = True
    folder: Path | None = None
    home: Path = Path()
    left_out: LeftOut = field(default_factory=LeftOut)


def find_inputs(
    source: str, standard_input: BinaryIO | None, *, nul: bool = False, follow_links: bool = False
) -> InputImages:
    """Find the images that the user named.

    Args:
        source: a file, a folder (every image below it), a ``.csv`` with a column ``path`` (relative to the
            file), a pattern (``photos/**/*.jpg``), a sample, or ``-`` for one path per line.
        standard_input: the stream that ``-`` reads; None if it is closed.
        nul: whether paths on standard input end with a zero byte instead of a line end.
        follow_links: whether links, and rows of a CSV file, may lead out of the folder.

    Raises:
        DataError: there is no such file or folder.
        UsageError: standard input is closed, or there is no sample of this name.
    """
    path = Path(source)
    if source == STANDARD_INPUT:
        stream, end = _check_open(standard_input), b"\0" if nul else b"\n"
        return InputImages("standard input", lambda: _of_stream(stream, end), False)
    if is_sample(source):
        path = open_sample(source)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises on a name that is too long
        reader = LayoutReader(
            printable(source), path.absolute(), follow_links=follow_links, takes_any_name=True
        )
        left_out = LeftOut()
        return InputImages(
            printable(source), lambda: _of_folder(reader, left_out.start()), folder=path, left_out=left_out
        )
    if os.path.lexists(path):
        if is_archive(path.name) or is_unread_archive(path.name):
            raise DataError(
                printable(source),
                "is an archive, which is not unpacked here",
                "Unpack it, and name the folder.",
            )
        if not is_table(path.name):
            return InputImages(printable(source), lambda: iter([_of_name(source)]), home=path.parent)
        reader = LayoutReader(printable(source), path.parent.absolute(), follow_links=follow_links)
        return InputImages(printable(source), lambda: _of_table(reader, path), home=path.parent)
    if glob.has_magic(source):
        return _of_pattern(source)
    raise DataError(printable(source), "there is no such file or folder", "Check the path.")


def _of_pattern(source: str) -> InputImages:
    if len(os.fsencode(source)) > LONGEST_PATH:  # glob takes minutes for thousands of brackets
        fault = f"the pattern has more than {LONGEST_PATH:,} bytes, as no path has"
        raise DataError(
            printable(source), fault, "Take a shorter pattern, or give the paths on standard input."
        )
    files = [name for name in sorted(glob.iglob(source, recursive=True)) if not os.path.isdir(name)]  # noqa: PTH112, PTH207
    taken = is_image_name if any(map(is_image_name, files)) else is_array_name
    found = [name for name in files if taken(name)]
    others = [name for name in files if not taken(name)]
    left_out = LeftOut(extension_counts(others), others[:SHOWN])
    return InputImages(printable(source), lambda: map(_of_name, found), left_out=left_out)


def _check_open(stream: BinaryIO | None) -> BinaryIO:
    if stream is None or stream.closed:
        fix = "Give it paths, one a line, or name a file, a folder, a CSV file or a pattern."
        raise UsageError("standard input", "it is closed", fix)
    return stream


def _of_name(name: str, root: Path = Path()) -> InputImage:
    """Return an image by its name; names that are not UTF-8 are faulty, since the output is UTF-8."""
    shown = printable(name)
    return _no_path(name) or InputImage(shown, root / name, "" if shown == name else NOT_UTF8)


def _no_path(name: str) -> InputImage | None:
    """Return the faulty image of a text that is no path, with the start of a long one; None for a path."""
    if "\0" in name:
        fault = "is not a path: it holds a zero byte"
    elif len(name.encode(errors="replace")) > LONGEST_PATH:
        fault = f"is not a path: it has more than {LONGEST_PATH:,} bytes"
    else:
        return None
    shown = printable(name.replace("\0", "\\0"))
    return InputImage(shown if len(shown) <= LONGEST_PATH else f"{shown[:LONGEST_PATH]}...", Path(), fault)


def _of_stream(stream: BinaryIO, end: bytes) -> Iterator[InputImage]:
    """Yield the image of each path as soon as the path is complete.

    Raises:
        DataError: there is no end of a path in 64 KiB, as where an image itself or a device is read.
    """
    rest = b""
    while block := stream.read1(_BLOCK) if hasattr(stream, "read1") else stream.read(_BLOCK):
        *lines, rest = (rest + block).split(end)
        yield from _of_lines(lines, end)
        if len(rest) > _BLOCK:
            found = f"a path has more than {_BLOCK:,} bytes"
            raise DataError("standard input", found, "Give it paths, one a line (with -0, each with a NUL).")
    yield from _of_lines([rest], end)


def _of_lines(lines: list[bytes], end: bytes) -> Iterator[InputImage]:
    names = (os.fsdecode(line.removesuffix(b"\r") if end == b"\n" else line) for line in lines)
    yield from (_of_name(name) for name in names if name)


def _of_folder(reader: LayoutReader, left_out: LeftOut) -> Iterator[InputImage]:
    is_empty = True
    for path in walk_images(reader, "", left_out.kinds, left_out.paths):
        is_empty = False
        yield _of_name(path, reader.root)
    left_out.hidden |= reader.hidden
    reader.check_links(FLAG)
    if is_empty:
        found = f"holds no images{extensions(left_out.kinds, ', only ')}"
        fix = f"Name a folder of images.{explain_others(left_out.kinds)}{tell_hidden(reader)}"
        raise reader.error(found, fix)


def _of_table(reader: LayoutReader, file: Path) -> Iterator[InputImage]:
    files = TableFiles(reader, file.parent.absolute())
    rows = read_rows(reader, file)
    column = find_path_column(reader, [name.strip() for name in next(rows, [])])
    for row in rows:
        if row:
            yield _of_row(reader, files, row[column] if column < len(row) else "")


def _of_row(reader: LayoutReader, files: TableFiles, cell: str) -> InputImage:
    path = cell.strip()
    if (faulty := _no_path(path)) is not None:
        return faulty
    shown = printable(path)
    if not path:
        return InputImage(shown, Path(), "the path is empty")
    found, fault = (path, None) if os.path.lexists(reader.root / path) else files.find(path)
    if fault:
        return InputImage(shown, reader.root / path, FETCH if is_address(path) else fault)
    file = reader.root / (found or path)
    if reader.outside(found or path) is not None:
        return InputImage(shown, file, f"lies outside the folder of the CSV file ({FLAG} allows it)")
    return InputImage(shown, file)


# --- Labelled images to evaluate a model on ---


EvalSplit = Literal["train", "val", "test", "all"]


def read_split_name(word: str | None) -> EvalSplit | None:
    """Return the split of a name.

    Raises:
        UsageError: there is no split of that name.
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
    split: EvalSplit | None = None,
    follow_links: bool = False,
    on_progress: Progress | None = None,
    table: TableConfig = BY_NAMES,
    target: Target = SINGLE,
) -> Dataset:
    """Return labelled images of a folder, a zip archive or a CSV file, numbered as a model's classes are.

    Args:
        data: as for training, but a split ``train`` is not required.
        classes: class names of the model, in index order.
        split: the split to read; by default ``test`` if there is one, else ``val``, else ``train``.
        follow_links: read images through links that lead out of the folder.
        on_progress: called with the entries done and their number while an archive is unpacked.
        table: how the model's training table was read; what fits a table of ``data`` applies to it too.
        target: what the model's labels are.

    Returns:
        A dataset with these classes; every image keeps the split it is found in.

    Raises:
        DataError: there are no images, the split does not exist, or a class is unknown to the model.
    """
    reader = LayoutReader(
        f"--data {printable(data)}",
        data.absolute(),
        follow_links=follow_links,
        for_evaluation=True,
        table=replace(table, target=target.kind),
    )
    is_table = read_data(reader, data, on_progress)
    if reader.target_kind != target.kind:
        found = f"gives {reader.target_kind} labels, and the model was trained on {target.kind} labels"
        raise reader.error(found, "Give a CSV file like the one that the model was trained on.")
    chosen = _choose_splits(reader, split)
    texts = () if target == SINGLE else tuple(sorted({label for own in chosen.values() for label in own}))
    samples = _number(reader, chosen, classes, target, texts)
    return Dataset(
        reader.root,
        tuple(classes),
        samples,
        tuple(reader.warnings),
        is_folder=not is_table,
        target=target,
        label_texts=texts,
    )


def _choose_splits(
    reader: LayoutReader, split: EvalSplit | None
) -> Mapping[Split, Mapping[str, Sequence[str]]]:
    given = [name for name in SPLITS if name in reader.splits]
    if split == "all":
        return reader.splits
    chosen = {name: reader.splits[name] for name in given if name == (split or given[-1])}
    if not chosen:
        raise reader.error(f"has no split {split}", f"Take --split {', '.join(given)} or all.")
    return chosen


def _are_renamed(unknown: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether at least half of the names are like one of the model's, only spelt differently."""
    return 2 * sum(bool(suggest(name, classes)) for name in unknown) >= len(unknown)


def _number(
    reader: LayoutReader,
    splits: Mapping[Split, Mapping[str, Sequence[str]]],
    classes: Sequence[str],
    target: Target,
    labels: Sequence[str],
) -> tuple[Sample, ...]:
    index = {name: number for number, name in enumerate(classes)}
    names = {name for found in splits.values() for name in target.name_outputs(found)}
    forms = {unicodedata.normalize("NFC", name): number for name, number in index.items()}
    for name in names:
        if (number := forms.get(unicodedata.normalize("NFC", name))) is not None:
            index.setdefault(name, number)
    unknown = sorted(names - index.keys())
    if unknown and len(unknown) == len(names) and not _are_renamed(unknown, classes):
        raise reader.error(
            f"holds other data: the model knows none of its {count(len(names), 'class', 'classes')} "
            f"({some(unknown)}), only {some(classes)}",
            f"Did you mean --data {printable(reader.root / inner)}?"
            if len(names) == 1 and not reader.from_archive and (inner := find_inner(reader, unknown[0]))
            else "Name images of the model's classes.",
        )
    if unknown:
        which = count(len(unknown), "class", "classes")
        raise reader.error(
            f"has {which} that the model does not know: {some(unknown)}{suggest(unknown[0], classes)}",
            "Give the class the model's name for it, or leave it out.",
        )
    if labels:
        index = {label: number for number, label in enumerate(labels)}
    return tuple(
        Sample(path, index[name], split)
        for split in SPLITS
        for path, name in sorted(
            (path, name) for name, paths in splits.get(split, {}).items() for path in paths
        )
    )
