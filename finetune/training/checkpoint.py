"""Checkpoints on disk: at least one that verifies, whatever happens and whenever it does.

::

    checkpoints/
      checkpoint-000007/        the one before
      checkpoint-000008/        the newest
        state.safetensors       the state; everything but tensors is JSON in its header
        epoch.safetensors       where its epoch began, when the state is inside an epoch
        best.safetensors        the best epoch's weights
        manifest.json           length and sha256 of each

A folder is written aside, flushed and renamed, and only then is the oldest one removed. Neither
``torch.load`` nor safetensors notices a flipped bit in a weight; the sha256 does. No pickle is written
or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
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
from finetune.runs.files import disk_error, free_bytes, sync_folder, write_bytes, write_json
from finetune.training.state import Checkpoint, Progress, Snapshot

KEPT = 2
_NAME = re.compile(r"checkpoint-([0-9]{6,})")
_STATE, _EPOCH, _BEST = "state.safetensors", "epoch.safetensors", "best.safetensors"
_DAMAGE = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError)


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: that holds them and nothing else.
        attempt: number of the process that writes, for the manifest.
        check_owner: called before a write; raises when another process has taken the run over.

    Attributes:
        seconds: that the last write took.
    """

    def __init__(
        self, folder: Path, attempt: int = 1, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.attempt, self.check_owner = folder, attempt, check_owner
        self.seconds = 0.0
        self._damaged: set[str] = set()

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin where not even one checkpoint more would fit.

        Raises:
            DiskError: there is less space than that.
        """
        free = free_bytes(self.folder)
        if free is not None and free < num_bytes:
            found = f"a checkpoint may need {num_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
            fix = "Free some space, or choose another disk with --output."
            raise DiskError(f"training in {self.folder.parent}", found, fix)

    # --- writing ---------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and keep the one before it.

        Raises:
            DiskError: it cannot be written; those that were there are still there.
        """
        began = time.perf_counter()
        self.check_owner()
        before = self.names()
        try:
            self._save(checkpoint)
        except DiskError as error:
            if len(before) < KEPT or not error.is_full:
                raise
            self._keep(before, KEPT - 1)  # a full disk may have room for the newest instead of the oldest
            self._save(checkpoint)
        self._keep(self.names(), KEPT)
        self.seconds = time.perf_counter() - began

    def _save(self, checkpoint: Checkpoint) -> None:
        number = max((_number(name) for name in self.names()), default=0) + 1
        final = self.folder / f"checkpoint-{number:06}"
        part = self.folder / f".{final.name}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            files = dict(self._write_files(part, checkpoint))
            write_json(part / "manifest.json", self._manifest(checkpoint.now.progress, files))
            part.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            raise disk_error(final, error) from None
        except DiskError as error:
            error.asked = f"writing {final}"  # the name that the user knows
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)  # after a success there is none

    def _write_files(self, part: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
        yield _STATE, _write(part / _STATE, checkpoint.now)
        if checkpoint.epoch_start is not checkpoint.now:
            yield _EPOCH, _write(part / _EPOCH, checkpoint.epoch_start)
        if checkpoint.best is not None:
            # Its bytes again, not another name of the same: one bad sector must not spoil both checkpoints.
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
        """Remove all but the newest, those that were found damaged first; a name goes before its content."""
        for name in sorted(names, key=lambda name: (name not in self._damaged, _number(name)))[:-number]:
            trash = self.folder / f".{name}.trash"
            with suppress(OSError):
                (self.folder / name).rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    # --- reading ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names of the checkpoints, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted((n for n in os.listdir(self.folder) if _NAME.fullmatch(n)), key=_number)  # noqa: PTH208

    def load(self, warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; None where there is none at all.

        Args:
            warn: told of every damaged one that was passed over.

        Raises:
            DataError: there are checkpoints, and none verifies. Starting over in silence would be worse.
        """
        self._clean()
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
        return Checkpoint(now, start, best)

    def _clean(self) -> None:
        """Remove what a killed process left behind: no final name is ever touched."""
        if self.folder.is_dir():
            for leftover in [*self.folder.glob(".*.part"), *self.folder.glob(".*.trash")]:
                shutil.rmtree(leftover, ignore_errors=True)


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _write(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write a snapshot and return its line of the manifest."""
    metadata = {"progress": snapshot.progress.to_json()}
    content = safetensors.torch.save(dict(snapshot.tensors), metadata)
    write_bytes(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, Any] = content["files"]
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
    """Read a file, unless it is another one than the manifest tells of."""
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


# --- How often to write a checkpoint: so that a kill costs little, and writing costs less ---


SHARE = 0.01
"""Most of the training time that writing checkpoints may take."""
LEAST_SECONDS = 60.0
"""Between two checkpoints inside an epoch."""
BYTES_PER_SECOND = 2e8
"""Of writing with its sha256 and fsync, as a guess before the first one is measured."""


def estimate_bytes(snapshot: Snapshot, settings: TrainingSettings) -> int:
    """Return the most bytes of a checkpoint: one inside an epoch, whose optimiser has begun to move."""
    weights = sum(tensor.nbytes for tensor in snapshot.under("model.").values())
    slots = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
    state = weights * (1 + slots + (settings.ema_decay is not None))
    return 2 * state + weights  # the state, where its epoch began, and the best epoch


class CheckpointInterval:
    """Says when a checkpoint is due. Where it falls leaves no trace in the result.

    Args:
        num_bytes: of one checkpoint.
    """

    def __init__(self, num_bytes: int) -> None:
        self._cost = num_bytes / BYTES_PER_SECOND
        self._last = time.perf_counter()

    def is_due(self, inside_epoch: bool) -> bool:
        """Return whether enough time has passed for another one."""
        least = LEAST_SECONDS if inside_epoch else 0.0
        return time.perf_counter() - self._last >= max(self._cost / SHARE, least)

    def wrote(self, seconds: float) -> None:
        """Take note of one that was written just now."""
        self._cost, self._last = seconds, time.perf_counter()
