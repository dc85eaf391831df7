"""What SageMaker leaves in a container, on this machine's disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = {"epochs": "1", "batch_size": "8", "workers": "0", "strategy": '"top"', "cache": '"off"'}


def lay_out(
    base: Path,
    hyperparameters: Mapping[str, Any],
    channels: Mapping[str, Path],
    hosts: tuple[str, ...] = ("algo-1",),
    checkpoints: bool = True,
) -> Path:
    """Write what the platform would; the channels are copies."""
    config = base / "input" / "config"
    config.mkdir(parents=True)
    for folder in ("model", "output/data", *(["checkpoints"] if checkpoints else [])):
        (base / folder).mkdir(parents=True)
    (config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    modes = {name: {"TrainingInputMode": "File"} for name in channels}
    (config / "inputdataconfig.json").write_text(json.dumps(modes))
    resources = {"current_host": hosts[0], "hosts": list(hosts), "network_interface_name": "eth0"}
    (config / "resourceconfig.json").write_text(json.dumps(resources))
    for name, folder in channels.items():
        shutil.copytree(folder, base / "input" / "data" / name)
    return base


def environment(**more: object) -> dict[str, str]:
    """The suite's own, with the parent process that watches over a run, as users have it."""
    kept = {name: value for name, value in os.environ.items() if name != "FINETUNE_STALL_TIMEOUT"}
    return kept | {name: str(value) for name, value in more.items()}


def start(*words: object, **keys: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keys)


def finish(*words: object, **keys: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **keys)
