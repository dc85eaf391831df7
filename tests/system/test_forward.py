"""Chunks of a batch; and computations that do not fit a GPU go to the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.system.forward import ChunkedForward, compute_where_it_fits


def run_chunks(num_images: int, chunk_size: int, least: int, most: int = 1000) -> list[int]:
    """The sizes of the chunks that were computed, where memory runs out beyond ``most`` images."""
    sizes = []

    def forward(images: Tensor) -> Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images))
        return 2 * images

    images = torch.arange(float(num_images))[:, None]
    assert ChunkedForward(forward, chunk_size, least)(images).equal(2 * images)
    return sizes


def test_a_rest_that_is_too_small_joins_the_chunk_before_it() -> None:
    assert run_chunks(9, 4, least=1) == [4, 4, 1]
    assert run_chunks(9, 4, least=2) == [4, 5]
    assert run_chunks(8, 0, least=2) == [8]
    assert run_chunks(1, 4, least=2) == [1]
    assert run_chunks(9, 0, least=2, most=3) == [3, 3, 3]
    with pytest.raises(torch.OutOfMemoryError):
        run_chunks(3, 0, least=2, most=2)  # neither 1 and 2 nor 3 can be computed


def test_where_a_gpu_has_no_room_the_cpu_computes() -> None:
    asked = []

    def compute(device: torch.device) -> str:
        asked.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return device.type

    assert compute_where_it_fits(torch.device("cuda"), compute) == "cpu"
    assert compute_where_it_fits(torch.device("cpu"), compute) == "cpu"
    assert asked == ["cuda", "cpu", "cpu"]


def test_other_errors_of_a_gpu_pass() -> None:
    def compute(device: torch.device) -> None:
        raise RuntimeError(f"an illegal memory access on {device}")

    with pytest.raises(RuntimeError, match="illegal memory access on cuda"):
        compute_where_it_fits(torch.device("cuda"), compute)
