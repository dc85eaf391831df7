"""Unpack an untrusted zip archive into the user's cache, once.

Names and sizes in an archive are whatever its author wrote. So all names are checked before a byte is
written, bytes are counted as they are unpacked, and only images and tables are unpacked. The folder gets its
final name when it is complete, so that name never holds half an archive.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from finetune.data.decode import MAX_BYTES as MAX_FILE_BYTES
from finetune.data.formats import is_image_name
from finetune.data.layout import (
    NAME_BYTES,
    SHOWN,
    SPLIT_NAMES,
    LayoutReader,
    count,
    extension_counts,
    extensions,
    is_junk,
    printable,
    quoted,
)
from finetune.data.samples import is_sample, open_sample
from finetune.errors import DataError
from finetune.runs.cache_dir import make_once
from finetune.runs.files import write_json

Progress = Callable[[int, int], None]

MAX_ENTRIES = 1_000_000
MAX_BYTES = 256 * 2**30
MAX_CONTENTS_BYTES = 2**30  # size of the table of contents, which is held in memory
MAX_RATIO = 100  # unpacked to packed size; photographs are near 1
FREE_BYTES = 100 * 2**20  # unpacked size below which any ratio is allowed: flat images compress that well
MAX_PATH_BYTES = 1024
MAX_DEPTH = 32

KINDS = {
    ".tar": "tar", ".tgz": "tar", ".tbz2": "tar", ".txz": "tar", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz",
    ".zst": "zstd", ".7z": "7-Zip", ".rar": "RAR",
}  # fmt: skip
"""Archives that are refused: Python versions in use unpack a hostile tar outside its target folder."""

_CHUNK = 2**20
_DRIVE = re.compile("[A-Za-z]:")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LEFT_OUT = ".left-out.json"
_ENCRYPTED = 0x1 | 0x40  # flag bits: encryption, strong encryption
_UTF8 = 0x800  # flag bit: zipfile has decoded the name as UTF-8, not as code page 437
_REPACK = (
    "If you know where it comes from, pack the folder again as an ordinary zip "
    "(UTF-8 names, no links, no password)."
)
_UNPACK = "If you know where it comes from, unpack it yourself, and give the folder."


def find_root(data: Path) -> Path | None:
    """Return the folder that the paths of a dataset are relative to; None if it no longer exists.

    Args:
        data: the folder, CSV file, archive or sample that the user named.

    Raises:
        DataError: the archive can no longer be unpacked.
        UsageError: there is no sample of this name.
    """
    if is_sample(data):
        return open_sample(data)
    if os.path.isdir(data):  # noqa: PTH112 (Path.is_dir raises below a closed folder)
        return data
    if not os.path.isfile(data):  # noqa: PTH113
        return None
    if data.suffix.lower() == ".zip":
        return open_archive(LayoutReader(f"--data {printable(data)}", data.absolute()), data)
    return data.parent


def open_archive(reader: LayoutReader, file: Path, on_progress: Progress | None = None) -> Path:
    """Return the folder that holds the archive's images, unpacked now or by an earlier call.

    Raises:
        DataError: the archive is damaged, hostile, encrypted or over a limit.
        DiskError: the disk is full, or the cache cannot be written.
    """
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()[:32]
    except OSError as error:
        raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from None
    folder = make_once("archives", digest, lambda target: _unpack(reader, file, target, on_progress))
    _warn_left_out(reader, folder)
    return _entered(folder)


def _unpack(reader: LayoutReader, file: Path, target: Path, on_progress: Progress | None) -> None:
    with _opened(reader, file) as archive:
        plan = _plan(reader, archive)
        _check_sizes(reader, file, plan, target.parent)
        _extract(reader, archive, plan, target, on_progress)
    write_json(target / _LEFT_OUT, dict(extension_counts(plan.left_out).most_common(SHOWN)))


class _Guarded(io.FileIO):
    """A file that refuses an overlong table of contents, which zipfile would read into memory at once."""

    def __init__(self, reader: LayoutReader, file: Path) -> None:
        super().__init__(file)
        self.reader = reader

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes, unless they are too many for a table of contents."""
        data = b"" if (size or 0) > MAX_CONTENTS_BYTES else super().read(size) or b""
        if (size or 0) > MAX_CONTENTS_BYTES or data.count(b"PK\1\2") > MAX_ENTRIES:
            raise self.reader.error(f"holds more than {MAX_ENTRIES} files", _UNPACK)
        return data


@contextmanager
def _opened(reader: LayoutReader, file: Path) -> Iterator[ZipFile]:
    """Yield the open archive, its table of contents read."""
    with ExitStack() as stack:
        with _zip_faults(reader):
            archive = ZipFile(stack.enter_context(_Guarded(reader, file)))
        yield archive


@contextmanager
def _zip_faults(reader: LayoutReader) -> Iterator[None]:
    """Convert every error of reading into a DataError: zipfile raises a dozen kinds."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise reader.error(f"holds the name {error.object!r}, which is not UTF-8", _REPACK) from None
    except OSError as error:
        raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from None
    except Exception as error:
        message = printable(" ".join(str(error).split())[:120] or type(error).__name__)
        found = f"is truncated, damaged or not a zip archive ({message})"
        raise reader.error(found, "Get it or make it again.") from None


@dataclass
class _Plan:
    """What is unpacked of an archive, and what is left out.

    Attributes:
        files: entries to unpack, by path.
        folders: every folder, including those without images: an empty class must be reported, not dropped.
        left_out: paths of files that are not images; neither read nor written.
    """

    files: dict[str, ZipInfo] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)

    def add(self, entry: ZipInfo) -> str | None:
        """Add an entry, or return why it cannot be trusted."""
        name = _decoded(entry)
        if name is None:
            return "is not UTF-8"
        if fault := _path_fault(name):
            return fault
        parts = [part for part in name.split("/") if part not in {"", "."}]
        if any(map(is_junk, parts)):
            return None
        self.folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if name.endswith("/"):
            self.folders.add("/".join(parts))
            return None
        return self._add_file(entry, "/".join(parts))

    def _add_file(self, entry: ZipInfo, path: str) -> str | None:
        if stat.S_IFMT(entry.external_attr >> 16) not in {0, stat.S_IFREG}:
            return "is a link or another kind of entry that is not a file"
        if path in self.files or path in self.left_out:
            return "is in there twice"
        if not is_image_name(path) and not path.lower().endswith(".csv"):
            self.left_out.add(path)
            return None
        if entry.flag_bits & _ENCRYPTED:
            return "is encrypted"
        if entry.compress_type not in {ZIP_STORED, ZIP_DEFLATED}:
            # zipfile decompresses other methods without a limit: a kilobyte of bzip2 may fill the memory.
            return f"is packed by method {entry.compress_type}; only stored and deflated files are read"
        self.files[path] = entry
        return None


def _plan(reader: LayoutReader, archive: ZipFile) -> _Plan:
    """Check every entry before anything is written; report all faulty ones together, by name."""
    plan = _Plan()
    faults = [(entry.orig_filename, fault) for entry in archive.infolist() if (fault := plan.add(entry))]
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


def _decoded(entry: ZipInfo) -> str | None:
    """Return the name as UTF-8, or None. Many packers write UTF-8 without setting the flag."""
    if entry.flag_bits & _UTF8:
        return entry.orig_filename
    try:
        return entry.orig_filename.encode("cp437").decode()
    except UnicodeError:
        return None


def _path_fault(name: str) -> str | None:
    """Return why a name is not a safe path below the target folder, or None."""
    parts = name.split("/")
    faults = {
        "is an absolute path": name.startswith("/") or _DRIVE.match(name),
        "leads upwards": ".." in parts,
        "holds a backslash": "\\" in name,
        "holds a control character or a line break": _CONTROL.search(name),
        "is too long": len(parts) > MAX_DEPTH or len(name.encode()) > MAX_PATH_BYTES,
        "has a part that is too long": max(len(part.encode()) for part in parts) > NAME_BYTES,
        "is no name": parts[-1] == "." or not name,
    }
    return next((fault for fault, found in faults.items() if found), None)


def _check_sizes(reader: LayoutReader, file: Path, plan: _Plan, cache: Path) -> None:
    """Refuse an archive whose declared sizes are too large, before anything is written."""
    sizes = [entry.file_size for entry in plan.files.values()]
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
    reader: LayoutReader, archive: ZipFile, plan: _Plan, target: Path, on_progress: Progress | None
) -> None:
    """Write the planned files, counting the bytes that are really unpacked."""
    assert archive.fp is not None
    packed = os.fstat(archive.fp.fileno()).st_size
    in_all = 0
    for folder in plan.folders:
        (target / folder).mkdir(parents=True, exist_ok=True)
    for done, (path, entry) in enumerate(plan.files.items(), 1):
        size = 0
        with (target / path).open("xb") as output:
            for chunk in _chunks(reader, archive, entry):
                size, in_all = size + len(chunk), in_all + len(chunk)
                if fault := _size_fault(size, in_all, packed):
                    raise reader.error(fault, _UNPACK)
                output.write(chunk)
        if size != entry.file_size:
            found = f"is damaged: {quoted(path)} has {size} bytes, and should have {entry.file_size}"
            raise reader.error(found, "Get it or make it again.")
        if on_progress:
            on_progress(done, len(plan.files))


def _chunks(reader: LayoutReader, archive: ZipFile, entry: ZipInfo) -> Iterator[bytes]:
    """Yield the content of a file in chunks; zipfile checks its checksum at the end."""
    with _zip_faults(reader), archive.open(entry) as source:
        while chunk := source.read(_CHUNK):
            yield chunk


def _warn_left_out(reader: LayoutReader, folder: Path) -> None:
    """Warn about files that are not used, also if the archive was unpacked by an earlier call."""
    with suppress(OSError, ValueError):
        others = Counter(json.loads((folder / _LEFT_OUT).read_text(encoding="utf-8")))
        if others:
            reader.warnings.append(
                f"Files in the archive that are not images are left out{extensions(others, ': ')}."
            )


def _entered(folder: Path) -> Path:
    """Return the single folder that many archives hold at the top, or else the folder itself."""
    inside = [entry for entry in os.scandir(folder) if not is_junk(entry.name)]
    if len(inside) != 1 or not inside[0].is_dir() or inside[0].name.lower() in SPLIT_NAMES:
        return folder
    # A folder that holds files is a class.
    return Path(inside[0].path) if all(entry.is_dir() for entry in os.scandir(inside[0])) else folder
