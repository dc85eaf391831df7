"""Take a folder for a run, keep others out of it, and know whether it is still the same run."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import TakenOverError, UsageError
from finetune.recipe import Change, Recipe, changed_keys
from finetune.runs.files import disk_error, write_text
from finetune.runs.folder import Outcome, RunFolder
from finetune.runs.reader import RunReader

RUNNING = "the run is going on, or was killed"

NO_EFFECT = (
    "data.workers",
    "data.allow_leaks",
    "backbone.offline",
    "cache.pictures",
    "cache.max_gb",
    "tracking.to",
)
"""Keys on which no result depends: another machine may decide them otherwise and go on all the same."""


LOCK_WAIT = 6.0
"""Seconds to wait for a process that is just ending."""


@dataclass(frozen=True)
class Claim:
    """A run folder that this process may write into.

    Attributes:
        folder: the run's.
        attempt: how many processes have claimed it, this one included.
        finished: it holds the finished run already.
        was_finished: it held a finished run, which this process makes longer.
        changes: what of the recipe is another than the run began with, and was allowed.
    """

    folder: RunFolder
    attempt: int = 1
    finished: bool = False
    was_finished: bool = False
    changes: tuple[str, ...] = ()

    def check_owner(self) -> None:
        """Make sure that no later process has claimed the folder (locks do not reach over every network).

        Raises:
            TakenOverError: one has.
        """
        latest = RunReader(self.folder, tolerant=True).attempt
        if latest > self.attempt:
            found = f"another process has taken it over (attempt {latest}, and this is {self.attempt})"
            raise TakenOverError(f"--output {self.folder.path}", found, "Leave the run to that process.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process out of a run folder while the block runs; the kernel ends a dead one's claim.

    Raises:
        UsageError: another process is at work in it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise disk_error(path, error) from None
    try:
        if not _try_lock(descriptor, LOCK_WAIT):
            fix = "Wait for it, or name a new folder."
            raise UsageError(f"--output {path}", "another process is at work in it", fix)
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)


def _try_lock(descriptor: int, seconds: float) -> bool:
    """Lock a folder, waiting a little; true as well where the file system knows no locks.

    A process that was killed a moment ago may still hold it: its decoding processes share the lock, and
    end a moment after it.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:
            return True
        else:
            return True


def find_changed_images(
    folder: RunFolder, images: Mapping[str, tuple[str, str, str]], known_bad: Collection[str] = ()
) -> str:
    """Say how the images differ from those the run began with; nothing where they do not.

    Args:
        folder: of a run that has begun; nothing is compared before its split is written.
        images: label, part and sha256 of every usable image there is now, by path.
        known_bad: images that may be gone.
    """
    if not folder.split.exists():
        return ""
    rows = [row for row in RunReader(folder).split if row["path"] not in known_bad]
    before = {row["path"]: (row["label"], row["split"], row["sha256"]) for row in rows}
    came, went = sorted(images.keys() - before.keys()), sorted(before.keys() - images.keys())
    both = sorted(images.keys() & before.keys())
    moved = [path for path in both if images[path][:2] != before[path][:2]]
    edited = [path for path in both if images[path][2] != before[path][2]]
    parts = (
        _some(came, "new"),
        _some(went, "gone"),
        _some(moved, "in another class or part"),
        _some(edited, "with another content"),
    )
    return ", ".join(filter(None, parts))


def find_changed_environment(folder: RunFolder, now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what of weights, versions and hardware is another than when the run was last worked on."""
    before = RunReader(folder, tolerant=True).environment
    if not before:
        return {}
    return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


def _some(paths: list[str], what: str) -> str:
    return f"{len(paths)} {what}, {paths[0]} for one" if paths else ""


def create_folder(path: Path) -> None:
    """Create a folder and those above it, where they are not there yet.

    Raises:
        UsageError: it is a file.
        DiskError: it cannot be created.
    """
    if path.is_file():
        raise UsageError(f"--output {path}", "it is a file", "Name a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None


def claim_folder(
    path: Path,
    recipe: Recipe,
    allow_changed: bool = False,
    check: Callable[[Claim], None] = lambda _: None,
) -> Claim:
    """Take a folder for a run: a new or empty one, or one that holds this very run.

    The same recipe with more epochs is the same run, which then goes on for longer.

    Args:
        path: the output folder, locked; it and its parents are created.
        recipe: resolved.
        allow_changed: go on with a run of another recipe.
        check: given a run that was begun before, ahead of the first byte that is written; may refuse it.

    Raises:
        UsageError: it holds another run, or other files.
        DiskError: it cannot be written.
    """
    folder = RunFolder(path)
    create_folder(path)
    try:
        before = _read_begun(folder)
        changes = _changes(before, recipe) if before is not None else _check_empty(folder)
        others = [change.line for change in changes if not change.is_extension]
        if others and not allow_changed:
            raise _another_run(path, others)
        earlier = RunReader(folder, tolerant=True)
        done = earlier.outcome.get("state") == "done"
        finished, longer = done and not changes, done and bool(changes)
        claim = Claim(folder, earlier.attempt + 1, finished, longer, tuple(others))
        if before is not None:
            check(claim)
        if not finished:
            _begin_attempt(claim, recipe, before, bool(changes))
    except OSError as error:
        raise disk_error(path, error) from None
    return claim


def _begin_attempt(claim: Claim, recipe: Recipe, before: Recipe | None, changed: bool) -> None:
    folder = claim.folder
    if before is None:
        write_text(folder.recipe, recipe.to_yaml())  # first: with it the folder is ours, whatever comes
    # No result depends on whether leaks are allowed, but whoever repeats the run must know of it.
    elif before.data.allow_leaks != recipe.data.allow_leaks:
        changed = True
    folder.write_outcome(Outcome("running", RUNNING, attempt=claim.attempt))
    if changed:  # last: a kill in between must not make a longer run look finished
        write_text(folder.recipe, recipe.to_yaml())
    folder.checkpoints.mkdir(exist_ok=True)


def _check_empty(folder: RunFolder) -> list[Change]:
    path, unfinished = folder.path, f".{folder.recipe.name}.part"  # a claim that was killed leaves this
    others = sorted(item.name for item in path.iterdir() if item.name != unfinished)
    if others:
        found = f"the folder holds other files ({', '.join(others[:3])}) and no run"
        raise UsageError(f"--output {path}", found, "Name a new folder.")
    return []


def _read_begun(folder: RunFolder) -> Recipe | None:
    """Return the recipe that a run in the folder began with; None where none has begun."""
    try:
        return RunReader(folder).recipe if folder.recipe.exists() else None
    except UsageError as error:
        found = f"it holds a run whose recipe.yaml is damaged ({error.found})"
        raise UsageError(f"--output {folder.path}", found, "Name a new folder with --output.") from None


def _changes(before: Recipe, recipe: Recipe) -> list[Change]:
    """Return what the run's recipe and this one differ in, but for keys on which no result depends."""
    return [change for change in changed_keys(before, recipe) if change.key not in NO_EFFECT]


def _another_run(path: Path, lines: list[str]) -> UsageError:
    shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
    fix = (
        "Name a new folder with --output, or give the same command again to go on with that run "
        "(--allow-changed goes on with this one)."
    )
    return UsageError(f"--output {path}", f"it holds another run ({shown})", fix)
