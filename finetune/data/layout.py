"""State shared by the readers of folders, CSV files and archives, and their text helpers."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from finetune.data.dataset import Issue, Split
from finetune.data.formats import is_array_name, is_image_name
from finetune.data.tables.config import BY_NAMES, TableConfig
from finetune.errors import DataError, count
from finetune.targets import TargetKind

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
SHOWN = 5
NAME_BYTES = 255  # what a file system takes
_LONG = 200
SYSTEM = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "__pycache__",
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "~snapshot",
        "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "@sharebin",
        "_vti_cnf", "_gsdata_",
        "network trash folder", "temporary items",
        ".git", ".svn", ".hg", ".dvc", ".idea", ".vscode", ".venv", ".ipynb_checkpoints", ".cache",
        ".thumbnails", ".trash", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems",
        ".documentrevisions-v100", ".appledouble", ".@__thumb", ".snapshot", ".snapshots", ".ds_store",
    }
)  # fmt: skip
"""Names, in lower case, of files and folders that systems, file managers and editors leave behind."""


_FOUND = re.compile(r"found\.[0-9]{3}", re.IGNORECASE)  # what CHKDSK recovers


@dataclass
class LayoutReader:
    """The images that a reader has found so far, and how it reports faults.

    Attributes:
        asked: the argument as the user wrote it, for error messages.
        root: folder that all paths are relative to.
        splits: paths by label, by split; a split that the data does not give is absent.
        follow_links: whether links may lead out of the root.
        links_out: target of each link that leads out of the root although it must not, by path.
        from_archive: whether the root is a cache folder with an unpacked archive.
        for_evaluation: whether the images are only evaluated on, so that a training split is not required.
        takes_any_name: whether names that are not UTF-8 are accepted.
        is_lenient: whether errors are collected in ``issues`` instead of raised, where reading can continue.
        issues: every warning, and every error of a lenient reading.
        group_column: filled cells of the CSV column that names groups, by path; None without such a column.
        hidden: hidden images, and hidden folders that hold images, none of which are read.
        table: how a table is read where its own names do not say so.
        left_out: number of files that were left in an archive, by extension.
        beside: lists beside the archives that were read, which may hold the labels.
        target_kind: what the labels are.
    """

    asked: str
    root: Path
    splits: dict[Split, dict[str, list[str]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    follow_links: bool = False
    links_out: dict[str, str] = field(default_factory=dict)
    from_archive: bool = False
    for_evaluation: bool = False
    takes_any_name: bool = False
    is_lenient: bool = False
    issues: list[Issue] = field(default_factory=list)
    group_column: dict[str, str] | None = None
    hidden: set[str] = field(default_factory=set)
    table: TableConfig = BY_NAMES
    left_out: Counter[str] = field(default_factory=Counter)
    beside: list[str] = field(default_factory=list)
    target_kind: TargetKind = "single"

    def takes(self, name: str) -> bool:
        """Return whether a file is one of the images; of arrays, where there are no images."""
        return is_array_name(name) if self.holds_arrays else is_image_name(name)

    @cached_property
    def holds_arrays(self) -> bool:
        """Whether the root holds arrays of numbers and no image. Use it only once ``root`` is final."""
        holds_array, stack = False, [str(self.root)]
        while stack:
            with suppress(OSError), os.scandir(stack.pop()) as entries:
                for entry in entries:
                    if is_junk(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                    elif is_image_name(entry.name):
                        return False
                    holds_array = holds_array or is_array_name(entry.name)
        return holds_array

    def warn(self, code: str, message: str, fix: str, number: int = 1, paths: Sequence[str] = ()) -> None:
        """Add a warning of one sentence."""
        message = printable(message)
        self.warnings.append(message)
        self.issues.append(Issue(code, "warning", message, fix, number, _shown(paths)))

    def reject(self, code: str, found: str, fix: str, number: int = 1, paths: Sequence[str] = ()) -> None:
        """Raise an error, or collect it in a lenient reading; the caller then leaves out what is faulty.

        Raises:
            DataError: always, except in a lenient reading.
        """
        if not self.is_lenient:
            raise self.error(found, fix)
        self.issues.append(Issue(code, "error", printable(found), fix, number, _shown(paths)))

    def error(self, found: str, fix: str) -> DataError:
        """Return an error that names the argument as the user wrote it."""
        return DataError(self.asked, printable(found), fix)

    def decide(self, key: str, what: str) -> str:
        """Return how to decide what a table means: by a key of the recipe, where a recipe is read at all."""
        return (
            "Rename the columns: path, label, split." if self.for_evaluation else f"{what}: --set {key}=..."
        )

    @cached_property
    def real_root(self) -> str:
        """The root with links resolved. It is cached: use it only once ``root`` is final."""
        return os.path.realpath(self.root)

    def outside(self, path: str) -> str | None:
        """Return the real path of a path below the root if it lies outside the root and that is not allowed.

        Slow, since it resolves every folder above: call it for links only.
        """
        if self.follow_links:
            return None
        target = os.path.realpath(self.root / path)
        inside = target == self.real_root or target.startswith(os.path.join(self.real_root, ""))  # noqa: PTH118
        return None if inside else target

    def leads_out(self, path: str) -> bool:
        """Return whether a link below the root leads out of it; ``check_links`` reports it later."""
        target = self.outside(path)
        if target is not None:
            self.links_out[path] = target
        return target is not None

    def check_links(self, flag: str = "--set data.follow_links=true") -> None:
        """Reject links that lead out of the root: a foreign dataset could expose any file of this machine.

        Args:
            flag: the flag that allows such links, for the message.
        """
        if not self.links_out:
            return
        leads = count(len(self.links_out), "link leads", "links lead")
        shown = [f"{path!r} -> {target!r}" for path, target in sorted(self.links_out.items())[:SHOWN]]
        more = f" and {len(self.links_out) - SHOWN} more" if len(self.links_out) > SHOWN else ""
        self.reject(
            "link-outside",
            f"{leads} out of the folder: {', '.join(shown)}{more}",
            f"Copy the files there, or add {flag}.",
            len(self.links_out),
            sorted(self.links_out),
        )


def _shown(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(printable, paths[:SHOWN]))


def printable(text: object) -> str:
    """Return text that every terminal can show: bytes that are not UTF-8 are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def quoted(text: str) -> str:
    """Return text in quotes; the middle of a long text is left out."""
    return repr(text) if len(text) <= _LONG else f"{text[: _LONG // 2]!r} ... {text[-_LONG // 2 :]!r}"


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder; empty if it cannot be read."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []


def is_junk(name: str) -> bool:
    """Return whether a name is hidden, or one that systems and file managers leave behind."""
    return name.startswith(".") or is_system(name)


def is_system(name: str) -> bool:
    """Return whether systems and file managers leave files or folders of this name behind."""
    return name.startswith(("._", ".Trash-")) or name.lower() in SYSTEM or bool(_FOUND.fullmatch(name))


def extension_counts(files: Iterable[str]) -> Counter[str]:
    """Count files by extension, in lower case."""
    return Counter(os.path.splitext(name)[1].lower() or "no extension" for name in sorted(files))  # noqa: PTH122


def extensions(others: Counter[str], before: str) -> str:
    """Return ``before`` and the extensions with their counts, or "" if there are none."""
    seen = ", ".join(f"{printable(name)} ({number})" for name, number in others.most_common(SHOWN))
    return before + seen if seen else ""


def some(names: Iterable[str]) -> str:
    """Return the first few names, quoted, and the number of further ones."""
    every = [quoted(name) for name in names]
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def name_fault(name: str) -> str | None:
    """Return why a class cannot have this name, or None. Names become files, table cells and folders."""
    if not name.strip():
        return "is empty"
    if name in {".", ".."} or "/" in name or "\\" in name:
        return "is a path, not a name"
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes"
    if any(unicodedata.category(char) in {"Cc", "Zl", "Zp"} for char in name):
        return "holds a control character or a line break"
    return None
