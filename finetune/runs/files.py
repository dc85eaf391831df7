"""Write files atomically, and tables that are safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import ctypes
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from finetune.errors import DataError, DiskError, UsageError
from finetune.system.regular_files import MOST_BYTES, bounded_lines, create_regular, open_text

_OF_OUTPUTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors that concern what is written. Those of rights and devices may come from reading as well."""
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""Text that a spreadsheet may run as a formula (the last four are full-width), after any apostrophes."""
_NUMBER = re.compile(r"'*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of Linux: <fcntl.h>, <linux/fs.h>
FLOAT_FORMAT = "%.9g"
"""Nine significant digits read back to the same float32."""


def write_bytes(path: Path, content: bytes, flush: bool = True) -> None:
    """Write a temporary file, flush it to the disk and rename it: a reader sees the old or the new content.

    Args:
        path: the file.
        content: all of its bytes.
        flush: whether the new content survives a power cut.

    Raises:
        DiskError: the disk is full, or the folder cannot be written; no temporary file stays.
    """
    write_chunks(path, [content], flush)


def write_chunks(path: Path, chunks: Iterable[bytes], flush: bool = True) -> None:
    """Write a file as :func:`write_bytes` does, without holding all of it in memory."""
    part = path.with_name(f".{path.name}.part")
    try:
        with create_regular(part) as file:
            file.writelines(chunks)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        part.replace(path)
        if flush:
            sync_folder(path.parent)
    except OSError as error:
        _remove(part)
        raise disk_error(path, error) from None
    except BaseException:
        _remove(part)
        raise


def rename_to_new(part: Path, path: Path) -> None:
    """Rename a file to a name that is free, in one step where the system and the file system can do that.

    Raises:
        FileExistsError: the name is taken; nothing has changed.
        OSError: it cannot be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        here, names = ctypes.c_int(_AT_FDCWD), (os.fsencode(part), os.fsencode(path))
        if rename(here, names[0], here, names[1], ctypes.c_uint(_RENAME_NOREPLACE)) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(part), None, str(path))
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(part), None, str(path))
    part.rename(path)


def name_result(part: Path, path: Path, output: Path) -> None:
    """Give what was computed its final name.

    Args:
        part: where it is.
        path: its name.
        output: what the user asked for, for the message.

    Raises:
        UsageError: the name is taken; nothing has changed.
        OSError: it cannot be renamed.
    """
    try:
        rename_to_new(part, path)
    except FileExistsError:
        found = f"{path} was made by something else meanwhile; what was computed is kept in {part}"
        fix = f"Move {path.name} away, and give the same command again."
        raise UsageError(f"--output {output}", found, fix) from None


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut, if the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder and all that it holds.

    Raises:
        OSError: it cannot be removed, or holds folders that are nested more deeply than Python can follow.
    """
    try:
        shutil.rmtree(folder, ignore_errors=ignore_errors)
    except RecursionError:
        if not ignore_errors:
            raise OSError(errno.ELOOP, "it holds folders that are nested too deeply", str(folder)) from None


def concerns_output(error: OSError) -> bool:
    """Return whether the disk, or the name that the user gave to the output, is the cause."""
    return error.errno in _OF_OUTPUTS


def disk_error(path: Path, error: OSError) -> DiskError:
    """Return the DiskError for an error of the operating system."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space" if full else "Choose a folder you may write to with --output"
    if error.errno == errno.ENAMETOOLONG:
        fix = "Take a shorter name"
    found = error.strerror or str(error)
    if error.errno == errno.ENOSPC and (free := free_bytes(path)) is not None:
        found += f" ({free / 1e6:,.0f} MB free)"
    refusal = DiskError(f"writing {path}", found, f"{fix}, and start the same command again.")
    refusal.is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return refusal


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the disk where a file is or would be; None if they are unknown."""
    try:
        existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None)
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of two; NaN raises ValueError, since JSON has no NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> None:
    """Write a table with a header and ``\\n`` line ends; text that looks like a formula is escaped."""
    lines = (format_csv_line([_cell(value) for value in row]) for row in chain([columns], rows))
    write_chunks(path, (line.encode() for line in lines))


def read_rows(
    path: Path, needed: Sequence[str] = (), most_bytes: int | None = MOST_BYTES
) -> list[dict[str, str]]:
    """Read a table of :func:`write_csv`; each row is a dict of text by column.

    Args:
        path: path of the table.
        needed: columns that must exist.
        most_bytes: largest size of the file; None for any.

    Raises:
        DataError: the table is damaged: it is truncated, not UTF-8, or rows differ in length from the header.
        OSError: the file cannot be opened or read, or is larger.
    """
    try:
        with open_text(path, most_bytes) as file:
            reader = csv.reader(bounded_lines(file), strict=True)
            header, rows = next(reader, []), [row for row in reader if row]
        if absent := [name for name in needed if name not in header]:
            raise ValueError(f"there is no column {absent[0]}")
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a row has {len(row)} cells, and there are {len(header)} columns: {row[0]}")
    except (ValueError, csv.Error) as error:
        raise damaged_file(path, error) from None
    return [dict(zip(header, map(unescape_formula, row), strict=True)) for row in rows]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        OSError: it cannot be opened, is not a file, or is too large.
        ValueError: it is not a JSON object in UTF-8, or has half of a character, which nothing can show.
    """
    with open_text(path, MOST_BYTES) as file:
        text = file.read()
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def damaged_file(path: Path, error: Exception) -> DataError:
    """Return the DataError for a file that exists but cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else None
    message = " ".join((reason or str(error)).split())[:200] or type(error).__name__
    fix = "Restore the file as it was, or make its folder again."
    return DataError(str(path), f"it cannot be read ({message})", fix)


def format_csv_line(cells: Sequence[str]) -> str:
    """Return one line of a CSV file, with its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # with "\n" a "\r" in a cell is not quoted
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Real):
        return str(value) if isinstance(value, Integral) else FLOAT_FORMAT % value
    return escape_formula(str(value))


def escape_formula(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would run (``=cmd()``); numbers stay as they are."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def unescape_formula(text: str) -> str:
    """Undo :func:`escape_formula`."""
    return text[1:] if text.startswith("'") and escape_formula(text[1:]) == text else text
