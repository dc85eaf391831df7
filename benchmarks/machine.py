"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import __version__

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-benchmarks"


def describe_machine(threads: int, workers: int, quick: bool) -> dict[str, Any]:
    """Return hardware, versions, date and settings."""
    return {
        "processor": _read("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": count_cores(),
        "memory_gb": round(int((_read("/proc/meminfo", "MemTotal") or "0").split()[0]) / 1e6),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "finetune": __version__,
        "revision": _revision(),
        "gpu": _gpu(),
        "threads": threads,
        "workers": workers,
        "quick": quick,
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def count_cores() -> int:
    """Return the processors this process may use."""
    return len(os.sched_getaffinity(0))


def _read(path: str, name: str) -> str:
    for line in Path(path).read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _revision() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    words = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    said = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    return said.stdout.strip() or "unknown"


def _gpu() -> str | None:
    """Return the name of the GPU, without a CUDA context in this process."""
    tool = shutil.which("nvidia-smi")
    words = [tool or "", "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(words, capture_output=True, text=True, check=False) if tool else None  # noqa: S603
    return (said.stdout.strip().partition("\n")[0] or None) if said else None
