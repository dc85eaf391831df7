"""Take a folder for a run, keep others out of it, and know whether it is still the same run."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import DataError, UsageError
from finetune.recipe import Recipe, changed_keys, load_recipe
from finetune.runs.files import disk_error, unescape_formula, write_text
from finetune.runs.folder import RunFolder

NO_EFFECT = ("data.workers", "backbone.offline")
"""Keys on which no result depends: another machine may decide them otherwise and go on all the same."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process out of a run folder while the block runs; the kernel ends a dead one's claim.

    Raises:
        UsageError: another process is at work in it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fix = "Wait for it, or name a new folder."
        raise UsageError(f"--output {path}", "another process is at work in it", fix) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)


def check_same_images(folder: RunFolder, images: Mapping[str, tuple[str, str]]) -> None:
    """Refuse to go on, or to call a run finished, on other images than it began with.

    Args:
        folder: of a run that has begun; nothing is compared before its split is written.
        images: label and part of every usable image there is now, by path.

    Raises:
        DataError: images came, went, or changed their class or part.
    """
    if not folder.split.exists():
        return
    before = {row["path"]: (row["label"], row["split"]) for row in _read_rows(folder.split)}
    came, went = sorted(images.keys() - before.keys()), sorted(before.keys() - images.keys())
    moved = sorted(path for path in images.keys() & before.keys() if images[path] != before[path])
    parts = [_some(came, "new"), _some(went, "gone"), _some(moved, "in another class or part")]
    if came or went or moved:
        found = f"the images are others than those the run began with ({', '.join(filter(None, parts))})"
        fix = "Put them back as they were, or start a new run with another --output."
        raise DataError(f"going on with {folder.path}", found, fix)


def read_bad_images(folder: RunFolder) -> set[str]:
    """Return the paths that a run found unreadable."""
    return {row["path"] for row in _read_rows(folder.bad_images)} if folder.bad_images.exists() else set()


def _some(paths: list[str], what: str) -> str:
    return f"{len(paths)} {what}, {paths[0]} for one" if paths else ""


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: unescape_formula(value) for key, value in row.items()} for row in rows]


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


def claim_folder(path: Path, recipe: Recipe) -> tuple[RunFolder, bool]:
    """Take a folder for a run: a new or empty one, or one that holds this very run.

    Args:
        path: the output folder; it and its parents are created.
        recipe: resolved.

    Returns:
        The folder, and whether it holds a finished run of this recipe.

    Raises:
        UsageError: it holds another run, or other files.
        DiskError: it cannot be created.
    """
    folder = RunFolder(path)
    create_folder(path)
    try:
        if folder.recipe.exists():
            _check_same_run(folder, recipe)
        else:
            _check_empty(folder)
            write_text(folder.recipe, recipe.to_yaml())  # first: with it the folder is ours, whatever comes
        folder.last_checkpoint.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None
    return folder, folder.read_outcome().get("state") == "done"


def _check_empty(folder: RunFolder) -> None:
    path, unfinished = folder.path, f".{folder.recipe.name}.part"  # a claim that was killed leaves this
    others = sorted(item.name for item in path.iterdir() if item.name != unfinished)
    if others:
        found = f"the folder holds other files ({', '.join(others[:3])}) and no run"
        raise UsageError(f"--output {path}", found, "Name a new folder.")


def _check_same_run(folder: RunFolder, recipe: Recipe) -> None:
    try:
        before = load_recipe(str(folder.recipe))
        different = [line for line in changed_keys(before, recipe) if line.partition(":")[0] not in NO_EFFECT]
    except UsageError as error:
        found = f"it holds a run whose recipe.yaml is damaged ({error.found})"
        raise UsageError(f"--output {folder.path}", found, "Name a new folder with --output.") from None
    if different:
        shown = "; ".join(different[:5]) + ("; ..." if len(different) > 5 else "")
        fix = "Name a new folder with --output, or give the same command again to go on with that run."
        raise UsageError(f"--output {folder.path}", f"it holds another run ({shown})", fix)
