"""Claim a folder for a run, lock it, and decide whether it still holds the same run."""

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

RUNNING = "the run is in progress, or was killed"

NO_EFFECT = (
    "data.workers",
    "data.allow_leaks",
    "backbone.offline",
    "cache.pictures",
    "cache.max_gb",
    "tracking.to",
)
"""Keys on which no result depends: a run may be resumed with other values of these."""

LOCK_WAIT = 6.0
"""Seconds to wait for the lock of a process that is just ending."""


@dataclass(frozen=True)
class Claim:
    """A run folder that this process may write into.

    Attributes:
        folder: the run folder.
        attempt: number of processes that have claimed it, this one included.
        finished: whether it already holds the finished run.
        was_finished: whether it held a finished run, which this process makes longer.
        changes: changes to the recipe that the run began with, if they were allowed.
    """

    folder: RunFolder
    attempt: int = 1
    finished: bool = False
    was_finished: bool = False
    changes: tuple[str, ...] = ()

    def check_owner(self) -> None:
        """Check that no later process has claimed the folder (not every network file system has locks).

        Raises:
            TakenOverError: a later process has claimed it.
        """
        latest = RunReader(self.folder, tolerant=True).attempt
        if latest > self.attempt:
            found = f"another process has taken it over (attempt {latest}, and this is {self.attempt})"
            raise TakenOverError(f"--output {self.folder.path}", found, "Leave the run to that process.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a run folder while the block runs. The kernel releases the lock of a process that was killed.

    Raises:
        UsageError: another process works in it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise disk_error(path, error) from None
    try:
        if not _try_lock(descriptor, LOCK_WAIT) or _was_removed(descriptor, path):
            fix = "Wait for it, or name a new folder."
            raise UsageError(f"--output {path}", "another process is working in it", fix)
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)


def _was_removed(descriptor: int, path: Path) -> bool:
    """Return whether the process that had the lock has removed the folder."""
    try:
        return not os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return True


def _try_lock(descriptor: int, seconds: float) -> bool:
    """Lock a folder; return False if another process still holds the lock after ``seconds``.

    The lock of a process that was killed may last a moment longer: its decoding processes share it. On a file
    system without locks the result is True.
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
    """Return how the images differ from those that the run began with; "" if they do not.

    Args:
        folder: folder of a run that has begun; nothing is compared if it has no split yet.
        images: label, split and sha256 of every usable image, by path.
        known_bad: paths of images that may be missing.
    """
    if not folder.split.exists():
        return ""
    rows = [row for row in RunReader(folder).split if row["path"] not in known_bad]
    before = {row["path"]: (row["label"], row["split"], row["sha256"]) for row in rows}
    added, removed = sorted(images.keys() - before.keys()), sorted(before.keys() - images.keys())
    both = sorted(images.keys() & before.keys())
    moved = [path for path in both if images[path][:2] != before[path][:2]]
    edited = [path for path in both if images[path][2] != before[path][2]]
    parts = (
        _some(added, "new"),
        _some(removed, "gone"),
        _some(moved, "in another class or split"),
        _some(edited, "with another content"),
    )
    return ", ".join(filter(None, parts))


def find_changed_environment(folder: RunFolder, now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the weights, versions and hardware that changed since the last attempt: (before, now) by key."""
    before = RunReader(folder, tolerant=True).environment
    if not before:
        return {}
    return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


def _some(paths: list[str], what: str) -> str:
    return f"{len(paths)} {what}, {paths[0]} for one" if paths else ""


def check_name(path: Path) -> None:
    """Check that the name of an output is UTF-8: files of results name it, and safetensors opens no other.

    Raises:
        UsageError: it holds other bytes.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        fix = "Name another folder."
        raise UsageError(f"--output {path}", "the name holds bytes that are not UTF-8", fix) from None


def create_folder(path: Path) -> None:
    """Create a folder and its parents unless they exist.

    Raises:
        UsageError: the path is a file.
        DiskError: the folder cannot be created.
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
    """Claim a folder for a run: a new or empty one, or one that holds the same run.

    The same recipe with more epochs is the same run, which then becomes longer.

    Args:
        path: output folder, already locked; it and its parents are created.
        recipe: resolved recipe.
        allow_changed: whether to resume a run of another recipe.
        check: called for a run that was begun before, ahead of the first write; may raise to refuse it.

    Raises:
        UsageError: the folder holds another run, or other files.
        DiskError: the folder cannot be written.
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
        write_text(folder.recipe, recipe.to_yaml())  # first: it marks the folder as this run's
    # No result depends on allow_leaks, but it is needed to repeat the run.
    elif before.data.allow_leaks != recipe.data.allow_leaks:
        changed = True
    folder.write_outcome(Outcome("running", RUNNING, attempt=claim.attempt))
    if changed:  # last, so that a kill in between does not make a longer run look finished
        write_text(folder.recipe, recipe.to_yaml())
    folder.checkpoints.mkdir(exist_ok=True)


def _check_empty(folder: RunFolder) -> list[Change]:
    path, files = folder.path, (folder.recipe, folder.budget, folder.budget_table, folder.best_recipe)
    own = {name for file in files for name in (file.name, f".{file.name}.part")}  # .part: left by a kill
    others = sorted(item.name for item in path.iterdir() if item.name not in own)
    if others:
        found = f"the folder holds other files ({', '.join(others[:3])}) and no run"
        raise UsageError(f"--output {path}", found, "Name a new folder.")
    return []


def _read_begun(folder: RunFolder) -> Recipe | None:
    """Return the recipe that the run in the folder began with; None if none has begun."""
    try:
        return RunReader(folder).recipe if folder.recipe.exists() else None
    except UsageError as error:
        found = f"it holds a run whose recipe.yaml is damaged ({error.found})"
        raise UsageError(f"--output {folder.path}", found, "Name a new folder with --output.") from None


def _changes(before: Recipe, recipe: Recipe) -> list[Change]:
    """Return the changes between two recipes, without keys on which no result depends."""
    # What a run saved has no "auto": those are keys that its version of finetune did not have.
    ignored = {*NO_EFFECT, *before.auto_keys()}
    return [change for change in changed_keys(before, recipe) if change.key not in ignored]


def _another_run(path: Path, lines: list[str]) -> UsageError:
    shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
    fix = (
        "Name a new folder with --output, or give the earlier command again to resume that run "
        "(--allow-changed resumes it with this recipe)."
    )
    return UsageError(f"--output {path}", f"it holds another run ({shown})", fix)
