"""Open tables as programs write them: separators, encodings and compression are found from the content.

A UTF-16 file is known by its first bytes. What is not UTF-8 is read as Windows-1252, the encoding of Excel in
western Europe and America, and that is said; text that cannot be Windows-1252 either is refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.data.layout import LayoutReader, printable, quoted
from finetune.errors import DataError
from finetune.system.regular_files import open_regular

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_BYTES = 2**30
"""Largest table, unpacked: it is held in memory at several times its size. A million rows take 100 MB or
less."""

MAX_COLUMNS = 20_000
"""Most columns of a table: each costs pandas kilobytes, besides its cells."""
MAX_CELLS = 2 * 10**8
"""Most cells, rows times columns: an empty line becomes as many cells as the header has."""
_MAX_HEADER = 2**22
"""Characters of the longest header."""

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
"""Endings of tables' names."""

QUOTE = "Quote cells that hold commas."
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_WINDOWS = "cp1252"
_CHUNK = 2**20
_FIRST = 2**16
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_UTF8_LETTER = re.compile(rb"[\xc3-\xf4][\x80-\xbf]")
_LONG_RUN = re.compile(rb"[\x80-\xff]{4}|[\xc0-\xff]{3}")
_OTHER_FILES = (
    (re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE), "is a web page, not a table",
     "Download the table itself."),
    (re.compile(rb"version https://git-lfs"), "is a git-lfs pointer, not the table", "Run `git lfs pull`."),
    (re.compile(rb"PK\x03\x04"), "is a zip or an Excel workbook, not a table",
     "Unpack it, or save it as CSV from Excel."),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "is an Excel workbook, not a table", "Save it as CSV from Excel."),
    (re.compile(rb"PAR1"), "is a Parquet file, not a table of text", "Write it as CSV (pandas: to_csv)."),
)  # fmt: skip
"""Beginnings of files that are often named as tables, what they are, and what to do."""
_HINT = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)
_NO_SEPARATOR = re.compile(r'[^\x20-\x7e\t]|[\w"]', re.ASCII)


def is_table(name: str) -> bool:
    """Return whether a file has the name of a table."""
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class TableFormat:
    """How the text of a table is written.

    Attributes:
        encoding: name of the encoding, as Python knows it.
        separator: the character between cells.
        skipped: lines before the header (Excel's ``sep=;``).
        is_packed: whether it is compressed by gzip.
    """

    encoding: str
    separator: str
    skipped: int = 0
    is_packed: bool = False

    @property
    def said(self) -> str:
        """What is unusual about it, as part of a sentence; "" for UTF-8 with commas."""
        text = "UTF-8" if self.encoding == "utf-8-sig" else self.encoding.upper()
        text = "Windows-1252" if self.encoding == _WINDOWS else text
        if text == "UTF-8" and self.separator == "," and not self.is_packed:
            return ""
        packed = ", compressed by gzip" if self.is_packed else ""
        return f"{text} with {_SEPARATORS.get(self.separator, repr(self.separator))}{packed}"


def find_format(reader: LayoutReader, file: Path) -> TableFormat:
    """Return how a table is written.

    Raises:
        DataError: it is too large, is not a file or cannot be read, or its encoding is unknown.
    """
    with reading(reader, file), _open(reader, file) as content:
        first = content.read(_FIRST)
        for begin, found, fix in _OTHER_FILES:
            if begin.match(first):
                raise reader.error(found, fix)
        encoding = _find_encoding(reader, first, content)
        while content.read(_CHUNK):  # to its end, which counts the lines
            pass
        is_packed, num_lines = content.raw.is_packed, content.raw.num_lines
    lines = first.decode(encoding, "ignore").splitlines()
    header = lines[0] if lines else ""
    if hint := _HINT.fullmatch(header):
        if _NO_SEPARATOR.match(hint[1]):
            fix = "Separate its cells by commas, and drop that line."
            raise reader.error(f"names {printable(hint[1])!r} as the separator of its cells", fix)
        form = TableFormat(encoding, hint[1], 1, is_packed)
    else:
        form = TableFormat(encoding, _find_separator(file.name, header), is_packed=is_packed)
    _check_cells(reader, file, form, num_lines)
    return form


def _check_cells(reader: LayoutReader, file: Path, found: TableFormat, num_lines: int) -> None:
    """Refuse a table that would fill the memory by the number of its cells."""
    with reading(reader, file), _open(reader, file) as content:
        text = io.TextIOWrapper(content, encoding=found.encoding, newline="", errors="replace")
        for _ in range(found.skipped):
            text.readline(_FIRST)
        start = text.read(_MAX_HEADER)
        text.detach()
    try:
        header = next(csv.reader(io.StringIO(start, newline=""), delimiter=found.separator), [])
    except csv.Error as error:
        raise reader.error(f"is not a table ({error})", QUOTE) from None
    fix = "Leave out columns other than path,label,split."
    if len(header) > MAX_COLUMNS:
        raise reader.error(f"has more than {MAX_COLUMNS:,} columns", fix)
    if len(start) == _MAX_HEADER and sum(map(len, header)) + len(header) >= _MAX_HEADER:
        raise reader.error(f"has a first line of more than {_MAX_HEADER:,} characters", fix)
    if len(header) * num_lines > MAX_CELLS:
        rows = f"{num_lines:,} lines of {len(header):,} cells"
        raise reader.error(f"has {rows}, more than {MAX_CELLS:,} cells in all", fix)


def read_cells(reader: LayoutReader, file: Path, found: TableFormat) -> DataFrame:
    """Return all cells as text, header included, without blank lines; the index is the original position.

    Raises:
        DataError: the file is not a table.
    """
    from pandas import read_csv
    from pandas.errors import EmptyDataError, ParserError

    try:
        with reading(reader, file), _open(reader, file) as content:
            # With header=None pandas requires every row to be as wide as the first: a stray comma is an error
            # instead of a silent shift of all columns by one.
            table = read_csv(
                content, header=None, dtype=str, keep_default_na=False, na_filter=False,
                encoding=found.encoding, sep=found.separator, skiprows=found.skipped,
                skip_blank_lines=False, skipinitialspace=True,
            )  # fmt: skip
    except EmptyDataError:
        raise reader.error("has an empty first line", "Start it with the header path,label.") from None
    except ParserError as error:
        message = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        raise reader.error(f"is not a table ({message})", QUOTE) from error
    table.index += found.skipped
    return table[(table != "").any(axis=1)]


def read_rows(reader: LayoutReader, file: Path) -> Iterator[list[str]]:
    """Yield the rows of a table as lists of cells, the header first, without holding it in memory.

    Raises:
        DataError: the file is not a table.
    """
    found = find_format(reader, file)
    try:
        with reading(reader, file), _open(reader, file) as content:
            lines = io.TextIOWrapper(content, encoding=found.encoding, newline="")
            for _ in range(found.skipped):
                lines.readline()
            yield from csv.reader(lines, delimiter=found.separator, skipinitialspace=True)
    except csv.Error as error:
        raise reader.error(f"is not a table ({error})", QUOTE) from None


@contextmanager
def reading(reader: LayoutReader, file: Path) -> Iterator[None]:
    """Convert errors of reading into a DataError."""
    try:
        yield
    except (UnicodeDecodeError, UnicodeError) as error:
        where = f" ({error.reason} at byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise reader.error(f"is not the text that it begins as{where}", "Save it as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        found = f"is truncated, damaged or not compressed by gzip ({error})"
        raise reader.error(found, f"Get {file.name} or make it again.") from error
    except OSError as error:
        raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from error


class _Bytes(io.RawIOBase):
    """The bytes of a table, unpacked if they begin as gzip does; more than ``MAX_BYTES`` are refused.

    Attributes:
        is_packed: whether the file is compressed by gzip.
        num_lines: line ends so far; in UTF-16 also other characters with such a byte.
    """

    def __init__(self, reader: LayoutReader, file: BinaryIO) -> None:
        self._reader, self._size, self.num_lines = reader, 0, 0
        self.is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._source: Any = gzip.GzipFile(fileobj=file) if self.is_packed else file

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; the table is refused if they are too many."""
        size: int = self._source.readinto(buffer)
        self._size += size
        if self._size > MAX_BYTES:
            raise _too_large(self._reader, self._size)
        read = bytes(memoryview(buffer)[:size])
        self.num_lines += max(read.count(b"\n"), read.count(b"\r"))
        return size


@contextmanager
def _open(reader: LayoutReader, file: Path) -> Iterator[io.BufferedReader[_Bytes]]:
    """Open a table; the one way in which any command reads one."""
    with open_regular(file) as content:
        if (size := os.fstat(content.fileno()).st_size) > MAX_BYTES:
            raise _too_large(reader, size)
        with io.BufferedReader(_Bytes(reader, content), _FIRST) as unpacked:
            yield unpacked


def _too_large(reader: LayoutReader, size: int) -> DataError:
    return reader.error(
        f"has {-(-size // 2**20)} MB, more than {MAX_BYTES // 2**20} MB",
        "Leave out columns other than path,label,split, or give a folder of class folders.",
    )


def _find_encoding(reader: LayoutReader, first: bytes, rest: BinaryIO) -> str:
    for mark, name in _MARKS:
        if first.startswith(mark):
            return name
    even, odd = first[:512:2], first[1:512:2]
    if 2 * odd.count(0) > len(odd) > 0:
        return "utf-16-le"
    if 2 * even.count(0) > len(even) > 0:
        return "utf-16-be"
    return _check_text(reader, first, iter(lambda: rest.read(_CHUNK), b""))


def _check_text(reader: LayoutReader, first: bytes, rest: Iterable[bytes]) -> str:
    """Return UTF-8, or Windows-1252 where the bytes can be nothing but that.

    Raises:
        DataError: it is neither.
    """
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    size, fault, others = 0, "", bytearray()
    for block in _chained(first, rest):
        if not fault:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                at = size - (len(error.object) - len(block)) + error.start
                fault = f"is not UTF-8 ({error.reason} at byte {at})"
        size += len(block)
        if not block.isascii():
            others += block
    if not fault:
        return "utf-8-sig"
    try:
        others.decode(_WINDOWS)
        is_western = not _LONG_RUN.search(others) and not _UTF8_LETTER.search(others)
    except UnicodeDecodeError:
        is_western = False
    if not is_western:
        raise reader.error(f"{fault}, and not Windows-1252 either", "Save it as UTF-8.")
    return _WINDOWS


def _chained(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _find_separator(name: str, header: str) -> str:
    """Return the character that divides the header into most cells; a comma where none does."""
    ranked = sorted(_SEPARATORS, key=lambda mark: _count_cells(header, mark), reverse=True)
    best = ranked[0]
    if _count_cells(header, best) > 1:
        return best
    return "\t" if ".tsv" in name.lower() else ","


def _count_cells(header: str, mark: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=mark, skipinitialspace=True), []))
    except csv.Error:
        return 0


def tell_format(reader: LayoutReader, found: TableFormat, cells: Iterable[str]) -> None:
    """Warn about a format other than UTF-8 with commas; an example shows whether letters are right.

    Args:
        reader: gets the warning.
        found: the format.
        cells: cells of the table, of which the first that is not ASCII is shown.
    """
    if found.said:
        odd = next((cell for cell in cells if not cell.isascii()), "") if found.encoding == _WINDOWS else ""
        example = f", so that a cell is {quoted(odd)}" if odd else ""
        reader.warn(
            "table-format",
            f"The table was read as {found.said}{example}.",
            "Save it as UTF-8 with commas if that is wrong.",
        )
