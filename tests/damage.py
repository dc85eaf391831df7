"""Files as nobody has written them: of another kind, cut short, or with other values."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def bind_socket(path: Path) -> None:
    folder = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
    finally:
        os.chdir(folder)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bind_socket,
    "folder": Path.mkdir,
    "nowhere": lambda path: path.symlink_to("nowhere"),
}
"""What may be in the place of a file; each function makes it at a path that is free."""

CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "not UTF-8": lambda content: content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :],
    "null": lambda _: b"null",
    "list": lambda _: b"[]",
    "infinity": lambda _: b"1e999",
    "nan": lambda _: b"NaN",
    "digits": lambda _: b"1" * 5000,
    "deep list": lambda _: b"[" * 100_000,
    "deep object": lambda _: b'{"a":' * 100_000,
    "zeros": lambda _: bytes(5000),
    "long line": lambda _: b"x" * 300_000,
    "open quote": lambda content: b'"' + content,
    "twice": lambda content: content + content,
}
"""What may be in a file, made from its content."""

VALUES = (
    "null", "[]", "{}", '"x"', "-5", "0", "1.5", "true", "NaN", "Infinity", "1e999", str(10**30),
    str(10**400), "1" * 5000, "[" * 2000 + "]" * 2000, '"\\u0000\\ud800"', "[1]", '{"a": [null]}',
)  # fmt: skip
CELLS = (
    "", "x", "nan", "inf", "-inf", "-5", "1.5", "1e308", "-1e308", "1e400", str(10**30), "9" * 5000, "=1+1",
    "\0", "True", "../../../etc/passwd", "/etc/passwd", "a" * 200_000,
)  # fmt: skip


def json_variants(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a JSON object with each of its values replaced by each of ``VALUES``, or left out; by name."""
    value = json.loads(content)
    for path in _places(value):
        for text in VALUES:
            yield f"{path}={text[:20]}", _replaced(value, path, text)
        yield f"without {path}", _replaced(value, path, None)
    text = content.decode().strip()
    yield "every key twice", f"{text[:-1]},{text[1:]}".encode()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; only the first two of a list."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:2]):
            yield from _places(inner, (*path, number))


def _replaced(value: Any, path: tuple[Any, ...], text: str | None) -> bytes:
    copy = inner = json.loads(json.dumps(value))
    for key in path[:-1]:
        inner = inner[key]
    if text is None:
        del inner[path[-1]]
        return json.dumps(copy).encode()
    inner[path[-1]] = "\ue000"
    return json.dumps(copy, ensure_ascii=False).replace('"\ue000"', text).encode()


def csv_variants(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a table with each cell of its first row replaced, without each column, and so on; by name."""
    header, first, *rest = csv.reader(io.StringIO(content.decode(), newline=""))
    for number, name in enumerate(header):
        for cell in CELLS:
            row = [*first[:number], cell, *first[number + 1 :]]
            yield f"{name}={cell[:20]!r}", _table([header, row, *rest])
        yield (
            f"without {name}",
            _table([[*row[:number], *row[number + 1 :]] for row in (header, first, *rest)]),
        )
    yield "a row twice", _table([header, first, first, *rest])
    yield "a cell more", _table([header, [*first, "x"], *rest])
    yield "a cell less", _table([header, first[:-1], *rest])
    yield "a row less", _table([header, *rest])
    yield "no rows", _table([header])
    yield "a column twice", _table([[*row, row[0]] for row in (header, first, *rest)])
    yield "blank lines", b"\n\n" + content
    yield "byte order mark", b"\xef\xbb\xbf" + content


def _table(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
