"""What all functions of the API share: paths, and the message while torch is imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path

from finetune.system.display import Display

AnyPath = str | PathLike[str]


def to_path(path: AnyPath | None) -> Path | None:
    """Return a path as a :class:`pathlib.Path`; None stays None."""
    return None if path is None else Path(fspath(path))


@contextmanager
def loading_torch(display: Display | None) -> Iterator[Display]:
    """Yield the display; the imports in the block take seconds, and it says so."""
    shown = display or Display()
    with shown.busy("loading torch"):
        yield shown
