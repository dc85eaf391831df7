"""The machine: device, precision, threads, seeds, and a record of versions and hardware."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import random
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from finetune import __version__
from finetune.errors import EnvironmentFaultError, UsageError
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.gpu import check_kernels, choose_device

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RISING: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
"""A device that is given one of these precisions has those before it as well."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's own place, not a temporary file
BATCHES_PER_WORKER = 3
"""Batches that one decoding process holds in /dev/shm: two that are prefetched, one in preparation."""


def resolve_device(name: str, distributed: Distributed = SINGLE_PROCESS) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a GPU with its index.

    Each of several processes gets its own GPU.

    Raises:
        UsageError: ``name`` is none of these.
        EnvironmentFaultError: this machine has no such device, or torch was not built for it.
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
    chosen = int(index or 0) if distributed.size == 1 else choose_device(distributed.rank_info)
    check_kernels(chosen, f"--device {name}")
    return torch.device("cuda", chosen)


def resolve_precision(device: torch.device, distributed: Distributed = SINGLE_PROCESS) -> Precision:
    """Return the fastest safe precision: bfloat16 on a GPU, float16 on an older one, float32 on a CPU.

    On CPUs without matrix instructions for half precision it was measured to be slower than float32, so a CPU
    uses it only if the recipe asks for it. Every rank makes this call, and gets the precision that all of
    their devices have: a job may have GPUs of different kinds.
    """
    return min(distributed.collect(_own_precision(device)), key=_RISING.index)


def _own_precision(device: torch.device) -> Precision:
    if device.type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def available_cores() -> int:
    """Return the number of cores this process may use (containers and batch systems may limit it)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _quota_cores())


def _quota_cores() -> int:
    """Return the limit of ``docker --cpus`` or Kubernetes: a CPU-time quota that hides no core."""
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroups v2, or "max": no limit
        return sys.maxsize


def resolve_threads(processes: int = 1) -> int:
    """Return the number of compute threads: OMP_NUM_THREADS if set, else this process's share of the cores.

    Args:
        processes: number of processes that share the cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else max(1, available_cores() // processes)


def resolve_workers(device: torch.device, batch_bytes: int, processes: int = 1) -> int:
    """Return the number of decoding processes: all cores, at most 8, for a GPU; half of them for a CPU.

    Args:
        device: device that trains.
        batch_bytes: size of one batch of images in bytes; the number is lower if /dev/shm is too small.
        processes: number of training processes on this machine, each of which starts this many of its own.
    """
    return min(_wanted_workers(device, processes), resolve_most_workers(batch_bytes, processes))


def _wanted_workers(device: torch.device, processes: int) -> int:
    cores = available_cores() // processes
    return max(1, min(cores, 8) if device.type == "cuda" else cores // 2)


def resolve_most_workers(batch_bytes: int, processes: int = 1) -> int:
    """Return the largest number of decoding processes: all cores, if /dev/shm has room for their batches.

    The arguments are those of :func:`resolve_workers`.
    """
    room = _shared_memory_bytes() // (BATCHES_PER_WORKER * batch_bytes * processes)
    return min(max(1, available_cores() // processes), room)


def find_lack_of_shared_memory(
    asked: int | None, device: torch.device, batch_bytes: int, processes: int = 1
) -> str:
    """Return a warning if /dev/shm is too small for the decoding processes, with a remedy; else "".

    Args:
        asked: number of decoding processes that the user asked for; None: :func:`resolve_workers` decides.
        device: device that trains.
        batch_bytes: size of one batch of images in bytes.
        processes: number of training processes on this machine.
    """
    wanted = _wanted_workers(device, processes) if asked is None else asked
    needed, free = wanted * BATCHES_PER_WORKER * batch_bytes * processes, _shared_memory_bytes()
    if needed <= free:
        return ""
    fitting = resolve_most_workers(batch_bytes, processes)
    if asked is not None:
        result = f"--workers {asked} may run out of it"
    elif fitting:
        result = f"{fitting} are used instead"
    else:
        result = "the training process decodes alone, which is slower"
    return (
        f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, and {wanted * processes} decoding processes need "
        f"{needed / 1e6:,.0f} MB of it: {result}. Enlarge it (docker run --shm-size="
        f"{math.ceil(needed / 2**30)}g; in Kubernetes an emptyDir with medium: Memory at {SHARED_MEMORY}), "
        f"or take --workers {min(fitting, wanted)}"
    )


def _shared_memory_bytes() -> int:
    """Return the free bytes of /dev/shm. Containers often have 64 MB; a worker that runs out gets SIGBUS."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return sys.maxsize


CHUNK_PIXELS = 8 * 224 * 224
"""Pixels of the images in one chunk on a CPU. The activations of more images do not fit into its caches:
measured on two cores, SqueezeNet's forward takes 10.7 ms an image in chunks of 8 and 21.6 ms in chunks of 32,
and forward and backward 36 ms in chunks of 8 and 46 ms in chunks of 16."""


def compute_chunk_size(height: int, width: int) -> int:
    """Return how many images of a size, in pixels, a chunk holds on a CPU: 4 to 64."""
    return max(4, min(64, CHUNK_PIXELS // (height * width)))


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, so that each use of a seed draws its own numbers."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed torch, NumPy and Python from the parts, since transforms draw from all three.

    ``torch.manual_seed`` is not used: it also records the call with its stack for every backend that is not
    initialised, which costs a third of a millisecond and some memory for each step and each view.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def set_deterministic(on: bool) -> None:
    """Let torch use only kernels that give the same bits every time; call it before the GPU is used."""
    if on:  # otherwise the settings of the calling program stay
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware, but no environment variables: these may hold secrets."""
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
