"""Unpack an untrusted zip or tar archive into the user's cache, once.

Names and sizes in an archive are whatever its author wrote. So all names are checked before a byte is
written, bytes are counted as they are unpacked, and only images and tables are unpacked. The folder gets its
final name when it is complete, so that name never holds half an archive.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from finetune.data.decode import MAX_BYTES as MAX_FILE_BYTES
from finetune.data.entries import (
    Entry,
    GuardedFile,
    TarEntries,
    ZipEntries,
    archive_faults,
    archive_stem,
    find_readings,
    is_archive,
    is_unread_archive,
    is_utf8,
    shown_name,
)
from finetune.data.formats import is_image_name
from finetune.data.layout import (
    NAME_BYTES,
    SHOWN,
    LayoutReader,
    extension_counts,
    extensions,
    is_junk,
    is_system,
    names_in,
    quoted,
    some,
)
from finetune.data.layouts.lists import LIST_FILES, TABLES
from finetune.data.layouts.split_folders import choose, is_plain, parse
from finetune.errors import count
from finetune.runs.cache_dir import make_once
from finetune.runs.files import write_json

Progress = Callable[[int, int], None]
_Item = TypeVar("_Item")

MAX_ENTRIES = 1_000_000
MAX_BYTES = 256 * 2**30
MAX_CONTENTS_BYTES = 2**30  # size of the table of contents, which is held in memory
MAX_RATIO = 100  # unpacked to packed size; photographs are near 1
FREE_BYTES = 100 * 2**20  # unpacked size below which any ratio is allowed: flat images compress that well
MAX_PATH_BYTES = 1024
MAX_DEPTH = 32

_DRIVE = re.compile("[A-Za-z]:")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LEFT_OUT = ".left-out.json"
_CODEC = ".names.json"
_REPACK = (
    "If you know where it comes from, pack the folder again as an ordinary zip "
    "(UTF-8 names, no links, no password)."
)
_UNPACK = "If you know where it comes from, unpack it yourself, and give the folder."


def open_archive(reader: LayoutReader, file: Path, on_progress: Progress | None = None) -> Path:
    """Return the folder that holds the archive's images, unpacked now or by an earlier call.

    Raises:
        DataError: the archive is damaged, hostile, encrypted or over a limit.
        DiskError: the disk is full, or the cache cannot be written.
    """
    digest = _digest(reader, file)
    folder = make_once("archives", digest, lambda target: _unpack(reader, file, target, on_progress))
    _warn_left_out(reader, folder)
    return _entered(folder)


def find_split_archives(folder: Path) -> dict[str, Path]:
    """Return the archives of a folder's splits (``train.zip``, ``test.tar.gz``), by name without suffix.

    Empty if there is none for training, or if there are folders beside them.
    """
    names = [name for name in names_in(folder) if not is_junk(name)]
    packed = [name for name in names if is_archive(name) and (folder / name).is_file()]
    if not packed or any((folder / name).is_dir() for name in names):
        return {}
    by_stem = {archive_stem(name): folder / name for name in packed}
    chosen = choose(by_stem) if len(by_stem) == len(packed) else {}
    return {stem: by_stem[stem] for stems in chosen.values() for stem in stems} if "train" in chosen else {}


def open_split_archives(
    reader: LayoutReader, packed: Mapping[str, Path], on_progress: Progress | None = None
) -> Path:
    """Return a folder that holds the content of each archive in a folder of the archive's name.

    Raises:
        DataError: an archive leads out of the folder, or is damaged, hostile, encrypted or over a limit.
        DiskError: the disk is full, or the cache cannot be written.
    """
    for file in packed.values():
        if file.is_symlink():
            reader.leads_out(file.name)
    reader.check_links()
    _refuse_others(reader, packed)
    digests = {stem: _digest(reader, file) for stem, file in packed.items()}
    name = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]

    def unpack(target: Path) -> None:
        for stem, file in packed.items():
            (target / stem).mkdir(mode=0o700)
            _unpack(reader, file, target / stem, on_progress)

    folder = make_once("archives", name, unpack)
    for stem in packed:
        _warn_left_out(reader, folder / stem)
    files = ", ".join(repr(file.name) for file in packed.values())
    reader.warn("split-names", f"The archives {files} were read as splits.", "Rename them if that is wrong.")
    return folder


def _refuse_others(reader: LayoutReader, packed: Mapping[str, Path]) -> None:
    """Refuse an archive beside those of the splits that may be one, and is not read; warn about others."""
    folder, taken = next(iter(packed.values())).parent, {file.name for file in packed.values()}
    names = [name for name in names_in(folder) if not is_junk(name) and name not in taken]
    others = [name for name in names if is_archive(name) or is_unread_archive(name)]
    if splits := [name for name in others if is_unread_archive(name) and parse(archive_stem(name))]:
        raise reader.error(
            f"holds {some(splits)} beside {some(sorted(taken))}, and only zip, tar and tar.gz are read",
            "Unpack all of them into folders named train, val or test.",
        )
    if others:
        reader.warn(
            "ignored-file",
            f"Beside {some(sorted(taken))}, these archives are not read: {some(others)}.",
            "Unpack what belongs to the data.",
            len(others),
        )


def _digest(reader: LayoutReader, file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()[:32]
    except OSError as error:
        raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from None


def _unpack(reader: LayoutReader, file: Path, target: Path, on_progress: Progress | None) -> None:
    with _opened(reader, file) as archive:
        plan = _plan(reader, file, archive)
        _check_sizes(reader, file, plan, target.parent)
        _extract(reader, file, archive, plan, target, on_progress)
    write_json(target / _LEFT_OUT, dict(extension_counts(plan.left_out).most_common(SHOWN)))
    if plan.codec:
        odd = [name for name in sorted(plan.folders | plan.files.keys()) if not name.isascii()]
        write_json(target / _CODEC, plan.codec + (f", as in {quoted(odd[0])}" if odd else ""))


@contextmanager
def _opened(reader: LayoutReader, file: Path) -> Iterator[ZipEntries | TarEntries]:
    """Yield the open archive; of a zip, the table of contents has been read."""
    if file.suffix.lower() != ".zip":
        packed = file.stat().st_size
        yield TarEntries(file, lambda size: _check_unpacked(reader, size, packed))
        return
    with _faults(reader, file):
        guarded = GuardedFile(reader, file, MAX_CONTENTS_BYTES, MAX_ENTRIES, _UNPACK)
    with guarded:
        with _faults(reader, file):
            archive = ZipEntries(guarded)
        yield archive


def _check_unpacked(reader: LayoutReader, size: int, packed: int) -> None:
    """Refuse a tar file that grows too large, also by what is not unpacked, before more of it is read."""
    if fault := _size_fault(0, size, packed):
        raise reader.error(fault, _UNPACK)


def _faults(reader: LayoutReader, file: Path) -> AbstractContextManager[None]:
    return archive_faults(reader, "zip" if file.suffix.lower() == ".zip" else "tar", _REPACK)


@dataclass
class _Plan:
    """What is unpacked of an archive, and what is left out.

    Attributes:
        files: entries to unpack, by path.
        folders: every folder, including those without images: an empty class must be reported, not dropped.
        left_out: paths of files that are not images; neither read nor written.
        codec: encoding of the names that are not UTF-8; "" if there are none, or if it is not certain.
    """

    files: dict[str, Entry] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
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
        self.folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if name.endswith("/"):
            self.folders.add("/".join(parts))
            return None
        return self._add_file(entry, "/".join(parts))

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


def _plan(reader: LayoutReader, file: Path, archive: ZipEntries | TarEntries) -> _Plan:
    """Check every entry before anything is written; report all faulty ones together, by name."""
    entries = []
    with _faults(reader, file):
        for entry in archive.entries():
            entries.append(entry)
            if len(entries) > MAX_ENTRIES:
                raise reader.error(f"holds more than {MAX_ENTRIES} files", _UNPACK)
    readings = find_readings(
        part for entry in entries if not is_utf8(entry.raw) for part in entry.raw.split(b"/")
    )
    plan = _Plan(codec=next(iter(readings), "") if len(readings) == 1 else "")
    faults = []
    for entry in entries:
        name = _decoded(entry.raw, plan.codec)
        if fault := plan.add(entry, name):
            may_be = _may_be(entry.raw, readings) if name is None else ""
            faults.append((shown_name(entry.raw, plan.codec), fault + may_be))
    both = sorted(plan.folders & (plan.files.keys() | plan.left_out))
    faults += [(name, "is both a file and a folder") for name in both]
    if not faults:
        return plan
    shown = [f"{quoted(name)} {fault}" for name, fault in faults[:SHOWN]]
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    raise reader.error(
        f"{count(len(faults), 'entry is', 'entries are')} not what a plain archive of images holds:"
        + "".join(f"\n  {line}" for line in shown + more),
        _REPACK,
    )


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


def _check_sizes(reader: LayoutReader, file: Path, plan: _Plan, cache: Path) -> None:
    """Refuse an archive whose declared sizes are too large, before anything is written."""
    sizes = [entry.size for entry in plan.files.values()]
    if fault := _size_fault(max(sizes, default=0), sum(sizes), file.stat().st_size):
        raise reader.error(fault, _UNPACK)
    if sum(sizes) > shutil.disk_usage(cache).free:
        raise OSError(errno.ENOSPC, f"the archive needs {_megabytes(sum(sizes))}")


def _size_fault(of_file: int, in_all: int, packed: int) -> str | None:
    """Return which limit the bytes of one file, or of all files so far, exceed, or None."""
    if of_file > MAX_FILE_BYTES:
        return f"holds a file of more than {_megabytes(MAX_FILE_BYTES)}"
    if in_all > MAX_BYTES:
        return f"holds more than {_megabytes(MAX_BYTES)}"
    if in_all > FREE_BYTES and in_all > MAX_RATIO * packed:
        return f"grows to more than {MAX_RATIO} times its size, as an archive made to fill a disk does"
    return None


def _megabytes(size: int) -> str:
    return f"{-(-size // 2**20)} MB"


def _extract(
    reader: LayoutReader,
    file: Path,
    archive: ZipEntries | TarEntries,
    plan: _Plan,
    target: Path,
    on_progress: Progress | None,
) -> None:
    """Write the planned files, counting the bytes that are really unpacked."""
    packed, in_all = file.stat().st_size, 0
    for folder in plan.folders:
        (target / folder).mkdir(parents=True, exist_ok=True)
    contents = _guarded(reader, file, archive.contents(plan.files))
    for done, (path, chunks) in enumerate(contents, 1):
        size = 0
        with (target / path).open("xb") as output:
            for chunk in _guarded(reader, file, chunks):
                size, in_all = size + len(chunk), in_all + len(chunk)
                if fault := _size_fault(size, in_all, packed):
                    raise reader.error(fault, _UNPACK)
                output.write(chunk)
        if size != plan.files[path].size:
            found = f"is damaged: {quoted(path)} has {size} bytes, and should have {plan.files[path].size}"
            raise reader.error(found, "Get it or make it again.")
        if on_progress:
            on_progress(done, len(plan.files))


def _guarded(reader: LayoutReader, file: Path, items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items of an archive; errors of reading them become a DataError, others stay what they are."""
    while True:
        with _faults(reader, file):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _warn_left_out(reader: LayoutReader, folder: Path) -> None:
    """Warn about files that are not used, also if the archive was unpacked by an earlier call."""
    with suppress(OSError, ValueError):
        others = Counter(json.loads((folder / _LEFT_OUT).read_text(encoding="utf-8")))
        reader.left_out += others
        if others:
            reader.warnings.append(
                f"Files in the archive that are not images are left out{extensions(others, ': ')}."
            )
    with suppress(OSError, ValueError):
        codec = json.loads((folder / _CODEC).read_text(encoding="utf-8"))
        reader.warn(
            "archive-names",
            f"Names in the archive are not UTF-8, and were read as {codec}.",
            "Pack it again with UTF-8 names if they are wrong.",
        )


def _entered(folder: Path) -> Path:
    """Return the folder below the single folders that many archives hold at the top, or the folder itself."""
    while True:
        inside = [entry for entry in os.scandir(folder) if not is_junk(entry.name)]
        if len(inside) != 1 or not inside[0].is_dir() or is_plain(inside[0].name):
            return folder
        top = Path(inside[0].path)  # a folder that holds images is a class; one that holds lists is not
        if any(map(is_image_name, names_in(top))):
            return folder
        folder = top
