"""``explain.json``: what an explanation was computed from, and what its checks found."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray

from finetune import __version__
from finetune.features.network import Network
from finetune.runs.files import write_bytes, write_json
from finetune.system.display import Display

RECORD = "explain.json"


def write_record(folder: Path, method: str, network: Network, facts: dict[str, Any]) -> dict[str, Any]:
    """Write ``explain.json``, and return its content.

    Args:
        folder: the folder of the results, as :func:`finetune.runs.new_folder.new_folder` yields it.
        method: name of the method.
        network: the network that was explained.
        facts: what was asked and found: layer, class, scores, checks, files. JSON values; no NaN.
    """
    card = network.backbone.card
    record = {
        "method": method,
        "model": card.name,
        "weights": network.weights,
        "preprocessing": card.preprocessing.to_dict(),
        "device": network.placement.device.type,
        **facts,
        "versions": {
            "finetune": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    }
    write_json(folder / RECORD, record)
    return record


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write named arrays as a compressed ``.npz`` file, atomically.

    Raises:
        DiskError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def say_written(output: Path, record: dict[str, Any], display: Display) -> dict[str, Any]:
    """Name the files that were written; return the record with the path of the output, as ``--json`` does."""
    files = sorted(path.name for path in output.iterdir())
    display.say(f"{output}: {', '.join(files)}", style="bold")
    return {"output": str(output), **record}
