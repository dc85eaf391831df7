"""The processes of one job: their ranks, and the communication between them.

A launcher (torchrun, ``srun``, Kubeflow's Trainer, Ray Train, ``finetune run --gpus N``) has started them and
set the variables that torch.distributed reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Every
process runs the same program and makes the same calls in the same order. Decisions that only one process can
make are made by the main process (rank 0) for all, with :meth:`Distributed.share`. Only the main process
writes files and shows messages.

For a single process all of this sends nothing and costs nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune.errors import FinetuneError, LostProcessError
from finetune.system.failure import RESUME, publish_failure, read_failure
from finetune.system.memory import is_out_of_memory, shortage_error
from finetune.system.rank import RankInfo

T = TypeVar("T")
_POLL_SECONDS = 0.05
_FAILURE_SECONDS = 3.0
"""How long a process waits for the reason of another process that has just failed."""
_SOURCE_LOCATION = re.compile(r"\[[^\]]*\.(cc|cpp|h):\d+\] ?")
"""The line of torch's C++ source at the beginning of its messages."""
_PEER_ERRORS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
"""Fragments of the RuntimeErrors that torch raises when another process is gone or does not answer."""


class Distributed:
    """A group of processes: all processes of a job, or those on one machine.

    Args:
        rank_info: rank of this process within the group, and the size of the group.
        group: process group of torch.distributed (gloo); None for a single process.
        ranks: ranks of the members within the whole job.
        name: name that keeps the group's keys in the store apart from those of other groups.
        machine: the processes of the group on this machine; None if the whole group is on one machine.

    Attributes:
        forced_end: functions to call before this process is ended (:meth:`before_forced_end`).
    """

    def __init__(
        self,
        rank_info: RankInfo | None = None,
        group: Any = None,
        ranks: tuple[int, ...] = (0,),
        name: str = "job",
        machine: Distributed | None = None,
    ) -> None:
        self.rank_info = rank_info or RankInfo()
        self._group, self._ranks, self._name = group, ranks, name
        self.machine = machine or self
        self._shared = self._merged = 0
        self.forced_end: list[Callable[[FinetuneError], None]] = []

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self.rank_info.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.rank_info.size

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0), which decides, writes files and shows messages."""
        return self.rank == 0

    # --- from one process to all -----------------------------------------------------------------

    def share(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the main process, and return its result in every process.

        The other processes wait as long as it takes: no time-out applies.

        Raises:
            FinetuneError, OSError: ``make`` raised it (in every process), or another process has failed.
        """
        if self.size == 1:
            return make()
        self._shared += 1
        key = f"finetune/{self._name}/{self._shared}"
        box: list[Any] = [None, None]
        if self.is_main:
            box = _made_or_failed(make)
            self._store().set(key, "1")
        else:
            self._wait_for(key)
        with self.translated():
            dist.broadcast_object_list(box, src=self._ranks[0], group=self._group)
        found, error = box
        if error is not None:
            raise error
        made: T = found
        return made

    def first(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the main process first, then in all others, and return each process's own result.

        Files that the main process downloads are then there for all.

        Raises:
            FinetuneError: ``make`` raised it in the main process.
        """
        made: list[T] = []
        self.share(lambda: made.append(make()))
        return made[0] if made else make()

    def _wait_for(self, key: str) -> None:
        """Wait until a key is in the store; a collective would give up after its time-out."""
        self._poll_until(lambda: bool(self._store().check([key])))

    def _poll_until(self, is_done: Callable[[], bool]) -> None:
        with self.translated():
            while not is_done():
                if error := self._read_failure():
                    raise error
                time.sleep(_POLL_SECONDS)

    # --- from all processes to one, or to each other ---------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Return the sum over all processes of each value, in every process."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self.translated():
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Return, in every process, whether the value is true in any of them."""
        return value if self.size == 1 else self.sum(float(value))[0] > 0

    def collect(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.translated():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def merge(self, own: Iterator[T]) -> Iterator[T]:
        """Yield the items of all processes in the main process, in turns by rank; nothing in the others.

        Item ``i`` of the result comes from rank ``i % size``. An error of any process is raised in the main
        process, after all others have ended.
        """
        if self.size == 1:
            yield from own
            return
        self._merged += 1
        stop_key = f"finetune/{self._name}/enough/{self._merged}"
        if self.is_main:
            yield from self._receive_turns(own, stop_key)
        else:
            self._send_all(own, stop_key)

    def _send_all(self, own: Iterator[T], stop_key: str) -> None:
        try:
            for item in own:
                self._send(("item", item))
                if self._store().check([stop_key]):
                    break
            self._send(("end", None))
        except (FinetuneError, OSError) as error:
            self._send(("error", error))

    def _receive_turns(self, own: Iterator[T], stop_key: str) -> Iterator[T]:
        open_ranks = set(range(1, self.size))
        try:
            for item in own:
                yield item
                for rank in sorted(open_ranks):
                    yield from self._receive(rank, open_ranks)
            for rank in sorted(open_ranks):  # an incomplete last turn: lower ranks have one more item
                yield from self._receive(rank, open_ranks)
        finally:
            if open_ranks:  # the caller stops early: tell the others to stop, and drain what they still send
                self._store().set(stop_key, "1")
            while open_ranks:
                for rank in sorted(open_ranks):
                    with suppress(FinetuneError, OSError):
                        list(self._receive(rank, open_ranks))

    def _receive(self, rank: int, open_ranks: set[int]) -> Iterator[Any]:
        box: list[Any] = [None]
        try:
            with self.translated():
                dist.recv_object_list(box, src=self._ranks[rank], group=self._group)
        except BaseException:
            open_ranks.clear()
            raise
        kind, content = box[0]
        if kind == "item":
            yield content
            return
        open_ranks.discard(rank)
        if kind == "error":
            raise content

    def _send(self, message: tuple[str, Any]) -> None:
        with self.translated():
            dist.send_object_list([message], dst=self._ranks[0], group=self._group)

    def wait(self) -> None:
        """Wait until every process has made this call; no time-out applies."""
        if self.size == 1:
            return
        self._shared += 1
        key = f"finetune/{self._name}/{self._shared}"
        with self.translated():
            self._store().add(key, 1)
        self._poll_until(lambda: self._store().add(key, 0) >= self.size)

    # --- when a process fails --------------------------------------------------------------------

    def publish(self, error: FinetuneError) -> None:
        """Store why this process fails, so that the others end for the same reason; the first one counts."""
        if self.size > 1:
            with suppress(RuntimeError):  # the process that holds the store has ended
                publish_failure(self._store(), dist.get_rank(), error)

    @contextmanager
    def before_forced_end(self, callback: Callable[[FinetuneError], None]) -> Iterator[None]:
        """Call a function if this process is ended while the block runs, since another one has failed.

        It is called in another thread, with the error, while the main thread stands still
        (:mod:`finetune.system.watch`).
        """
        self.forced_end.append(callback)
        try:
            yield
        finally:
            self.forced_end.remove(callback)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn torch's error for a lost process into the error that this process published, if it did.

        Raises:
            FinetuneError: another process has published it, or the communication itself ran out of memory.
            LostProcessError: another process has ended without a reason, or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_peer_failure(error):
                raise
            if is_out_of_memory(error):  # starting again would need the same memory
                raise shortage_error("communication between processes", error) from None
            message = " ".join(_SOURCE_LOCATION.sub("", str(error)).split())
        else:
            return
        raise self.find_failure(message) from None

    def find_failure(self, message: str) -> FinetuneError:
        """Return why another process has ended: the error it published, or else a LostProcessError.

        Args:
            message: torch's message about a process that does not answer.
        """
        deadline = time.monotonic() + _FAILURE_SECONDS
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                if error := self._read_failure():
                    return error
                time.sleep(_POLL_SECONDS)
        found = f"another process of the job has ended or does not answer ({message[:160]})"
        return LostProcessError(f"process {self.rank} of {self.size}", found, RESUME)

    def read_failure(self) -> FinetuneError | None:
        """Return the error that another process has published; None if there is none."""
        with suppress(RuntimeError):  # the process that holds the store has ended
            return self._read_failure()
        return None

    def _read_failure(self) -> FinetuneError | None:
        return read_failure(self._store(), dist.get_rank()) if self.size > 1 else None

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()


def _made_or_failed(make: Callable[[], Any]) -> list[Any]:
    try:
        return [make(), None]
    except LostProcessError:
        raise  # the other processes may be gone, so it cannot be sent to them
    except (FinetuneError, OSError) as error:
        return [None, error]


SINGLE_PROCESS = Distributed()
"""A job of a single process."""


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error says that another process is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_ERRORS)
