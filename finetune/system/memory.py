"""Memory: recognise that it ran out, try again with less in the way, and measure its peak."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from finetune.errors import EnvironmentFaultError

T = TypeVar("T")

_BY_TORCH = (
    # torch's allocators (c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp). The first has the
    # type torch.OutOfMemoryError, unless torch._inductor or a worker's traceback wraps it.
    r"(CUDA|HIP) out of memory\. ",
    r"DefaultCPUAllocator: (can't allocate|not enough) memory",
    # The CUDA allocator asks NVML for the processes on the GPU while it reports that memory ran out. NVML
    # lacks in some containers, on Jetson and under WSL, and fails on MIG (pytorch issues 112377 and 185240).
    r"NVML_SUCCESS == .*INTERNAL ASSERT FAILED at .*CUDACachingAllocator\.cpp",
)
"""Messages of torch's own allocators, which have returned their unused memory to the GPU before they fail."""

_BY_LIBRARIES = (
    # CUDA's runtime, a torch.AcceleratorError (c10/cuda/CUDAException.cpp), and its driver, which expandable
    # segments and kernel modules use (c10/cuda/driver_api.h).
    r"(CUDA|HIP) (driver )?error: out of memory",
    # cuBLAS, hipBLAS and cuSOLVER (aten/src/ATen/cuda/Exceptions.cpp). `cublasCreate` answers NOT_INITIALIZED
    # if the memory for its handle cannot be had.
    r"(CUBLAS|HIPBLAS|CUSOLVER|HIPSOLVER)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    # cuDNN (cudnn_graph.h); a convolution names no reason after every engine failed, mostly for want of its
    # workspace (aten/src/ATen/native/cudnn/Conv_v8.cpp and Conv_v7.cpp).
    r"CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    r"CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED",
    r"unable to find an engine to execute this computation",
    r"Unable to find a valid cuDNN algorithm to run convolution",
    r"ran out of memory outside PyTorch's allocator",
    # MIOpen (include/miopen/miopen.h, src/hip/handlehip.cpp).
    r"miopenStatusAllocFailed|Memory not available to allocate buffer",
    # Triton (backends/nvidia/driver.c and backends/amd/driver.c, whose spelling this is).
    r"Triton Error \[(CUDA|HIP)\]: (\s*Code: \d+, Mess+age: )?out of memory",
    # NCCL and RCCL (src/include/checks.h), in a DistBackendError of torch.
    r"(Cuda|HIP) failure (\d+ )?'out of memory'",
)
"""Messages of libraries, which allocate beside torch: what torch keeps unused may be all that they lack."""

_LIBRARIES = re.compile("|".join(_BY_LIBRARIES))
_ALL = re.compile("|".join(_BY_TORCH + _BY_LIBRARIES), re.DOTALL)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _ALL.search(str(error)) is not None


def describe_shortage(error: BaseException) -> str:
    """Return the message of an out-of-memory error in one line of at most 200 characters, with the cause."""
    message = " ".join(str(error).split())
    cause = _ALL.search(message)  # NCCL's comes last
    start = cause.start() if cause is not None and cause.end() > 200 else 0
    return message[start : start + 200] or "there is no memory left"


def shortage_error(asked: str, error: BaseException) -> EnvironmentFaultError:
    """Return the error of a run that cannot go on for lack of memory."""
    fix = "Lower --batch-size, --img-size or --workers."
    return EnvironmentFaultError(asked, describe_shortage(error), fix)


def attempt(call: Callable[[], T], undo: Callable[[], None] = lambda: None, again: bool = True) -> T | str:
    """Return the result of a call, or the message of its out-of-memory error after all its memory is freed.

    A library may lack only what torch keeps unused, so its call is made once more after that is released.

    Args:
        call: work that may run out of memory; its result is never a text.
        undo: reverses what a call that ran out of memory has changed.
        again: whether a second call may be made.
    """
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found, is_by_library = describe_shortage(error), _LIBRARIES.search(str(error)) is not None
    # Outside the except block, since its traceback keeps every activation alive.
    undo()
    release_memory()
    return attempt(call, undo, again=False) if again and is_by_library else found


def release_memory() -> None:
    """Return unused memory to the GPU and to the operating system.

    Call it outside of the ``except`` block: inside, the traceback still refers to every activation.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


# --- the peak ---


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak of a GPU's memory start anew; the peak of the process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure_peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process so far, and of its GPU if it has one, in bytes.

    Tensors held ``peak_gpu_memory_bytes`` of the GPU's memory, and torch reserved
    ``peak_gpu_memory_reserved_bytes`` for them. What libraries allocate beside torch is not counted.
    """
    peak = {"peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        peak["peak_gpu_memory_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return peak


def find_largest_peak(peaks: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return the largest of each value that :func:`measure_peak_memory` gave for several processes."""
    return {key: max(peak[key] for peak in peaks) for key in peaks[0]}
