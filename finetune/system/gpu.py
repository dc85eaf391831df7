"""The GPUs that torch can use, which of them a process gets, and why one that is there cannot be used."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import torch

from finetune.errors import EnvironmentFaultError, count
from finetune.system.rank import RankInfo

DRIVER = Path("/proc/driver/nvidia")
"""There if the kernel of this machine has loaded NVIDIA's driver; containers see it as well."""
CARDS = Path("/dev")
"""The folder of the device files ``nvidia0``, ``nvidia1`` ...; a container has those that it was given."""
_HIDDEN = ("", "-1", "none", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES by which users and batch systems hide every GPU on purpose."""


def choose_device(rank_info: RankInfo) -> int:
    """Return the index of a process's GPU: its local rank, or 0 if its launcher shows it a single GPU.

    Raises:
        EnvironmentFaultError: there are fewer GPUs than processes.
    """
    number = torch.cuda.device_count()
    if number != 1 and rank_info.local_rank >= number:
        devices, size = count(number, "CUDA device"), rank_info.local_size
        found = f"this machine has {devices} for {count(size, 'process', 'processes')}"
        raise EnvironmentFaultError("a GPU for each process", found, "Start fewer processes: --gpus N.")
    return 0 if number == 1 else rank_info.local_rank


def identify_card(index: int) -> str:
    """Return what tells a card from the others of its machine: its UUID, or the PCI address of a MIG slice.

    Every MIG slice has a UUID of its own. NCCL describes a machine by its PCI devices, one rank for each, and
    two slices of a card have neither peer access nor shared handles, so they count as one card here.
    """
    card: Any = torch.cuda.get_device_properties(index)
    if " MIG " in card.name:
        return f"{card.pci_domain_id:x}:{card.pci_bus_id:x}:{card.pci_device_id:x}"
    return str(card.uuid)


# --- kernels -------------------------------------------------------------------------------------


def check_kernels(index: int, asked: str) -> None:
    """Refuse a GPU for which this build of torch has no code; its first kernel would fail.

    Args:
        index: index of the GPU.
        asked: what the user asked for, such as ``--device auto``.

    Raises:
        EnvironmentFaultError: neither machine code nor PTX of torch fits the GPU.
    """
    built_for = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(index)
    if not built_for or torch.version.cuda is None or any(_runs_on(name, capability) for name in built_for):
        return
    name, (major, minor) = torch.cuda.get_device_name(index), capability
    found = (
        f"{name} has compute capability {major}.{minor}, and torch {torch.__version__} was built for "
        f"{', '.join(built_for)}"
    )
    fix = f"Install a build of torch with code for sm_{major}{minor}, or take --device cpu."
    raise EnvironmentFaultError(asked, found, fix)


def _runs_on(built_for: str, capability: tuple[int, int]) -> bool:
    """Return whether code for ``sm_86``, ``sm_90a`` or ``compute_90`` (PTX) runs on a compute capability.

    Machine code runs on the same major version from its own minor version on, PTX on everything newer. Code
    with the suffix ``a`` runs on its own capability alone, with ``f`` on that of its family (the same major).
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", built_for)
    if parts is None:
        return True  # a notation of the future: torch itself warns
    kind, major, minor, suffix = parts.groups()
    own = (int(major), int(minor))
    if suffix == "a":
        return own == capability
    same_major = own[0] == capability[0]
    return own <= capability and (same_major or (kind == "compute" and not suffix))


# --- a GPU that is not used ----------------------------------------------------------------------


def explain_unused_gpu(asked: str) -> str:
    """Return a warning if ``auto`` takes the CPU although this machine has a GPU, with a remedy; else "".

    Also "" if CUDA_VISIBLE_DEVICES hides all GPUs: then the CPU is what was asked for.

    Args:
        asked: device that the user asked for: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    cards = sorted(CARDS.glob("nvidia[0-9]*"))
    if asked != "auto" or not (cards or DRIVER.exists()) or torch.cuda.is_available():
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in _HIDDEN:
        return ""
    reason, remedy = _find_obstacle(bool(cards))
    return (
        f"this machine has an NVIDIA GPU that torch cannot use: {reason}. The CPU is used instead. {remedy}, "
        "or take --device cpu"
    )


def _find_obstacle(has_cards: bool) -> tuple[str, str]:
    """Return why the GPU cannot be used, and what to do about it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA", "Install a build of torch with CUDA"
    if not has_cards:
        return (
            f"there is {DRIVER} and no {CARDS / 'nvidia0'}, so it is hidden from this container",
            "Start the container with --gpus all (Kubernetes: a limit nvidia.com/gpu; SLURM: --gpus)",
        )
    version = _read_cuda_of_driver()
    if version is None:
        return (
            "the driver's library libcuda.so.1 is not there",
            "Start the container with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
    if version[0] < int(torch.version.cuda.partition(".")[0]):
        return (
            f"its driver{_read_driver()} supports CUDA {version[0]}.{version[1]}, and torch "
            f"{torch.__version__} needs CUDA {torch.version.cuda}",
            "Update the driver, or install a build of torch for that CUDA",
        )
    return _ask_torch(), "Check nvidia-smi, CUDA_VISIBLE_DEVICES and the permissions of /dev/nvidia*"


def _read_cuda_of_driver() -> tuple[int, int] | None:
    """Return the newest version of CUDA that the driver supports; None if its library cannot be loaded."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _read_driver() -> str:
    """Return ``" 535.104.05"``, the driver's version, if its file says it; else ""."""
    try:
        found = re.search(r" (\d+\.[\d.]+) ", (DRIVER / "version").read_text(encoding="utf-8"))
    except OSError:
        return ""
    return f" {found[1]}" if found else ""


def _ask_torch() -> str:
    """Return the message of torch's own failure to use a GPU."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200].rstrip(".")
    return "torch finds no CUDA device"
