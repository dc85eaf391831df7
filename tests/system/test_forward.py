"""Computations that do not fit a GPU go to the CPU."""

from __future__ import annotations

import pytest
import torch

from finetune.system.forward import compute_where_it_fits


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
