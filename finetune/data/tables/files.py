"""Find the file that a cell of a table names: the path itself, or the only file that fits it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath

from finetune.data.folders import walk_images
from finetune.data.layout import LayoutReader, quoted, some
from finetune.data.layouts.split_folders import parse
from finetune.data.tables.config import find_table_root
from finetune.errors import count

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|data:image/|www\.|//[a-z0-9-]+(\.[a-z0-9-]+)+/", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:(?=/)")
FETCH = "Addresses are not fetched; download them first, and name the files."


def is_address(cell: str) -> bool:
    """Return whether a cell is an address, such as ``http://...`` or ``s3://...``, and not a path."""
    return _ADDRESS.match(cell) is not None


class TableFiles:
    """Finds the files that the cells of a table name.

    A cell is tried as it is, then with ``\\`` as the separator, then without the folders that all paths begin
    with, if they lead to the table's own folder; last as the end of the path of an image below the root, with
    or without its extension. A cell that fits several images fits none.

    Attributes:
        renamed: why cells were read as something else than what they say, with an example.
    """

    def __init__(self, reader: LayoutReader, folder: Path) -> None:
        self._reader = reader
        self._suffix = reader.table.suffix
        images = Path(os.path.normpath(reader.table.find_folder(folder)))
        reader.root = find_table_root(folder, reader.table)
        self._top = images.relative_to(os.path.normpath(reader.root)).as_posix()
        if not images.is_dir():
            raise reader.error(
                f"has no folder {reader.table.image_root!r} beside it", "Correct --set data.image_root."
            )
        self._leading = 0
        self._found: dict[str, str | None] = {}  # a table is read several times, the disk only once
        self.renamed: dict[str, str] = {}

    def leave_out_leading(self, cells: Sequence[str]) -> None:
        """Leave out the folders that all paths begin with, if every image is found then, and only then."""
        parts = [_parts(cell) for cell in cells if cell and not is_address(cell)]
        if not parts or any(self._plain_path(cell) for cell in cells[:50]):
            return
        low, high = min(parts)[:-1], max(parts)[:-1]
        common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))]
        for number in range(1, len(common) + 1):
            if not self._may_leave_out(common[:number]):
                continue
            if all(self._below("/".join(part[number:])) for part in parts):
                self._leading = number
                self._found.clear()
                start = "/".join(common[:number]) or "/"
                self.renamed["leading"] = f"{start!r} at the start of paths is left out"
                return

    def _may_leave_out(self, parts: Sequence[str]) -> bool:
        """Return whether the last folder is the table's own, or an absolute one that is not a split's."""
        is_own = parts[-1].casefold() == self._reader.root.name.casefold()
        return is_own or (parts[0] == "" and not any(map(parse, parts)))

    def find(self, cell: str) -> tuple[str | None, str | None]:
        """Return the path below the root of the file that a cell names, and why it names no file.

        A path below the root that does not exist is returned as it is.
        """
        if is_address(cell):
            return None, f"{quoted(cell)} is an address"
        path = self.find_existing(cell)
        if path is not None:
            self._tell(cell, path)
            return path, None
        if len(fitting := self._fitting(cell)) > 1:
            return None, f"{quoted(cell)} fits {count(len(fitting), 'file', 'files')}: {some(fitting[:3])}"
        return below_root(self._reader.root, self._join(cell)) if cell else None, None

    def _tell(self, cell: str, path: str) -> None:
        """Remember an example of each way in which cells are read as another path than they say."""
        if "\\" in cell and path.endswith(cell.replace("\\", "/").removeprefix("./")):
            self.renamed.setdefault("backslash", f"backslashes separate folders, as in {quoted(cell)}")
        elif path != below_root(self._reader.root, cell) and not self._leading:
            self.renamed.setdefault("fitting", f"{quoted(cell)} was read as {quoted(path)}")

    def find_existing(self, cell: str) -> str | None:
        """Return the path below the root of the existing file that a cell names, or None."""
        if cell not in self._found:
            self._found[cell] = self._search(cell)
        return self._found[cell]

    def _search(self, cell: str) -> str | None:
        if not cell or "\0" in cell:
            return None
        if path := self._plain_path(cell):
            return path
        if self._leading and (path := self._below("/".join(_parts(cell)[self._leading :]))):
            return path
        fitting = self._fitting(cell)
        return fitting[0] if len(fitting) == 1 else None

    def _fitting(self, cell: str) -> list[str]:
        """Return the images whose path ends with the cell, with or without the extension."""
        name = "/".join(_parts(cell.strip()))
        if not name or "\0" in name or name.startswith("/") or _DRIVE.match(name) or ".." in name.split("/"):
            return []
        key = _key(name)
        found = self._index.get(key.rpartition("/")[2], [])
        folded = [path for path in found if _ends_with(_key(path), key)]
        exact = [path for path in folded if _ends_with(path, name)]
        return exact or folded

    def _plain_path(self, cell: str) -> str | None:
        """Return the path of an existing file that the cell names as it is, or with other separators."""
        if path := self._below(cell):
            return path
        if "\\" not in cell or not (path := self._below(cell.replace("\\", "/"))):
            return None
        return path

    def _below(self, name: str) -> str | None:
        path = below_root(self._reader.root, self._join(name))
        full = os.path.join(self._reader.root, path or "")  # noqa: PTH118 - fast, for every row
        try:
            exists = path is not None and os.path.lexists(full) and not os.path.isdir(full)  # noqa: PTH112
        except ValueError:
            return None
        return path if exists else None

    def _join(self, name: str) -> str:
        suffix = "" if name.lower().endswith(self._suffix.lower()) else self._suffix
        return os.path.join("" if self._top == "." else self._top, name + suffix)  # noqa: PTH118

    @cached_property
    def _index(self) -> dict[str, list[str]]:
        """Every image below the root by its name, and by its name without the extension."""
        silent = LayoutReader(
            "", self._reader.root, follow_links=self._reader.follow_links, takes_any_name=True
        )
        by_name: defaultdict[str, list[str]] = defaultdict(list)
        for path in walk_images(silent, "" if self._top == "." else self._top, Counter()):
            name = _key(path.rpartition("/")[2])
            if not self._suffix or name.endswith(self._suffix.lower()):
                by_name[name].append(path)
                by_name[PurePosixPath(name).stem].append(path)
        return by_name


def _parts(cell: str) -> list[str]:
    """Return the parts of a path with either separator; the first is "" or a drive for an absolute one."""
    plain = cell if "\\" not in cell else cell.replace("\\", "/")
    drive = _DRIVE.match(plain)
    parts = (plain[drive.end() :] if drive else plain).split("/")
    return [parts[0], *(part for part in parts[1:] if part not in {"", "."})] if parts[0] != "." else [
        part for part in parts if part not in {"", "."}
    ]  # fmt: skip


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _ends_with(path: str, name: str) -> bool:
    """Return whether the last parts of a path are ``name``, with or without the extension."""
    stem = path[: len(path) - len(PurePosixPath(path).suffix)]
    return f"/{path}".endswith(f"/{name}") or f"/{stem}".endswith(f"/{name}")


def below_root(root: Path, path: str) -> str | None:
    """Return the normalised path relative to the root, or None if it lies outside."""
    if not path or "\0" in path:
        return None
    full = os.path.normpath(root / path)
    resolvers: tuple[Callable[..., str], ...] = (os.path.normpath, os.path.realpath)
    for resolve in resolvers:  # realpath: for absolute paths through a link
        top = resolve(root)
        if full.startswith(os.path.join(top, "")):  # noqa: PTH118
            return Path(full).relative_to(top).as_posix()
    return None
