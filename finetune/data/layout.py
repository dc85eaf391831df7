"""What a reader of folders or tables found, and the words that all of them use."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from finetune.data.dataset import Issue, Split
from finetune.errors import DataError

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
JUNK = frozenset({"__MACOSX", "Thumbs.db"})


@dataclass
class LayoutReader:
    """What a reader found, before the rules common to all layouts are applied.

    Attributes:
        asked: the user's own words, for every refusal.
        root: folder that all paths are relative to.
        parts: paths of each class of each split; a part that is absent was not given.
        follow_links: links may lead out of the root.
        links_out: links that lead out of the root though they may not, and where to.
        from_archive: the root is a folder of ours, which an archive was unpacked into.
        to_judge: nothing will be trained on it, so that a training split need not be there.
        takes_any_name: names that are not UTF-8 are walked over like others.
        is_lenient: what would be refused is noted instead, where reading can go on.
        remarks: every warning, and every refusal that was noted.
        columns: filled cells of the CSV column that names groups, by path; None: there is no such column.
    """

    asked: str
    root: Path
    parts: dict[Split, dict[str, list[str]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    follow_links: bool = False
    links_out: dict[str, str] = field(default_factory=dict)
    from_archive: bool = False
    to_judge: bool = False
    takes_any_name: bool = False
    is_lenient: bool = False
    issues: list[Issue] = field(default_factory=list)
    columns: dict[str, str] | None = None

    def warn(self, code: str, message: str, fix: str, number: int = 1, paths: Sequence[str] = ()) -> None:
        """Note what the user should know, one sentence."""
        message = printable(message)
        self.warnings.append(message)
        self.issues.append(Issue(code, "warning", message, fix, number, _shown(paths)))

    def object(self, code: str, found: str, fix: str, number: int = 1, paths: Sequence[str] = ()) -> None:
        """Refuse, or note the refusal where all of them are wanted; then what is faulty must be left out.

        Raises:
            DataError: always, but for a lenient reading.
        """
        if not self.is_lenient:
            raise self.refuse(found, fix)
        self.issues.append(Issue(code, "error", printable(found), fix, number, _shown(paths)))

    def refuse(self, found: str, fix: str) -> DataError:
        """Return the refusal, in the user's own words."""
        return DataError(self.asked, printable(found), fix)

    @cached_property
    def real_root(self) -> str:
        """The root without links, since the root itself may be one. Ask once the root is settled."""
        return os.path.realpath(self.root)

    def outside(self, path: str) -> str | None:
        """Return where a path below the root really leads if that is out of the root and not allowed.

        Slow (it looks at every folder above): ask for links alone.
        """
        if self.follow_links:
            return None
        target = os.path.realpath(self.root / path)
        inside = target == self.real_root or target.startswith(os.path.join(self.real_root, ""))  # noqa: PTH118
        return None if inside else target

    def leads_out(self, path: str) -> bool:
        """Tell whether a link below the root leads out of it, and note it for ``check_links``."""
        target = self.outside(path)
        if target is not None:
            self.links_out[path] = target
        return target is not None

    def check_links(self, flag: str = "--set data.follow_links=true") -> None:
        """Refuse links that lead out: a data set from elsewhere could show any file of this machine.

        Args:
            flag: that allows them.
        """
        if not self.links_out:
            return
        leads = count(len(self.links_out), "link leads", "links lead")
        shown = [f"{path!r} -> {target!r}" for path, target in sorted(self.links_out.items())[:SHOWN]]
        more = f" and {len(self.links_out) - SHOWN} more" if len(self.links_out) > SHOWN else ""
        self.object(
            "link-outside",
            f"{leads} out of the folder: {', '.join(shown)}{more}",
            f"Copy the files there, or add {flag}.",
            len(self.links_out),
            sorted(self.links_out),
        )


def _shown(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(printable, paths[:SHOWN]))


def printable(text: object) -> str:
    """Return text that any terminal takes: bytes that are not UTF-8 become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def quoted(text: str) -> str:
    """Return text in quotes, its middle left out where it is long: a cell may hold megabytes."""
    return repr(text) if len(text) <= _LONG else f"{text[: _LONG // 2]!r} ... {text[-_LONG // 2 :]!r}"


def names_in(folder: Path) -> list[str]:
    """Return what a folder holds, nothing where it cannot be read."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []


def is_junk(name: str) -> bool:
    """Tell what file managers leave behind, and hidden files."""
    return name.startswith(".") or name in JUNK


def extension_counts(files: Iterable[str]) -> Counter[str]:
    """Count files by extension, in lower case."""
    return Counter(os.path.splitext(name)[1].lower() or "no extension" for name in files)  # noqa: PTH122


def extensions(others: Counter[str], before: str) -> str:
    """Return ``before`` and the extensions seen with their numbers, or nothing if there were none."""
    seen = ", ".join(f"{printable(name)} ({number})" for name, number in others.most_common(SHOWN))
    return before + seen if seen else ""


def some(names: Iterable[str]) -> str:
    """Return the first few names, quoted, and how many more there are."""
    every = [quoted(name) for name in names]
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def name_fault(name: str) -> str | None:
    """Say why a class cannot have this name, or return None. Names end up in files, tables and folders."""
    if not name.strip():
        return "is empty"
    if name in {".", ".."} or "/" in name or "\\" in name:
        return "is a path, not a name"
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes"
    if any(unicodedata.category(char) in {"Cc", "Zl", "Zp"} for char in name):
        return "holds a control character or a line break"
    return None


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"
