"""Entries of untrusted archives: the members of a tar file, and names in any encoding.

A tar file is read from its beginning to its end, without :func:`tarfile.TarFile.extractall` and its filters,
which several versions of Python in use let a hostile archive pass. Only headers are left to :mod:`tarfile`.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from finetune.data.layout import LayoutReader, printable
from finetune.errors import DataError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SUFFIXES = (".zip", *TAR_SUFFIXES)
KINDS = {
    ".tbz2": "tar (bzip2)", ".txz": "tar (xz)", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd",
    ".7z": "7-Zip", ".rar": "RAR",
}  # fmt: skip
"""Archives that are refused: their unpackers have no limits, or are not part of Python."""

CHUNK = 2**20
_MANY_DIGITS = re.compile(rb"[0-9]{256}")
"""More than a part of a name may have. Before 3.11.10 and 3.12.6, tarfile needs hours for such a header."""
_MOST_FIELDS = 1000
"""Fields for all members of a tar file (``git archive`` writes one), which tarfile copies for each."""
_UTF8 = 0x800  # flag bit of a zip entry: zipfile has decoded the name as UTF-8, not as code page 437
_ENCRYPTED = 0x1 | 0x40  # flag bits: encryption, strong encryption
_ENTRY = b"PK\1\2"  # the start of an entry in a zip's table of contents
_MOST_EXTRA = 4096
"""Bytes of the extra fields of an entry of a zip; packers write up to some hundred."""
_UNICODE_PATH = 0x7075  # extra field of a zip entry: the name as UTF-8


def is_archive(name: str) -> bool:
    """Return whether a file's name says that it is an archive that is read."""
    return name.lower().endswith(SUFFIXES)


def is_unread_archive(name: str) -> bool:
    """Return whether a file's name says that it is an archive of a kind that is not read."""
    return Path(name).suffix.lower() in KINDS and not name.lower().endswith((*SUFFIXES, ".csv.gz", ".tsv.gz"))


def archive_stem(name: str) -> str:
    """Return the name of an archive without its suffix: ``train`` for ``train.tar.gz``."""
    endings = (*SUFFIXES, *KINDS, *(f".tar{kind}" for kind in KINDS))
    suffix = max((suffix for suffix in endings if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(suffix)]


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of an archive.

    Attributes:
        raw: its name as bytes; a folder ends with ``/``.
        size: bytes that its header declares.
        kind_fault: why it is neither a file nor a folder; "" if it is.
        content_fault: why its content is not read; "" if it is.
        source: what its content is read from: the entry of a zip, or the number of a tar file's member.
    """

    raw: bytes
    size: int
    kind_fault: str
    content_fault: str
    source: Any


@contextmanager
def archive_faults(reader: LayoutReader, kind: str, repack: str) -> Iterator[None]:
    """Convert every error of reading into a DataError: zipfile and tarfile raise a dozen kinds."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise reader.error(f"holds the name {error.object!r}, which is not UTF-8", repack) from None
    except OSError as error:
        if error.strerror:  # not one of gzip's own, which have no number
            raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from None
        raise _damaged(reader, kind, error) from None
    except Exception as error:
        raise _damaged(reader, kind, error) from None


def _damaged(reader: LayoutReader, kind: str, error: Exception) -> DataError:
    message = printable(" ".join(str(error).split())[:120] or type(error).__name__)
    found = f"is truncated, damaged or not a {kind} archive ({message})"
    return reader.error(found, "Get it or make it again.")


# --- zip ---


class GuardedFile(io.FileIO):
    """A file that refuses an overlong table of contents, which zipfile would read into memory at once.

    Args:
        file: the zip archive.
        most_bytes: largest size of the table of contents.
        most_entries: largest number of its entries.
        error: raised if it is larger.
    """

    def __init__(self, file: Path, most_bytes: int, most_entries: int, error: DataError) -> None:
        super().__init__(file)
        self.most_bytes, self.most_entries, self.error = most_bytes, most_entries, error

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes, unless they are too many for a table of contents."""
        data = b"" if (size or 0) > self.most_bytes else super().read(size) or b""
        if (size or 0) > self.most_bytes or data.count(_ENTRY) > self.most_entries:
            raise self.error
        if _longest_extra(data) > _MOST_EXTRA:
            raise BadZipFile("extra fields of an impossible length")
        return data


def _longest_extra(content: bytes) -> int:
    """Return the largest size of the extra fields of an entry, if this is a table of contents; else 0.

    zipfile copies the rest of them for each field, so that its time is quadratic: 16 MB of them took
    9 s.
    """
    longest = at = 0
    while content.startswith(_ENTRY, at) and at + 46 <= len(content):
        name, extra, comment = struct.unpack_from("<HHH", content, at + 28)
        longest, at = max(longest, extra), at + 46 + name + extra + comment
    return longest


class ZipEntries:
    """The entries of a zip archive."""

    def __init__(self, file: GuardedFile) -> None:
        self.archive = ZipFile(file)

    def entries(self) -> Iterator[Entry]:
        """Yield every entry."""
        for entry in self.archive.infolist():
            is_plain = stat.S_IFMT(entry.external_attr >> 16) in {0, stat.S_IFREG}
            kind_fault = "" if is_plain else "is a link or another kind of entry that is not a file"
            yield Entry(raw_name(entry), entry.file_size, kind_fault, _zip_fault(entry), entry)

    def contents(self, files: Mapping[str, Entry]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield path and content of each planned file; zipfile checks the checksum at the end."""
        for path, entry in files.items():
            yield path, self._chunks(entry.source)

    def _chunks(self, entry: ZipInfo) -> Iterator[bytes]:
        with self.archive.open(entry) as source:
            while chunk := source.read(CHUNK):
                yield chunk


def _zip_fault(entry: ZipInfo) -> str:
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if entry.compress_type not in {ZIP_STORED, ZIP_DEFLATED}:
        # zipfile decompresses other methods without a limit: a kilobyte of bzip2 may fill the memory.
        return f"is packed by method {entry.compress_type}; only stored and deflated files are read"
    return ""


# --- tar ---


class _ForwardFile:
    """The bytes of a tar file, unpacked if it is a gzip, which are read once and counted.

    Args:
        file: the open file.
        check: called with the number of bytes so far; raises if they are too many.

    Attributes:
        of_headers: bytes that were read as headers since it was last set to 0.
    """

    def __init__(self, file: io.BufferedReader, check: Callable[[int], None]) -> None:
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        self.source: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
        self.check, self.position, self.last = check, 0, b""
        self.of_headers = 0

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes of a header; those of one member are never longer than a chunk."""
        self.of_headers += size
        if size < 0 or self.of_headers > CHUNK:
            raise tarfile.ReadError("a header of an impossible length")
        data = self.take(size)
        if _MANY_DIGITS.search(data):
            raise tarfile.ReadError("a number of an impossible length")
        return data

    def take(self, size: int) -> bytes:
        """Read up to ``size`` bytes, a chunk at most."""
        parts = []
        while size and (part := self.source.read(size)):
            parts.append(part)
            size, self.position = size - len(part), self.position + len(part)
        self.check(self.position)
        self.last = b"".join(parts)
        return self.last

    def tell(self) -> int:
        """Return the number of bytes read."""
        return self.position

    def seek(self, position: int) -> None:
        """Read on to a position; never back, since unpacking would begin anew each time."""
        if position < self.position:
            raise tarfile.ReadError("entries that overlap")
        while self.position < position:
            if not self.take(min(CHUNK, position - self.position)):
                raise tarfile.ReadError("unexpected end of data")


class TarEntries:
    """The members of a tar file, read in order; its content is read again to unpack it.

    Args:
        file: the tar file, plain or packed by gzip.
        check: called with the number of bytes so far; raises if they are too many.
    """

    def __init__(self, file: Path, check: Callable[[int], None]) -> None:
        self.file, self.check = file, check

    def entries(self) -> Iterator[Entry]:
        """Yield every member; none of them is held in memory."""
        for number, (member, _) in enumerate(self._members()):
            is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            fault = (
                "" if is_plain or member.isdir() else "is a link or another kind of entry that is not a file"
            )
            raw = member.name.encode("utf-8", "surrogateescape") + b"/" * member.isdir()
            yield Entry(raw, member.size, fault, "", number)

    def contents(self, files: Mapping[str, Entry]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield path and content of each planned file, in the order of the archive."""
        paths = {entry.source: path for path, entry in files.items()}
        for number, (member, stream) in enumerate(self._members()):
            if number in paths:
                yield paths[number], self._chunks(stream, member.size)

    def _chunks(self, stream: _ForwardFile, size: int) -> Iterator[bytes]:
        while size > 0 and (chunk := stream.take(min(CHUNK, size))):
            size -= len(chunk)
            yield chunk

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, _ForwardFile]]:
        with self.file.open("rb") as file:
            stream = _ForwardFile(file, self.check)
            archive = tarfile.TarFile(fileobj=stream, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header
                stream.of_headers = 0
                if len(archive.pax_headers) > _MOST_FIELDS:
                    raise tarfile.ReadError("too many fields in headers for all members")
                if member.size < 0 or archive.offset < stream.tell():
                    raise tarfile.ReadError("a negative size")
                yield member, stream
            if not stream.last or stream.last.strip(b"\0"):
                raise tarfile.ReadError("its end is missing")


# --- names ---


_CODECS = (
    (
        ("cp437", ("LATIN",)), ("cp850", ("LATIN",)), ("cp852", ("LATIN",)), ("cp866", ("CYRILLIC",)),
        ("cp932", ("HIRAGANA", "KATAKANA", "CJK")), ("gb2312", ("CJK",)), ("big5", ("CJK",)),
        ("euc_kr", ("HANGUL",)),
    ),
    (("cp1252", ("LATIN",)), ("cp1250", ("LATIN",)), ("cp1251", ("CYRILLIC",))),
)  # fmt: skip
"""Encodings of names that packers write without saying so, and the scripts that each is used for.

First what zip tools of DOS and Windows write; the others only where none of these fits.
"""
_RARE_BIG5 = re.compile(rb"[\xc7-\xfe][\x40-\x7e\xa1-\xfe]")
_WORD = re.compile(r"[^\W\d_]+")


def raw_name(entry: ZipInfo) -> bytes:
    """Return the bytes of a zip entry's name; UTF-8 if the entry says so in any of the two ways."""
    if entry.flag_bits & _UTF8:
        return entry.orig_filename.encode("utf-8", "surrogateescape")
    raw = entry.orig_filename.encode("cp437")
    checksum, at = struct.pack("<I", zlib.crc32(raw)), 0
    while at + 4 <= len(entry.extra):
        kind, size = struct.unpack_from("<HH", entry.extra, at)
        field = entry.extra[at + 4 : at + 4 + size]
        at += 4 + size
        if kind == _UNICODE_PATH and len(field) > 5 and field[1:5] == checksum:
            return field[5:]
    return raw


def is_utf8(raw: bytes) -> bool:
    """Return whether bytes are UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def find_readings(names: Iterable[bytes]) -> dict[str, Sequence[str]]:
    """Return what names may say that are not UTF-8: for each plausible encoding, the names.

    Encodings that give the same names count once. All names together decide: the more there are, the fewer
    encodings fit. A name is plausible if its letters belong to the script that the encoding is used for, and
    no word mixes scripts or has capitals after small letters.
    """
    raws = sorted(set(names))
    readings: dict[str, Sequence[str]] = {}
    for codecs in _CODECS if raws else ():
        for codec, scripts in codecs:
            texts = _read_all(raws, codec)
            if texts not in [None, *readings.values()] and all(
                _is_plausible(text, scripts) for text in texts or ()
            ):
                readings[codec] = texts or []
        if readings:
            break
    return readings


def _read_all(raws: Sequence[bytes], codec: str) -> list[str] | None:
    try:
        texts = [raw.decode(codec) for raw in raws]
    except UnicodeDecodeError:
        return None
    # Nearly all pairs of bytes are some character of Big5; names use the common ones.
    return None if codec == "big5" and any(map(_RARE_BIG5.search, raws)) else texts


def _is_plausible(text: str, scripts: tuple[str, ...]) -> bool:
    if not all(char.isascii() or char.isalpha() for char in text):
        return False
    words = [word for word in _WORD.findall(text) if not word.isascii()]
    if scripts == ("LATIN",):
        return all(_is_in(char, scripts) for word in words for char in word if not char.isascii()) and all(
            (word.isupper() or word[1:].islower() or len(word) == 1)
            and (len(word) < 3 or any(map(str.isascii, word)))
            for word in words
        )
    is_cased = all(word.isupper() or not any(map(str.isupper, word[1:])) for word in words)
    return is_cased and all(_is_in(char, scripts) for word in words for char in word)


@cache
def _is_in(char: str, scripts: tuple[str, ...]) -> bool:
    return unicodedata.name(char, "").startswith(scripts)


def shown_name(raw: bytes, codec: str) -> str:
    """Return a name for a message: as text, or as bytes where the encoding is unknown."""
    if codec:
        return raw.decode(codec, "backslashreplace")
    return raw.decode() if is_utf8(raw) else repr(raw)[2:-1]
