"""Checkpoints of a few numbers, and the folders that hold them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from finetune.errors import DataError
from finetune.training.checkpoint import CheckpointStore
from finetune.training.state import Checkpoint, Progress, Snapshot

STATE, EPOCH, BEST = "state.safetensors", "epoch.safetensors", "best.safetensors"
MANIFEST = "manifest.json"


def snapshot(step: int, kind: float = 0.0) -> Snapshot:
    """Tensors that tell which step and which of the three files they are of."""
    return Snapshot({"model.weight": torch.full((500,), step + kind)}, Progress(step=step, batch=1))


def checkpoint(step: int, best: Snapshot | None = None) -> Checkpoint:
    """One from inside an epoch, with all three files."""
    return Checkpoint(snapshot(step), snapshot(step, 0.25), best or snapshot(step, 0.5))


def fill(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder)
    for step in steps:
        store.save(checkpoint(step))
    return store


def load(folder: Path) -> tuple[int, list[str]]:
    """The step of the checkpoint that is used, and the warnings."""
    said: list[str] = []
    loaded = CheckpointStore(folder).load(said.append)
    assert loaded is not None
    for kind, part in ((0.0, loaded.now), (0.25, loaded.epoch_start), (0.5, loaded.best)):
        assert part is not None
        assert part.tensors["model.weight"].equal(torch.full((500,), loaded.now.progress.step + kind))
    return loaded.now.progress.step, said


def verifies(path: Path, aside: Path) -> bool:
    """Whether one checkpoint can be used by itself."""
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(path, aside / path.name)
    try:
        return CheckpointStore(aside).load() is not None
    except DataError:
        return False


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]
