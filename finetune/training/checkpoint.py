"""Checkpoints on disk; a crash at any time leaves at least one that verifies.

::

    checkpoints/
      checkpoint-000007/        the previous one
      checkpoint-000008/        the newest
        state.safetensors       the state: tensors, and counters as JSON in the header
        epoch.safetensors       the state at the start of the epoch, if the checkpoint is inside an epoch
        best.safetensors        the best epoch's weights
        manifest.json           length and sha256 of each

A checkpoint is written to a temporary folder, flushed and renamed; only then is the oldest one removed. The
sha256 detects a flipped bit in a weight, which ``torch.load`` and safetensors do not. No pickle is used.
:class:`CheckpointInterval` decides when one is due.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from finetune import __version__
from finetune.errors import DataError, DiskError
from finetune.recipe import TrainingSettings
from finetune.runs.files import (
    disk_error,
    free_bytes,
    read_object,
    remove_folder,
    sync_folder,
    write_bytes,
    write_json,
)
from finetune.training.state import Checkpoint, Progress, Snapshot

NUM_KEPT = 2
_NAME = re.compile(r"checkpoint-([0-9]{6,})")
_STATE, _EPOCH, _BEST = "state.safetensors", "epoch.safetensors", "best.safetensors"
_DAMAGE = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError)


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: folder that holds only checkpoints.
        attempt: number of the attempt, for the manifest.
        check_owner: called before each write; raises if another process owns the run now.

    Attributes:
        seconds: duration of the last write in seconds.
    """

    def __init__(
        self, folder: Path, attempt: int = 1, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.attempt, self.check_owner = folder, attempt, check_owner
        self.seconds = 0.0
        self._damaged: set[str] = set()

    def check_space(self, num_bytes: int) -> None:
        """Refuse to start training if the disk has no space for another checkpoint.

        Raises:
            DiskError: fewer than ``num_bytes`` are free.
        """
        free = free_bytes(self.folder)
        if free is not None and free < num_bytes:
            found = f"a checkpoint may need {num_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
            fix = "Free some space, or choose another disk with --output."
            raise DiskError(f"training in {self.folder.parent}", found, fix)

    # --- writing ---------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and keep the previous one.

        Raises:
            DiskError: it cannot be written; the existing ones are unchanged.
        """
        began = time.perf_counter()
        self.check_owner()
        before = self.names()
        try:
            self._save(checkpoint)
        except DiskError as error:
            if len(before) < NUM_KEPT or not error.is_full:
                raise
            self._keep(before, NUM_KEPT - 1)  # on a full disk the new one may fit in place of the oldest
            self._save(checkpoint)
        self._keep(self.names(), NUM_KEPT)
        self.seconds = time.perf_counter() - began

    def _save(self, checkpoint: Checkpoint) -> None:
        number = max((_number(name) for name in self.names()), default=0) + 1
        final = self.folder / f"checkpoint-{number:06}"
        part = self.folder / f".{final.name}.part"
        try:
            remove_folder(part, ignore_errors=True)
            part.mkdir(parents=True)
            files = dict(self._write_files(part, checkpoint))
            write_json(part / "manifest.json", self._manifest(checkpoint.now.progress, files))
            part.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            raise disk_error(final, error) from None
        except DiskError as error:
            error.asked = f"writing {final}"  # not the temporary folder
            raise
        finally:
            remove_folder(part, ignore_errors=True)  # it exists only after a failure

    def _write_files(self, part: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
        yield _STATE, _write(part / _STATE, checkpoint.now)
        if checkpoint.epoch_start is not checkpoint.now:
            yield _EPOCH, _write(part / _EPOCH, checkpoint.epoch_start)
        if checkpoint.best is not None:
            # A copy, not a hard link: one bad sector must not damage both checkpoints.
            yield _BEST, _write(part / _BEST, checkpoint.best)

    def _manifest(self, progress: Progress, files: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": progress.step,
            "epoch": progress.epoch,
            "batch": progress.batch,
            "attempt": self.attempt,
            "finetune": __version__,
            "torch": torch.__version__,
            "files": files,
        }

    def _keep(self, names: list[str], number: int) -> None:
        """Remove all but the newest ``number``, damaged ones first; each is renamed before it is deleted."""
        for name in sorted(names, key=lambda name: (name not in self._damaged, _number(name)))[:-number]:
            trash = self.folder / f".{name}.trash"
            with suppress(OSError):
                (self.folder / name).rename(trash)
            remove_folder(trash, ignore_errors=True)

    # --- reading ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names of the checkpoints, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted((n for n in os.listdir(self.folder) if _NAME.fullmatch(n)), key=_number)  # noqa: PTH208

    def load(self, warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; None if there are no checkpoints.

        Args:
            warn: called with a message for each damaged checkpoint that is skipped.

        Raises:
            DataError: there are checkpoints but none verifies, so training does not silently start over.
        """
        faults = []
        for name in reversed(self.names()):
            try:
                checkpoint = self._read(self.folder / name)
            except _DAMAGE as error:
                faults.append(f"{name}: {str(error) or type(error).__name__}")
                continue
            self._damaged = {fault.partition(":")[0] for fault in faults}
            for fault in faults:
                warn(f"skipping a damaged checkpoint: {fault}")
            return checkpoint
        if faults:
            found = f"none of its checkpoints can be used ({'; '.join(faults)})"
            fix = "Restore them from a backup, or start a new run with another --output."
            raise DataError(f"resuming {self.folder.parent}", found, fix)
        return None

    def _read(self, path: Path) -> Checkpoint:
        files = _read_manifest(path)
        now = _read_snapshot(path / _STATE, files[_STATE])
        start = _read_snapshot(path / _EPOCH, files[_EPOCH]) if _EPOCH in files else now
        best = _read_snapshot(path / _BEST, files[_BEST]) if _BEST in files else None
        if best is None and now.progress.best_epoch >= 0:
            raise ValueError(f"{_BEST} is missing")
        return Checkpoint(now, start, best)

    def clean(self) -> None:
        """Remove temporary folders of a killed process."""
        if self.folder.is_dir():
            for leftover in [*self.folder.glob(".*.part"), *self.folder.glob(".*.trash")]:
                remove_folder(leftover, ignore_errors=True)


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _write(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write a snapshot and return its entry in the manifest."""
    metadata = {"progress": snapshot.progress.to_json()}
    content = safetensors.torch.save(dict(snapshot.tensors), metadata)
    write_bytes(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        files: dict[str, Any] = read_object(path / "manifest.json")["files"]
        for name in files:
            files[name]["bytes"], files[name]["sha256"]
    except FileNotFoundError:
        raise ValueError("its manifest.json is missing") from None
    except _DAMAGE:
        raise ValueError("its manifest.json is damaged") from None
    if _STATE not in files or files.keys() - {_STATE, _EPOCH, _BEST}:
        raise ValueError("its manifest.json is damaged")
    return files


def _read_snapshot(path: Path, expected: dict[str, Any]) -> Snapshot:
    """Read a snapshot, and verify its size and sha256 against the manifest."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes instead of {expected['bytes']}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise ValueError(f"{path.name} has changed since it was written (sha256)")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        progress = Progress.from_json(header["__metadata__"]["progress"])
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    return Snapshot(safetensors.torch.load(content), progress)


# --- When a checkpoint is due ---


MAX_WRITING_SHARE = 0.01
"""Largest share of the training time spent on writing checkpoints."""
MIN_SECONDS = 60.0
"""Shortest time between two checkpoints inside an epoch, in seconds."""
BYTES_PER_SECOND = 2e8
"""Assumed writing speed, with sha256 and fsync, before the first checkpoint is measured."""


def estimate_bytes(snapshot: Snapshot, settings: TrainingSettings) -> int:
    """Return the largest size of a checkpoint in bytes: inside an epoch, with full optimizer state."""
    weights = sum(tensor.nbytes for tensor in snapshot.under("model.").values())
    slots = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
    state = weights * (1 + slots + (settings.ema_decay is not None))
    return 2 * state + weights  # the state, the state at the start of the epoch, and the best weights


class CheckpointInterval:
    """Decides when a checkpoint is due; the result of the run does not depend on it.

    Args:
        num_bytes: estimated size of one checkpoint.
    """

    def __init__(self, num_bytes: int) -> None:
        self._cost = num_bytes / BYTES_PER_SECOND
        self._last = time.perf_counter()

    def is_due(self, inside_epoch: bool) -> bool:
        """Return whether enough time has passed for another one."""
        least = MIN_SECONDS if inside_epoch else 0.0
        return time.perf_counter() - self._last >= max(self._cost / MAX_WRITING_SHARE, least)

    def wrote(self, seconds: float) -> None:
        """Note that a checkpoint was written just now, in ``seconds`` seconds."""
        self._cost, self._last = seconds, time.perf_counter()
