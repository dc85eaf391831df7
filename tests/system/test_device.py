"""The machine: devices, seeds, workers, and a record that holds no secrets."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.errors import EnvironmentFaultError, ExitCode, UsageError
from finetune.system import device as runtime
from finetune.system.device import (
    BATCHES_PER_WORKER,
    available_cores,
    derive_seed,
    describe_environment,
    find_lack_of_shared_memory,
    resolve_device,
    resolve_most_workers,
    resolve_precision,
    resolve_threads,
    resolve_workers,
    seed_everything,
)
from finetune.system.distributed import Distributed
from tests.processes import together

BATCH = 4 * 64 * 3 * 224 * 224
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bfloat16: bool = True) -> None:
    """Let torch see this many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)


def give_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "count", "device"),
    [
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, word: str, count: int, device: str) -> None:
    show_gpus(monkeypatch, count)
    assert str(resolve_device(word)) == device


@pytest.mark.parametrize(
    "word",
    [
        "",
        "gpu",
        "CUDA",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1.0",
        "cuda: 0",
        "cuda:٣",
        "cuda:0\n",
        "cuda:" + "9" * 5000,
        "cpu:0",
        "auto:0",
        "cpu ",
        "mps",
        "cuda:0:1",
    ],
)
def test_words_that_are_no_device(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    show_gpus(monkeypatch, 4)
    with pytest.raises(UsageError) as refusal:
        resolve_device(word)
    assert str(refusal.value) == (
        f"--device {word}: there is no such device\nTake auto, cpu, cuda or cuda:N."
    )


@pytest.mark.parametrize(
    ("word", "count", "shown"),
    [
        ("cuda", 0, "0 CUDA devices"),
        ("cuda:0", 0, "0 CUDA devices"),
        ("cuda:1", 1, "1 CUDA device"),
        ("cuda:2", 2, "2 CUDA devices"),
    ],
)
def test_devices_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, word: str, count: int, shown: str
) -> None:
    show_gpus(monkeypatch, count)
    with pytest.raises(EnvironmentFaultError) as fault:
        resolve_device(word)
    assert fault.value.exit_code == ExitCode.ENVIRONMENT
    assert fault.value.message == f"--device {word}: this machine shows {shown} to torch {torch.__version__}"
    assert fault.value.fix == "Take --device cpu, or check the driver and CUDA_VISIBLE_DEVICES."


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision(CPU) == "float32"
    show_gpus(monkeypatch, 1, bfloat16=True)
    assert resolve_precision(CUDA) == "bfloat16"
    show_gpus(monkeypatch, 1, bfloat16=False)
    assert resolve_precision(CUDA) == "float16"


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        (("new", "new"), "bfloat16"),
        (("new", "old"), "float16"),
        (("old", "new"), "float16"),
        (("new", "old", "none"), "float32"),
    ],
)
def test_ranks_with_different_gpus_agree_on_a_precision(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], common: str
) -> None:
    def work(distributed: Distributed) -> str:
        kind = kinds[distributed.rank]
        show_gpus(monkeypatch, 1, bfloat16=kind == "new")
        return resolve_precision(CPU if kind == "none" else CUDA, distributed)

    assert together(work, len(kinds)) == [common] * len(kinds)


# --- cores, threads, workers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("9900000 100000\n", 16),
        ("", 16),
        (None, 16),
    ],
)
def test_a_container_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, cores: int
) -> None:
    quota = tmp_path / "cpu.max"
    if content is not None:
        quota.write_text(content)
    monkeypatch.setattr(runtime, "CPU_QUOTA", quota)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(16)))
    assert available_cores() == cores


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("", 7), ("0", 7), ("many", 7), ("-1", 7)])
def test_threads(monkeypatch: pytest.MonkeyPatch, asked: str, threads: int) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert resolve_threads() == threads


@pytest.mark.parametrize(
    ("device", "cores", "free", "workers"),
    [
        (CPU, 1, 2**40, 1),
        (CPU, 2, 2**40, 1),
        (CPU, 9, 2**40, 4),
        (CUDA, 2, 2**40, 2),
        (CUDA, 64, 2**40, 8),
        (CUDA, 64, 3 * BATCHES_PER_WORKER * BATCH, 3),
        (CUDA, 64, BATCHES_PER_WORKER * BATCH - 1, 0),  # docker's 64 MB, and batches of 64
        (CPU, 4, 0, 0),
    ],
)
def test_workers(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, cores: int, free: int, workers: int
) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: cores)
    give_shared_memory(monkeypatch, free)
    assert resolve_workers(device, BATCH) == workers


def test_workers_where_there_is_no_shared_memory_to_ask_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(runtime, "available_cores", lambda: 4)
    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert resolve_workers(CUDA, BATCH) == 4


@pytest.mark.parametrize(
    ("device", "processes", "free", "workers", "most"),
    [
        (CUDA, 4, 2**40, 4, 4),
        (CUDA, 4, 4 * 2 * BATCHES_PER_WORKER * BATCH, 2, 2),
        (CPU, 2, 2**40, 4, 8),
        (CPU, 32, 2**40, 1, 1),  # more processes than cores
    ],
)
def test_processes_share_the_cores_and_the_room(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, processes: int, free: int, workers: int, most: int
) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: 16)
    give_shared_memory(monkeypatch, free)
    assert resolve_workers(device, BATCH, processes) == workers
    assert resolve_most_workers(BATCH, processes) == most


@pytest.mark.parametrize(
    ("asked", "processes", "free", "said"),
    [
        (None, 1, 8 * BATCHES_PER_WORKER * BATCH, ""),
        (
            None,
            1,
            2 * BATCHES_PER_WORKER * BATCH,
            "8 decoding processes .*: 2 are used instead.*--workers 2",
        ),
        (None, 1, 64 * 2**20, "has 67 MB free.*decodes alone.*--shm-size=1g.*medium: Memory.*--workers 0"),
        (None, 4, 64 * 2**20, "16 decoding processes"),
        (3, 1, 3 * BATCHES_PER_WORKER * BATCH, ""),
        (3, 1, 2 * BATCHES_PER_WORKER * BATCH, "--workers 3 may run out of it.*--workers 2"),
        (64, 1, 2 * BATCHES_PER_WORKER * BATCH, "--shm-size=7g"),
        (0, 1, 0, ""),
    ],
)
def test_what_dev_shm_is_too_small_for(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, processes: int, free: int, said: str
) -> None:
    monkeypatch.setattr(runtime, "available_cores", lambda: 16)
    give_shared_memory(monkeypatch, free)
    lack = find_lack_of_shared_memory(asked, CUDA, BATCH, processes)
    assert re.search(said, lack) if said else lack == ""


# --- seeds ---------------------------------------------------------------------------------------


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(0, "view", 3, 17) == 3337200839219710123
    assert 0 <= derive_seed("x") < 2**63


def test_a_seed_depends_on_every_part_and_its_place() -> None:
    parts = [
        *(
            (),
            (0,),
            (1,),
            (0, "view"),
            (0, "order"),
            (1, "view"),
            ("view", 0),
            (0, "view", 0),
            (0, "view", 1),
        ),
        *(
            (0, "view", 1, 0),
            (0, "view", 0, 1),
            (0, "view", 11),
            (0, "view", 1, 1),
            (0, "step", 1),
            (10, "view"),
        ),
    ]
    assert len({derive_seed(*part) for part in parts}) == len(parts)


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_everything_repeats() -> None:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        seed_everything(1, "a")
        first = draw()
        second = draw()
        seed_everything(1, "a")
        assert draw() == first
        seed_everything(1, "b")
        third = draw()
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert all(one != other for one, other in zip(first, third, strict=True))


# --- the record ----------------------------------------------------------------------------------


def test_the_record_holds_no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "HOME",
        "USER",
        "HF_ENDPOINT",
        "CUDA_VISIBLE_DEVICES",
        "X",
    ):
        monkeypatch.setenv(name, f"canary-{name}")
    text = json.dumps(describe_environment(CPU))
    assert "canary" not in text


def test_the_record() -> None:
    record = describe_environment(CPU)
    assert record["torch"] == torch.__version__.partition("+")[0] or record["torch"] == torch.__version__
    assert record["device"] == "cpu" and record["gpu"] is None and record["cuda"] is None
    assert record["processor"]
    assert record["cores"] == available_cores() and record["threads"] == torch.get_num_threads()
    assert {"finetune", "python", "torchvision", "timm", "numpy", "pillow", "platform"} <= set(record)


def test_the_record_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_environment(torch.device("cuda", 1))["gpu"] == "GPU 1"


def test_seeding_gives_torchs_own_numbers_and_leaves_nothing_behind() -> None:
    queued = len(torch.cuda._queued_calls)
    for step in range(3):
        seed_everything(5, "step", step)
        mine = torch.rand(4)
        torch.default_generator.manual_seed(derive_seed(5, "step", step))
        assert torch.rand(4).equal(mine)
    assert len(torch.cuda._queued_calls) == queued
