"""The driver of a run on a Ray cluster: connects, lets Ray Train place the workers, shows what they say."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from finetune import __version__
from finetune.errors import EnvironmentFaultError, ExitCode, InterruptedRunError, UsageError
from finetune.launch.mailbox import Kind, LaunchSpec, Mailbox, Message
from finetune.launch.processes import end_by
from finetune.system.heartbeat import Heartbeat, find_parent
from finetune.system.signals import ECHO, signals_to_stop

_TICK = 0.2
_CONNECT_SECONDS = 10.0
_LOOK = "Look whether it runs (`ray status`), or set RAY_ADDRESS=local for one of this machine alone."
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(7 * 24 * 3600),  # a full cluster is a queue
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # how Ray means to behave; it warns while this is not said
}
_OWN = "FINETUNE_"
_NOT_HANDED_DOWN = ("FINETUNE_PULSE", "FINETUNE_REPORT")


def launch_on_ray(arguments: Sequence[str], processes: int, on_gpu: bool, say: Callable[[str], None]) -> int:
    """Run this program's command in several processes of a Ray cluster; return the exit code of all.

    The cluster is the one of RAY_ADDRESS, or the one that runs on this machine; else one of this machine
    is started for the run.

    Args:
        arguments: of the command, as they stand after ``finetune``.
        processes: at least one; each takes a processor of the cluster, as Ray counts them.
        on_gpu: each takes a GPU as well.
        say: shows one line to the user.

    Raises:
        UsageError: RAY_ADDRESS names what is no cluster's own address.
        EnvironmentFaultError: Ray is not installed, or the cluster is not there, or too small.
        InterruptedRunError: the command was stopped before a process had started.
    """
    address = _check_address()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no word of anybody's use of this leaves the house
    ray = _import_ray()
    with tempfile.TemporaryDirectory(prefix="finetune-ray-") as home, _noted_signals() as (stops, note):
        _connect(ray, processes, address)
        note()  # Ray has taken SIGTERM for itself
        try:
            _check_size(ray, processes, on_gpu)
            nodes = sum(node["Alive"] for node in ray.nodes())
            say(f"a Ray cluster, nodes: {nodes}; starting {processes} processes as soon as it has room")
            code = _Job(ray, Path(home), stops).run(_order(arguments), processes, on_gpu)
        finally:
            ray.shutdown()
    if code < 0:
        end_by(-code)
    return code


def _import_ray() -> Any:
    try:
        import ray
        import ray.train
    except ImportError as error:
        found = f"Ray is not installed here ({error})"
        raise EnvironmentFaultError("--engine ray", found, "pip install 'finetune[ray]'") from None
    return ray


def _check_address() -> str:
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        fix = "Name the cluster's own address, HOST:PORT, and start the command on one of its machines."
        raise UsageError(f"RAY_ADDRESS={address}", "that is the address of one of its services", fix)
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:  # Ray itself would try for minutes, in silence
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise EnvironmentFaultError(f"RAY_ADDRESS={address}", f"{error}", _LOOK) from None
    return address


def _connect(ray: Any, processes: int, address: str) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    before = dict(os.environ)
    try:
        try:
            _prepare_own_cluster()
            ray.init(num_cpus=processes, **quiet)
        except ValueError:  # there is a cluster already, and its size is not ours to say
            _restore(before)
            ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise EnvironmentFaultError(f"the Ray cluster {address or 'of this machine'}", said, _LOOK) from None


def _prepare_own_cluster() -> None:
    """One machine needs no network; a container may have none, and a name that leads nowhere."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")


def _restore(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]


def _check_size(ray: Any, processes: int, on_gpu: bool) -> None:
    """Refuse what no waiting can bring."""
    asked = f"--{'gpus' if on_gpu else 'processes'} {processes} --engine ray"
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU") if on_gpu else ("CPU",):
        if there.get(kind, 0) < processes:
            found = f"the Ray cluster has {there.get(kind, 0):g} {kind}s, and each process takes one"
            raise EnvironmentFaultError(asked, found, "Ask for fewer, or add machines (`ray start`).")


def _order(arguments: Sequence[str]) -> LaunchSpec:
    told = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(_OWN) and name not in _NOT_HANDED_DOWN) or name == "OMP_NUM_THREADS"
    }
    return LaunchSpec(list(arguments), str(Path.cwd()), told, __version__)


@contextmanager
def _noted_signals() -> Iterator[tuple[list[float], Callable[[], None]]]:
    """Note when the process is asked to stop, and give what takes the signals again from a library."""
    times: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's shape
        if not times or time.monotonic() - times[-1] > ECHO:
            times.append(time.monotonic())

    def note() -> None:
        for number in signals:
            signal.signal(number, handle)

    signals = signals_to_stop()
    before = {number: signal.getsignal(number) for number in signals}
    note()
    try:
        yield times, note
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """One run on the cluster.

    Args:
        ray: the library.
        home: a folder for what Ray Train writes, which nobody reads.
        stops: when the command was asked to stop.
    """

    def __init__(self, ray: Any, home: Path, stops: list[float]) -> None:
        self._ray, self._home, self._stops = ray, home, stops
        self._started: set[int] = set()
        self._codes: dict[int, int] = {}
        self._fault: Exception | None = None
        self._rest = b""
        parent = find_parent()
        self._pulse = Heartbeat(parent[0] if parent is not None else None)
        self._pipe = parent[0] if parent is not None else None

    def run(self, order: LaunchSpec, processes: int, on_gpu: bool) -> int:
        """Return the exit code; negative for the signal that ended the main process."""
        here = self._ray.get_runtime_context().get_node_id()
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        mailbox = self._ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=strategy).remote()
        training = threading.Thread(target=self._train, args=(mailbox, order, processes, on_gpu), daemon=True)
        training.start()
        while training.is_alive():
            training.join(_TICK)
            self._deliver(mailbox)
            if self._stops and not self._started:
                found = "it was stopped before its processes had started"
                raise InterruptedRunError("the run", found, "Give the same command again.")
        self._deliver(mailbox)
        return self._conclude(processes)

    def _train(self, mailbox: Any, order: LaunchSpec, processes: int, on_gpu: bool) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from finetune.launch.ray_worker import ContractConfig, work

        failures = FailureConfig(max_failures=0, controller_failure_limit=0)
        trainer = DataParallelTrainer(
            work,
            train_loop_config={"order": order, "desk": mailbox},
            backend_config=ContractConfig(),
            scaling_config=ScalingConfig(num_workers=processes, use_gpu=on_gpu),
            run_config=RunConfig(name="run", storage_path=str(self._home), failure_config=failures),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray's own family is wide
            self._fault = error

    # --- letters ---------------------------------------------------------------------------------

    def _deliver(self, mailbox: Any) -> None:
        failed = any(self._codes.values())  # the others are to end as well, as with torch's launcher
        letters = self._ray.get(mailbox.collect.remote(len(self._stops) + failed))
        for letter in letters:
            self._take(letter)

    def _take(self, letter: Message) -> None:
        match letter.kind:
            case Kind.STARTED:
                self._started.add(letter.rank)
            case Kind.STDOUT:
                _write(sys.stdout.buffer, letter.content)
            case Kind.STDERR:
                _write(sys.stderr.buffer, letter.content)
            case Kind.EXIT:
                self._codes[letter.rank] = int(letter.content)
            case Kind.PULSE if letter.rank == 0 and self._pipe is not None:
                *lines, self._rest = (self._rest + letter.content).split(b"\n")
                for line in lines:  # one by one, so that a full pipe swallows a whole one
                    with suppress(OSError):
                        os.write(self._pipe, line + b"\n")

    # --- the end ---------------------------------------------------------------------------------

    def _conclude(self, processes: int) -> int:
        """Return the main process's exit code; without one, that of a process that was killed."""
        code = self._codes.get(0)
        if code is None and not self._started:
            said = " ".join(str(self._fault).split())[-300:]
            fix = "Look at the logs of Ray; finetune has to be installed on every machine of the cluster."
            raise EnvironmentFaultError(f"starting {processes} processes on the cluster", said, fix)
        first = next((one for one in self._codes.values() if one), 0)
        if code == ExitCode.INTERRUPTED and first > 0 and not self._stops:
            code = first  # the main process was only asked to leave
        if (code is None or code == ExitCode.INTERRUPTED) and not self._stops:
            self._pulse.tell({"lost": True})  # nobody has asked for it: a process, or a machine, is gone
        if code is None:
            return -signal.SIGKILL
        return code


def _write(stream: IO[bytes], content: bytes) -> None:
    with suppress(OSError, ValueError):  # nobody reads: no reason to end a run
        stream.write(content)
        stream.flush()
