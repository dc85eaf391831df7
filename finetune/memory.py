"""Know when memory ran out, on a GPU or on a CPU, and give back what can be given back."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress

import torch

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
