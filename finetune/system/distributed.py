"""The processes of one job: who they are, and what they say to each other.

Whoever started them (torchrun, ``srun``, Kubeflow's Trainer, Ray Train, ``finetune run --gpus N``) has set
what torch.distributed reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Every process runs the
same program, call for call. What one alone can decide, the first one (rank 0) decides for all with
:meth:`Distributed.share`; it alone writes and speaks.

A process that is alone is a world of its own: nothing is sent, and nothing costs anything.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune.errors import EnvironmentFaultError, ExitCode, FinetuneError, LostProcessError, UsageError
from finetune.system.rank import RankInfo, find_rank

T = TypeVar("T")
_FAILURE = "finetune/failure"
_LOOK_SECONDS = 0.05
_WORDS_SECONDS = 3.0
"""That a process waits for the words of another one that has just failed."""
_PLACE = re.compile(r"\[[^\]]*\.(cc|cpp|h):\d+\] ?")
"""In torch's own sources, at the beginning of its words."""
_OF_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
"""In the words of torch's plain RuntimeErrors, when another process is gone or does not answer."""


class Distributed:
    """The processes of a job, or those of them that share a machine.

    Args:
        place: of this process among them.
        group: of torch.distributed, over sockets; None for a single process.
        ranks: of its members in the whole job.
        name: tells its messages from those of other worlds.
        machine: those that share this machine; None where these are they.
    """

    def __init__(
        self,
        place: RankInfo | None = None,
        group: Any = None,
        ranks: tuple[int, ...] = (0,),
        name: str = "job",
        machine: Distributed | None = None,
    ) -> None:
        self.place = place or RankInfo()
        self._group, self._ranks, self._name = group, ranks, name
        self.machine = machine or self
        self._shared = self._merged = 0

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return self.place.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that decides, writes and speaks."""
        return self.rank == 0

    # --- what one says to all --------------------------------------------------------------------

    def share(self, make: Callable[[], T]) -> T:
        """Return what the main process makes, in every process; the others wait for it, however long.

        Raises:
            FinetuneError: it cannot be made, in every process; or another process has failed.
            OSError: it cannot be made, in every process.
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
        """Return what each process makes for itself, the main one first: what it fetches is there for all.

        Raises:
            FinetuneError: the main process cannot make it.
        """
        made: list[T] = []
        self.share(lambda: made.append(make()))
        return made[0] if made else make()

    def _wait_for(self, key: str) -> None:
        """Look for a key again and again: a collective would give up after its time-out."""
        self._look_until(lambda: bool(self._store().check([key])))

    def _look_until(self, is_there: Callable[[], bool]) -> None:
        with self.translated():
            while not is_there():
                if error := self._read_failure():
                    raise error
                time.sleep(_LOOK_SECONDS)

    # --- what all say to one, or to each other ---------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Return the sum over all processes of each value, in every process."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self.translated():
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def any(self, one: bool) -> bool:
        """Return whether it is so in any process."""
        return one if self.size == 1 else self.sum(float(one))[0] > 0

    def collect(self, value: T) -> list[T]:
        """Return every process's value, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.translated():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def merge(self, own: Iterator[T]) -> Iterator[T]:
        """Yield what all processes make, in turns by rank, in the main process; nothing in the others.

        Item ``i`` of the whole is made by process ``i`` modulo the size. An error of any of them is raised in
        the main process, after all others have ended.
        """
        if self.size == 1:
            yield from own
            return
        self._merged += 1
        enough = f"finetune/{self._name}/enough/{self._merged}"
        if self.is_main:
            yield from self._receive_turns(own, enough)
        else:
            self._send_all(own, enough)

    def _send_all(self, own: Iterator[T], enough: str) -> None:
        try:
            for item in own:
                self._send(("item", item))
                if self._store().check([enough]):
                    break
            self._send(("end", None))
        except (FinetuneError, OSError) as error:
            self._send(("error", error))

    def _receive_turns(self, own: Iterator[T], enough: str) -> Iterator[T]:
        left = set(range(1, self.size))
        try:
            for item in own:
                yield item
                for rank in sorted(left):
                    yield from self._receive(rank, left)
            for rank in sorted(left):  # one more than here, where the last turn was not whole
                yield from self._receive(rank, left)
        finally:
            if left:  # whoever stops listening tells the others, and lets them come to their end
                self._store().set(enough, "1")
            while left:
                for rank in sorted(left):
                    with suppress(FinetuneError, OSError):
                        list(self._receive(rank, left))

    def _receive(self, rank: int, left: set[int]) -> Iterator[Any]:
        box: list[Any] = [None]
        try:
            with self.translated():
                dist.recv_object_list(box, src=self._ranks[rank], group=self._group)
        except BaseException:
            left.clear()
            raise
        kind, content = box[0]
        if kind == "item":
            yield content
            return
        left.discard(rank)
        if kind == "error":
            raise content

    def _send(self, message: tuple[str, Any]) -> None:
        with self.translated():
            dist.send_object_list([message], dst=self._ranks[0], group=self._group)

    def wait(self) -> None:
        """Wait until every process is here, however long that takes."""
        if self.size == 1:
            return
        self._shared += 1
        key = f"finetune/{self._name}/{self._shared}"
        with self.translated():
            self._store().add(key, 1)
        self._look_until(lambda: self._store().add(key, 0) >= self.size)

    # --- when one of them fails ------------------------------------------------------------------

    def publish(self, error: FinetuneError) -> None:
        """Tell the others why this process ends, so that all do for the same reason; the first one counts."""
        if self.size == 1:
            return
        words = {
            "rank": dist.get_rank(),
            "asked": error.asked,
            "found": error.found,
            "fix": error.fix,
            "code": int(error.exit_code),
            "lost": isinstance(error, LostProcessError),
        }
        with suppress(RuntimeError):  # a store that is gone has no readers
            self._store().compare_set(_FAILURE, "", json.dumps(words))

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn torch's words for a process that is gone into what that process said, or into a refusal."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_peers(error):
                raise
            said = " ".join(_PLACE.sub("", str(error)).split())
        else:
            return
        raise self.find_failure(said) from None

    def find_failure(self, said: str) -> FinetuneError:
        """Return why another process has ended: in its words, or where it has left none, as a loss.

        Args:
            said: by torch, of a process that does not answer.
        """
        deadline = time.monotonic() + _WORDS_SECONDS
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                if error := self._read_failure():
                    return error
                time.sleep(_LOOK_SECONDS)
        found = f"another process of it has ended, or does not answer ({said[:160]})"
        return LostProcessError(f"process {self.rank} of {self.size}", found, _AGAIN)

    def read_failure(self) -> FinetuneError | None:
        """Return why another process has ended, where it has said so."""
        with suppress(RuntimeError):  # a store that is gone says nothing
            return self._read_failure()
        return None

    def _read_failure(self) -> FinetuneError | None:
        if self.size == 1:
            return None
        store = self._store()
        if not store.check([_FAILURE]):
            return None
        words = json.loads(store.get(_FAILURE))
        if words["rank"] == dist.get_rank():
            return None
        kind = LostProcessError if words["lost"] else FinetuneError
        error = kind(f"process {words['rank']}, {words['asked']}", words["found"], words["fix"])
        error.exit_code = ExitCode(words["code"])
        return error

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()


def _made_or_failed(make: Callable[[], Any]) -> list[Any]:
    try:
        return [make(), None]
    except LostProcessError:
        raise  # there may be nobody left to tell
    except (FinetuneError, OSError) as error:
        return [None, error]


_AGAIN = "Give the same command again, with the same --output, to go on."
SINGLE_PROCESS = Distributed()
"""The world of a process that is alone."""


def is_of_peers(error: BaseException) -> bool:
    """Return whether an error says that another process is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_PEERS)


def join_distributed(device: str, timeout: float) -> Distributed:
    """Join the processes that a launcher has started; a world of one where there is no launcher.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout: seconds that a process may let the others wait.

    Raises:
        UsageError: the launcher contradicts itself, or a single device is named for several processes.
        EnvironmentFaultError: there are fewer GPUs than processes.
        LostProcessError: the others cannot be reached, or have not come in time.
    """
    place = find_rank()
    if place is None or place.size == 1:
        return SINGLE_PROCESS
    if ":" in device:
        fix = "Take --device cuda: each process takes a GPU of its own."
        raise UsageError(f"--device {device}", f"there are {place.size} processes", fix)
    limit, on_gpu = timedelta(seconds=timeout), device != "cpu" and torch.cuda.is_available()
    if not dist.is_initialized():
        _connect(place, on_gpu, limit)
    group: Any = dist.new_group(backend="gloo", timeout=limit)
    everybody = tuple(range(place.size))
    found: list[Any] = [None] * place.size
    gpu = str(torch.cuda.get_device_properties(choose_device(place)).uuid) if on_gpu else ""
    dist.all_gather_object(found, (socket.gethostname(), gpu), group=group)
    if on_gpu and len(set(found)) < place.size:  # NCCL would say so later, in words of its own
        shown = f"{place.size} processes have {len(set(found))} GPUs between them"
        raise EnvironmentFaultError("a GPU for each process", shown, "Start fewer, or take --device cpu.")
    hosts = [host for host, _ in found]
    machines = {host: tuple(rank for rank in everybody if hosts[rank] == host) for host in hosts}
    if len(machines) == 1:
        return Distributed(place, group, everybody)
    # Every process makes every group, in the same order: torch wants it so.
    groups = {host: dist.new_group(list(ranks), limit, "gloo") for host, ranks in machines.items()}
    host = hosts[place.rank]
    ranks = machines[host]
    here = RankInfo(ranks.index(place.rank), len(ranks), place.local_rank, len(ranks))
    return Distributed(
        place, group, everybody, machine=Distributed(here, groups[host], ranks, f"machine-{host}")
    )


def _connect(place: RankInfo, on_gpu: bool, timeout: timedelta) -> None:
    if on_gpu:
        torch.cuda.set_device(choose_device(place))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = " ".join(str(error).split())[:200]
        fix = "Look whether the machines reach each other by that address; then start the job again."
        raise LostProcessError(f"joining {place.size} processes at {where}", said, fix) from None


def choose_device(place: RankInfo) -> int:
    """Return the index of the GPU of a process: its own, or the only one that its launcher lets it see.

    Raises:
        EnvironmentFaultError: there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    if count != 1 and place.local_rank >= count:
        found = f"this machine shows {count} CUDA devices, and {place.local_size} processes share it"
        raise EnvironmentFaultError("a GPU for each process", found, "Start fewer processes: --gpus N.")
    return 0 if count == 1 else place.local_rank


def leave_distributed(distributed: Distributed) -> None:
    """Close the connections of a process that is done, as far as they are still there."""
    if distributed.size > 1 and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
