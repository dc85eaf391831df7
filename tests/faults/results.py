"""What a run must look like after a fault, and after going on from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from finetune.training.checkpoint import CheckpointStore

TIMED = (
    "seconds",
    "images_per_second",
    "data_wait_fraction",
    "epoch_seconds",
    "wait_seconds",
    "peak_memory_bytes",
)
"""Metrics that say how long something took, or how much memory."""


def assert_same_run(one: Path, two: Path) -> None:
    """Same weights, averages, optimiser, history, metrics and predictions, bit for bit; nothing left over."""
    assert _tensors(one / "model" / "model.safetensors") == _tensors(two / "model" / "model.safetensors")
    for name in ("predictions.csv", "confusion_matrix.csv", "plan.csv", "split.csv", "classes.txt"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert read_history(one) == read_history(two)
    assert read_metrics(one) == read_metrics(two)
    assert _state(one) == _state(two)
    assert not list(two.rglob(".*"))
    assert json.loads((two / "outcome.json").read_text())["state"] == "done"


def fault_of(run: Path) -> str:
    """Say what is half written under a final name; nothing is where all is well."""
    if not run.is_dir():
        return ""
    files = [path for path in run.rglob("*") if path.is_file() and not _is_aside(path.relative_to(run))]
    faults = [f"{path.name}: {error}" for path in files if (error := _read(path))]
    CheckpointStore(run / "checkpoints").load(faults.append)
    return "; ".join(faults)


def _is_aside(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str:
    """Read a file to its end in its own format, and return what is wrong with it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix in {".csv", ".txt", ".yaml", ".md"}:
            assert path.read_text().endswith("\n")
    except Exception as error:
        return repr(error)
    return ""


def _tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def read_history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def read_metrics(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in TIMED}


def _state(run: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Tensors (weights, optimiser, average) and progress of the last checkpoint, less its times."""
    path = max((run / "checkpoints").iterdir()) / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    history = [{k: v for k, v in row.items() if k not in TIMED} for row in progress.pop("history")]
    kept = {key: value for key, value in progress.items() if key not in TIMED}
    return _tensors(path), kept | {"history": history}
