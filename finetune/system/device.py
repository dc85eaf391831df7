"""The machine: device, precision, threads, seeds, and a record of all of them."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from finetune import __version__
from finetune.errors import EnvironmentFaultError, UsageError
from finetune.system.distributed import SINGLE_PROCESS, Distributed, choose_device

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's own place, not a temporary file
BATCHES_PER_WORKER = 3
"""Batches of one decoding process that lie in /dev/shm at a time: two that wait, one that is being made."""


def resolve_device(name: str, distributed: Distributed = SINGLE_PROCESS) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, with its index.

    Each of several processes has a GPU of its own.

    Raises:
        UsageError: another word.
        EnvironmentFaultError: this machine has no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {name}", "there is no such device", "Take auto, cpu, cuda or cuda:N.")
    kind, _, index = name.partition(":")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        devices = "1 CUDA device" if count == 1 else f"{count} CUDA devices"
        found = f"this machine shows {devices} to torch {torch.__version__}"
        fix = "Take --device cpu, or check the driver and CUDA_VISIBLE_DEVICES."
        raise EnvironmentFaultError(f"--device {name}", found, fix)
    return torch.device(
        "cuda", int(index or 0) if distributed.size == 1 else choose_device(distributed.place)
    )


def resolve_precision(device: torch.device) -> Precision:
    """Return the number format that is fastest without harm: bfloat16 or float16 on a GPU, else float32.

    Half precision on CPUs was measured to be slower than float32 wherever the processor lacks matrix
    instructions for it, so a CPU gets it only when the recipe says so.
    """
    if device.type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def available_cores() -> int:
    """Return the processors this process may use (containers and batch systems give fewer than there are)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _quota_cores())


def _quota_cores() -> int:
    """``docker --cpus 2`` and a Kubernetes limit leave every processor in sight, and share out their time."""
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroups of version 2, or "max": no limit
        return sys.maxsize


def resolve_threads(processes: int = 1) -> int:
    """Return the threads to compute with: what OMP_NUM_THREADS says, else all available cores.

    Args:
        processes: that share the cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else max(1, available_cores() // processes)


def resolve_workers(device: torch.device, batch_bytes: int, processes: int = 1) -> int:
    """Return how many processes should decode: all cores beside a GPU, half of them beside CPU training.

    Args:
        device: that trains.
        batch_bytes: of one batch of images; where /dev/shm is too small for all, there are fewer.
        processes: that train on this machine, each with so many of its own.
    """
    return min(_wanted_workers(device, processes), resolve_most_workers(batch_bytes, processes))


def _wanted_workers(device: torch.device, processes: int) -> int:
    cores = available_cores() // processes
    return max(1, min(cores, 8) if device.type == "cuda" else cores // 2)


def resolve_most_workers(batch_bytes: int, processes: int = 1) -> int:
    """Return how many processes may decode where training waits for data: all cores, if /dev/shm has room.

    The arguments are those of :func:`resolve_workers`.
    """
    room = _shared_memory_bytes() // (BATCHES_PER_WORKER * batch_bytes * processes)
    return min(max(1, available_cores() // processes), room)


def find_lack_of_shared_memory(
    asked: int | None, device: torch.device, batch_bytes: int, processes: int = 1
) -> str:
    """Return what /dev/shm is too small for, and the remedy; "" where it is large enough.

    Args:
        asked: decoding processes that the user wants; None leaves their number to the program.
        device: as the others, of :func:`resolve_workers`.
        batch_bytes: as there.
        processes: as there.
    """
    wanted = _wanted_workers(device, processes) if asked is None else asked
    needed, free = wanted * BATCHES_PER_WORKER * batch_bytes * processes, _shared_memory_bytes()
    if needed <= free:
        return ""
    fitting = resolve_most_workers(batch_bytes, processes)
    if asked is not None:
        so = f"--workers {asked} may run out of it"
    else:
        so = f"{fitting} will do it" if fitting else "the training process does it alone, which is slower"
    free_words, needed_words = f"{free / 1e6:,.0f} MB free", f"{needed / 1e6:,.0f} MB"
    return (
        f"{SHARED_MEMORY} has {free_words}, and {wanted * processes} decoding processes would take "
        f"{needed_words} of it: {so}. Enlarge it (docker run --shm-size={math.ceil(needed / 2**30)}g; in "
        f"Kubernetes an emptyDir with medium: Memory at {SHARED_MEMORY}), "
        f"or take --workers {min(fitting, wanted)}"
    )


def _shared_memory_bytes() -> int:
    """Containers often have 64 MB of it, and a worker that runs out dies of a bus error."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return sys.maxsize


PART_PIXELS = 8 * 224 * 224
"""Of the images that go through a network at a time on a CPU. The activations of more do not fit its
caches: measured on two cores, SqueezeNet's forward takes 10.7 ms an image in parts of 8 and 21.6 ms in parts
of 32, and forward and backward 36 ms in parts of 8 and 46 ms in parts of 16."""


def compute_part_size(height: int, width: int) -> int:
    """Return how many images of a size go through a network at a time on a CPU, where that is free."""
    return max(4, min(64, PART_PIXELS // (height * width)))


def derive_seed(*parts: int | str) -> int:
    """Return 63 bits that depend on every part, so that no two uses of a seed draw the same numbers."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed torch, NumPy and Python from the parts: transforms draw from all three.

    ``torch.manual_seed`` would also note the call, with its stack, for every kind of device that is not in
    use: a third of a millisecond, and some memory, for each step and each view.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def set_deterministic(on: bool) -> None:
    """Let torch take only kernels that give the same bits every time; call it before the GPU is used."""
    if on:  # what the program around us has chosen stays otherwise
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware. No environment variables: they hold secrets."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow", "pandas", "safetensors", "huggingface-hub")
    return {
        "finetune": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not a file a path library helps with
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


# --- Know when memory ran out, on a GPU or on a CPU, and give back what can be given back ---


_WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""Of errors that are plain RuntimeErrors: libraries of the GPU, and torch's own allocator on a CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release_memory() -> None:
    """Give cached blocks back to the device, and free ones of the C library back to the system.

    Call it outside of the ``except`` block: inside, the traceback still holds every activation.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc's own; other libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def measure_peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most memory that this process has held so far, in bytes; and the most of its GPU."""
    peak = {"peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak
