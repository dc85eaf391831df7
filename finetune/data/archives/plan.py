"""Decide what of an untrusted archive is unpacked, from its names and sizes, before a byte is written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

from finetune.data.archives.entries import Entry, find_readings, is_utf8, shown_name
from finetune.data.decode import MAX_BYTES as MAX_FILE_BYTES
from finetune.data.formats import is_image_name
from finetune.data.layout import NAME_BYTES, SHOWN, LayoutReader, is_junk, is_system, quoted
from finetune.data.layouts.lists import LIST_FILES, TABLES
from finetune.errors import DataError, count

MAX_ENTRIES = 1_000_000  # files and folders
MAX_BYTES = 256 * 2**30
MAX_NAMES_BYTES = 256 * 2**20  # names, and the rest of a zip's table of contents, are held in memory
MAX_RATIO = 100  # unpacked to packed size; photographs are near 1
FREE_BYTES = 100 * 2**20  # unpacked size below which any ratio is allowed: flat images compress that well
MAX_PATH_BYTES = 1024
MAX_DEPTH = 32
BLOCK = 4096
"""Bytes on the disk that a folder takes, and that those of a file are a multiple of."""

REPACK = (
    "If you know where it comes from, pack the folder again as an ordinary zip "
    "(UTF-8 names, no links, no password)."
)
UNPACK = "If you know where it comes from, unpack it yourself, and give the folder."
_DRIVE = re.compile("[A-Za-z]:")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass
class Plan:
    """What is unpacked of an archive, and what is left out.

    Attributes:
        files: entries to unpack, by path.
        left_out: paths of files that are not images; neither read nor written.
        named: paths of folders that have an entry of their own.
        folders: every folder to make: those that hold a file to unpack, and of all others the ones beside
            them, since an empty class must be reported, not dropped. What these hold is not made: thousands
            of folders cost an archive nothing.
        codec: encoding of the names that are not UTF-8; "" if there are none, or if it is not certain.
    """

    files: dict[str, Entry] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    codec: str = ""

    def add(self, entry: Entry, name: str | None) -> str | None:
        """Add an entry, or return why it cannot be trusted."""
        if name is None:
            return "is not UTF-8"
        if fault := _path_fault(name):
            return fault
        parts = [part for part in name.split("/") if part not in {"", "."}]
        if any(map(is_system, parts)) or (any(map(is_junk, parts)) and not is_image_name(name)):
            return None
        path = "/".join(parts)
        if name.endswith("/"):
            self.named.add(path)
            return None
        return self._add_file(entry, path)

    def _add_file(self, entry: Entry, path: str) -> str | None:
        if entry.kind_fault:
            return entry.kind_fault
        if path in self.files or path in self.left_out:
            return "is in there twice"
        extension = os.path.splitext(path)[1].lower()  # noqa: PTH122
        if not is_image_name(path) and extension not in TABLES and path.rpartition("/")[2] not in LIST_FILES:
            self.left_out.add(path)
            return None
        if entry.content_fault:
            return entry.content_fault
        self.files[path] = entry
        return None

    def find_folders(self, most: int) -> None:
        """Find the folders to make, after the last entry; not many more than ``most`` are looked for."""
        holders = {""}
        for path in self.files:
            folder = path.rpartition("/")[0]
            while folder not in holders:
                holders.add(folder)
                folder = folder.rpartition("/")[0]
            if len(holders) > most:
                break
        others = self.named | {path.rpartition("/")[0] for path in self.left_out}
        beside = {path for folder in others for path in islice(_outside(folder, holders), 1)}
        self.folders = (holders | beside) - {""}


def _outside(folder: str, holders: set[str]) -> Iterator[str]:
    """Yield the folders on the way down to a folder, and itself, that are not among the holders."""
    return (path for path in accumulate(folder.split("/"), "{}/{}".format) if path not in holders)


def make_plan(reader: LayoutReader, entries: Iterable[Entry]) -> Plan:
    """Return what to unpack of an archive's entries.

    Raises:
        DataError: entries are faulty, which are reported together, by name; or there are too many.
    """
    held = _hold(reader, entries)
    readings = find_readings(
        part for entry in held if not is_utf8(entry.raw) for part in entry.raw.split(b"/")
    )
    plan = Plan(codec=next(iter(readings), "") if len(readings) == 1 else "")
    faults = _faults(plan, held, readings)
    lines = [f"\n  {quoted(name)} {fault}" for name, fault in islice(faults, SHOWN)]
    more = sum(1 for _ in faults)
    if lines:
        found = count(len(lines) + more, "entry is", "entries are")
        lines += [f"\n  and {more} more"] if more else []
        raise reader.error(f"{found} not what a plain archive of images holds:{''.join(lines)}", REPACK)
    if len(plan.files) + len(plan.folders) > MAX_ENTRIES:
        raise too_many(reader)
    return plan


def _hold(reader: LayoutReader, entries: Iterable[Entry]) -> list[Entry]:
    """Return all entries: only together their names tell in which encoding they are."""
    held: list[Entry] = []
    in_all = 0
    for entry in entries:
        held.append(entry)
        in_all += len(entry.raw)
        if len(held) > MAX_ENTRIES or in_all > MAX_NAMES_BYTES:
            raise too_many(reader)
    return held


def too_many(reader: LayoutReader) -> DataError:
    """Return the error of an archive with more entries, or with longer names, than are held in memory."""
    most = f"{MAX_NAMES_BYTES // 2**20} MB of their names"
    return reader.error(f"holds more than {MAX_ENTRIES} files and folders, or more than {most}", UNPACK)


def _faults(
    plan: Plan, entries: Iterable[Entry], readings: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """Add all entries to a plan; yield name and fault of those that cannot be trusted."""
    for entry in entries:
        name = _decoded(entry.raw, plan.codec)
        if fault := plan.add(entry, name):
            may_be = _may_be(entry.raw, readings) if name is None else ""
            yield shown_name(entry.raw, plan.codec), fault + may_be
    plan.find_folders(MAX_ENTRIES)
    for path in sorted(plan.folders & (plan.files.keys() | plan.left_out)):
        yield path, "is both a file and a folder"


def _may_be(raw: bytes, readings: Iterable[str]) -> str:
    """Return what a name says in each encoding that fits all names of the archive."""
    texts = [f"{raw.decode(codec)!r} ({codec})" for codec in readings]
    return f", and may be {' or '.join(texts)}" if texts else ""


def _decoded(raw: bytes, codec: str) -> str | None:
    """Return a name with ``/`` between its parts, or None if its encoding is unknown.

    Many packers write UTF-8 without setting the flag, and some on Windows separate the parts by a backslash.
    """
    if not is_utf8(raw) and not codec:
        return None
    return raw.decode("utf-8" if is_utf8(raw) else codec).replace("\\", "/")


def _path_fault(name: str) -> str | None:
    """Return why a name is not a safe path below the target folder, or None."""
    parts = name.split("/")
    faults = {
        "is an absolute path": name.startswith("/") or _DRIVE.match(name),
        "leads upwards": ".." in parts,
        "holds a control character or a line break": _CONTROL.search(name),
        "is too long": len(parts) > MAX_DEPTH or len(name.encode()) > MAX_PATH_BYTES,
        "has a part that is too long": max(len(part.encode()) for part in parts) > NAME_BYTES,
        "is no name": parts[-1] == "." or not name,
    }
    return next((fault for fault, found in faults.items() if found), None)


def check_sizes(reader: LayoutReader, plan: Plan, packed: int, cache: Path) -> None:
    """Check what the declared sizes, and the folders, take on the disk, before anything is written.

    Args:
        reader: reports it.
        plan: what is unpacked.
        packed: size of the archive in bytes.
        cache: folder on the disk that it is unpacked to.

    Raises:
        DataError: the sizes exceed a limit.
        OSError: the disk has too little space.
    """
    sizes = [entry.size for entry in plan.files.values()]
    blocks = len(plan.folders) + sum(-(-max(size, 1) // BLOCK) for size in sizes)
    if fault := find_size_fault(max(sizes, default=0), blocks * BLOCK, packed):
        raise reader.error(fault, UNPACK)
    if blocks * BLOCK > shutil.disk_usage(cache).free:
        raise OSError(errno.ENOSPC, f"the archive needs {_megabytes(blocks * BLOCK)}")


def find_size_fault(of_file: int, in_all: int, packed: int) -> str | None:
    """Return which limit the bytes of one file, or of all files so far, exceed, or None.

    Args:
        of_file: bytes of the largest file.
        in_all: bytes of all files together.
        packed: bytes of the archive.
    """
    if of_file > MAX_FILE_BYTES:
        return f"holds a file of more than {_megabytes(MAX_FILE_BYTES)}"
    if in_all > MAX_BYTES:
        return f"holds more than {_megabytes(MAX_BYTES)}"
    if in_all > FREE_BYTES and in_all > MAX_RATIO * packed:
        return f"grows to more than {MAX_RATIO} times its size, as an archive made to fill a disk does"
    return None


def _megabytes(size: int) -> str:
    return f"{-(-size // 2**20)} MB"
