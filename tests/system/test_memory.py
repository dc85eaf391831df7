"""What counts as memory that ran out, what happens then, and how its peak is measured."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finetune.errors import EnvironmentFaultError, FinetuneError, LostProcessError
from finetune.system.distributed import SINGLE_PROCESS
from finetune.system.memory import (
    attempt,
    describe_shortage,
    find_largest_peak,
    is_out_of_memory,
    measure_peak_memory,
    reset_peak_memory,
)
from tests.sweeps import slow_except

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB"
ENGINE = "unable to find an engine to execute this computation"
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, unhandled cuda error "
    "(run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\nncclUnhandledCudaError: Call to CUDA "
    "function failed.\nLast error:\nCuda failure 2 'out of memory'"
)

BY_TORCH = [
    torch.OutOfMemoryError(CUDA),
    MemoryError(),
    RuntimeError(CPU),
    RuntimeError(f"Caught OutOfMemoryError in replica 0 on device 0.\ntorch.OutOfMemoryError: {CUDA}"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 255.98 GiB"),
    RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, please '
        "report a bug to PyTorch."
    ),
    RuntimeError(
        "NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "
        '"../c10/cuda/CUDACachingAllocator.cpp":813, please report a bug to PyTorch.'
    ),
]
BY_LIBRARIES = [
    torch.AcceleratorError(
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("HIP error: out of memory\nHIP kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(f"FIND was {ENGINE}"),
    RuntimeError(f"GET was {ENGINE}"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError(
        "CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, "
        "cuDNN may need additional device memory to JIT-compile shape-specialized kernels."
    ),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
    dist.DistBackendError(NCCL),
    dist.DistBackendError(NCCL.replace("failure 2 ", "failure ")),
    dist.DistBackendError(NCCL.replace("Cuda failure 2", "HIP failure")),
]
OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb`"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x4 and 3x2)"),
    dist.DistBackendError(NCCL.replace("2 'out of memory'", "700 'an illegal memory access'")),
    OSError(28, "No space left on device"),
    ValueError(CPU),
]


@pytest.mark.parametrize("error", [*BY_TORCH, *BY_LIBRARIES], ids=lambda error: str(error)[:60])
def test_these_are_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:60])
def test_these_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_message_shows_the_cause() -> None:
    assert describe_shortage(MemoryError()) == "there is no memory left"
    assert describe_shortage(RuntimeError(CUDA)) == CUDA
    assert describe_shortage(dist.DistBackendError(NCCL)) == "Cuda failure 2 'out of memory'"


# --- what happens then ---


def count_calls(error: Exception, failures: int, again: bool = True) -> tuple[object, int, int]:
    """Result of a call that fails some times, how often it was made, and how often it was undone."""
    calls, undone = [], []

    def call() -> int:
        calls.append(1)
        if len(calls) <= failures:
            raise error
        return 7

    result = attempt(call, lambda: undone.append(1), again)
    return result, len(calls), len(undone)


@pytest.mark.slow
def test_torch_has_emptied_its_cache_itself() -> None:
    for error in BY_TORCH:
        assert count_calls(error, failures=1) == (describe_shortage(error), 1, 1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("error", slow_except(BY_LIBRARIES[:3], BY_LIBRARIES))
def test_a_library_gets_a_second_call_with_an_empty_cache(error: Exception) -> None:
    assert count_calls(error, failures=1) == (7, 2, 1)
    assert count_calls(error, failures=2) == (describe_shortage(error), 2, 2)
    assert count_calls(error, failures=1, again=False) == (describe_shortage(error), 1, 1)


def test_other_errors_pass() -> None:
    for error in OTHERS:
        with pytest.raises(type(error)):
            count_calls(error, failures=1)


def test_what_a_failed_call_held_is_free_before_it_is_undone() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def call() -> int:
        held = torch.zeros(3)
        kept.append(weakref.ref(held))
        raise RuntimeError(f"FIND was {ENGINE}")

    alive: list[bool] = []
    gc.disable()  # by its own doing, not by chance
    try:
        attempt(call, lambda: alive.append(kept[-1]() is not None))
    finally:
        gc.enable()
    assert alive == [False, False]


# --- several processes ---


def raised_by(error: Exception) -> FinetuneError:
    with pytest.raises(FinetuneError) as raised, SINGLE_PROCESS.translated():
        raise error
    return raised.value


def test_communication_without_memory_is_no_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.system.distributed._FAILURE_SECONDS", 0.0)
    fault = raised_by(dist.DistBackendError(NCCL))
    assert isinstance(fault, EnvironmentFaultError)
    assert fault.found == "Cuda failure 2 'out of memory'"
    other = raised_by(dist.DistBackendError(NCCL.replace("2 'out of memory'", "700 'an illegal access'")))
    assert isinstance(other, LostProcessError)


def test_the_peak_of_several_processes_is_the_largest() -> None:
    peaks = [
        {"peak_memory_bytes": 3, "peak_gpu_memory_bytes": 1},
        {"peak_memory_bytes": 2, "peak_gpu_memory_bytes": 5},
    ]
    assert find_largest_peak(peaks) == {"peak_memory_bytes": 3, "peak_gpu_memory_bytes": 5}


def test_the_peak_of_a_gpu_is_what_tensors_held_and_what_torch_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[object] = []
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _: 5)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda _: 9)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", began.append)
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    peak = measure_peak_memory(gpu)
    assert peak.pop("peak_memory_bytes") > 2**20
    assert peak == {"peak_gpu_memory_bytes": 5, "peak_gpu_memory_reserved_bytes": 9}
    assert measure_peak_memory(cpu).keys() == {"peak_memory_bytes"}
    reset_peak_memory(cpu)
    reset_peak_memory(gpu)
    assert began == [gpu]
