"""A process whose main thread is blocked in C leaves when another one is lost: real processes over gloo."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from finetune.errors import DataError, ExitCode, FinetuneError
from finetune.system import watch
from finetune.system.distributed import Distributed
from finetune.system.watch import watched_processes
from tests.processes import exit_codes, together


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 1.0)


def block_in_c(rank: int) -> None:
    """Wait for a message that never comes, as with NCCL: no Python code of this thread runs."""
    with suppress(RuntimeError):
        dist.recv(torch.zeros(1), src=rank)
    ctypes.CDLL(None).pause()  # that process has left before this one; NCCL would not tell


def killed(distributed: Distributed) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failed(distributed: Distributed) -> None:
    distributed.publish(DataError("--data x", "it is gone", "Bring it back."))
    raise DataError("--data x", "it is gone", "Bring it back.")


@pytest.mark.sample(1)
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("fault", "code"), [(killed, ExitCode.INTERRUPTED), (failed, ExitCode.DATA)])
def test_a_main_thread_blocked_in_c_holds_no_process(
    tmp_path: Path, rank: int, fault: Callable[[Distributed], None], code: ExitCode
) -> None:
    def work(distributed: Distributed) -> None:
        def note(error: FinetuneError) -> None:
            (tmp_path / str(distributed.rank)).write_text(error.found)

        with watched_processes(distributed), distributed.before_forced_end(note):
            time.sleep(0.5)
            if distributed.rank == rank:
                fault(distributed)
            block_in_c(next(other for other in range(3) if other not in (rank, distributed.rank)))

    began = time.monotonic()
    codes = exit_codes(work, 3)
    assert time.monotonic() - began < 20
    assert codes[rank] == (-signal.SIGKILL if fault is killed else 0)
    assert [end for other, end in enumerate(codes) if other != rank] == [code, code]
    said = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 2
    if fault is failed:
        assert said == {"it is gone"}
    else:
        assert all("has ended" in line for line in said)


@pytest.mark.slow
def test_a_main_thread_that_runs_ends_in_its_own_way() -> None:
    def work(distributed: Distributed) -> str:
        try:
            with watched_processes(distributed):
                if distributed.rank == 1:
                    killed(distributed)
                distributed.collect(0)
        except FinetuneError as error:
            time.sleep(3)  # longer than the grace: it is on its way
            return error.found
        return "not missed"

    said, nothing = together(work)
    assert "has ended" in said and nothing is None


@pytest.mark.slow
def test_who_has_finished_is_not_lost() -> None:
    def work(distributed: Distributed) -> str:
        with watched_processes(distributed):
            if distributed.rank != 2:
                return "first"
            time.sleep(4)
            return "last"

    assert together(work, 3) == ["first", "first", "last"]


def test_one_process_is_not_watched() -> None:
    with watched_processes(Distributed()):
        pass
