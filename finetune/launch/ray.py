"""The driver of a run on a Ray cluster: connects, lets Ray Train place workers, shows their output."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from finetune import __version__
from finetune.errors import EnvironmentFaultError, ExitCode, InterruptedRunError, UsageError
from finetune.launch.mailbox import LaunchSpec, Mailbox, Message, MessageKind
from finetune.launch.processes import end_by
from finetune.system.heartbeat import Heartbeat, find_parent
from finetune.system.signals import ECHO, signals_to_stop
from finetune.system.temporary import temporary_folder

_TICK = 0.2
_CONNECT_SECONDS = 10.0
_CHECK_CLUSTER = "Check that it runs (`ray status`), or set RAY_ADDRESS=local to start one on this machine."
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(7 * 24 * 3600),  # wait a week for room on a full cluster
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; it warns if this is not set
}
_PREFIX = "FINETUNE_"
_NOT_FORWARDED = ("FINETUNE_PULSE", "FINETUNE_REPORT")


def launch_on_ray(arguments: Sequence[str], processes: int, on_gpu: bool, say: Callable[[str], None]) -> int:
    """Run the command in several processes of a Ray cluster; return the exit code of the job.

    The cluster is the one of RAY_ADDRESS, or the one that runs on this machine; otherwise a cluster on this
    machine is started for the run.

    Args:
        arguments: command-line arguments after ``finetune``.
        processes: number of processes, at least 1; each takes one CPU of the cluster, as Ray counts them.
        on_gpu: whether each process takes a GPU as well.
        say: shows one line to the user.

    Raises:
        UsageError: RAY_ADDRESS is the address of a service, not of the cluster itself.
        EnvironmentFaultError: Ray is not installed, or the cluster cannot be reached, or is too small.
        InterruptedRunError: the command was stopped before a process had started.
    """
    address = _check_address()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    ray = _import_ray()
    with temporary_folder("finetune-ray-") as home, _record_signals() as (stops, install):
        _connect(ray, processes, address)
        install()  # ray.init has replaced the handler of SIGTERM
        try:
            _check_size(ray, processes, on_gpu)
            nodes = sum(node["Alive"] for node in ray.nodes())
            say(f"Ray cluster, nodes: {nodes}; {processes} processes start as soon as it has room")
            code = _Job(ray, home, stops).run(_build_spec(arguments), processes, on_gpu)
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
        raise EnvironmentFaultError("--engine ray", found, "Run `pip install 'ray[train]'`.") from None
    return ray


def _check_address() -> str:
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        fix = "Give the address of the cluster, HOST:PORT, and start the command on one of its machines."
        raise UsageError(f"RAY_ADDRESS={address}", "this is the address of a service of the cluster", fix)
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:  # Ray itself would retry for minutes without a message
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise EnvironmentFaultError(f"RAY_ADDRESS={address}", f"{error}", _CHECK_CLUSTER) from None
    return address


def _connect(ray: Any, processes: int, address: str) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    before = dict(os.environ)
    try:
        try:
            _prepare_own_cluster()
            ray.init(num_cpus=processes, **quiet)
        except ValueError:  # a cluster runs already, and num_cpus is not allowed
            _remove_variables_added_since(before)
            ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        message = " ".join(str(error).split())[:300]
        asked = f"the Ray cluster {address or 'of this machine'}"
        raise EnvironmentFaultError(asked, message, _CHECK_CLUSTER) from None


def _prepare_own_cluster() -> None:
    """Use the loopback interface: a container may have no network, or a host name that does not resolve."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")


def _remove_variables_added_since(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]


def _check_size(ray: Any, processes: int, on_gpu: bool) -> None:
    """Refuse a job that is larger than the whole cluster, which would wait for ever."""
    asked = f"--{'gpus' if on_gpu else 'processes'} {processes} --engine ray"
    resources = ray.cluster_resources()
    for kind in ("CPU", "GPU") if on_gpu else ("CPU",):
        if resources.get(kind, 0) < processes:
            found = f"the Ray cluster has {resources.get(kind, 0):g} {kind}s, and each process takes one"
            raise EnvironmentFaultError(asked, found, "Ask for fewer, or add machines (`ray start`).")


def _build_spec(arguments: Sequence[str]) -> LaunchSpec:
    environment = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(_PREFIX) and name not in _NOT_FORWARDED) or name == "OMP_NUM_THREADS"
    }
    return LaunchSpec(list(arguments), str(Path.cwd()), environment, __version__)


@contextmanager
def _record_signals() -> Iterator[tuple[list[float], Callable[[], None]]]:
    """Record when a stop is asked for; yield the times, and a function that reinstalls the handlers."""
    times: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's shape
        if not times or time.monotonic() - times[-1] > ECHO:
            times.append(time.monotonic())

    def install() -> None:
        for number in signals:
            signal.signal(number, handle)

    signals = signals_to_stop()
    before = {number: signal.getsignal(number) for number in signals}
    install()
    try:
        yield times, install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """One run on the cluster.

    Args:
        ray: the module ``ray``.
        home: temporary folder for the files that Ray Train writes.
        stops: times at which the command was asked to stop; grows while the job runs.
    """

    def __init__(self, ray: Any, home: Path, stops: list[float]) -> None:
        self._ray, self._home, self._stops = ray, home, stops
        self._started: set[int] = set()
        self._codes: dict[int, int] = {}
        self._ray_error: Exception | None = None
        self._unfinished_line = b""
        parent = find_parent()
        self._heartbeat = Heartbeat(parent[0] if parent is not None else None)
        self._pipe = parent[0] if parent is not None else None

    def run(self, spec: LaunchSpec, processes: int, on_gpu: bool) -> int:
        """Run the job; return its exit code, negative for the signal that ended the main process."""
        here = self._ray.get_runtime_context().get_node_id()
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        mailbox = self._ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=strategy).remote()
        training = threading.Thread(target=self._train, args=(mailbox, spec, processes, on_gpu), daemon=True)
        training.start()
        while training.is_alive():
            training.join(_TICK)
            self._collect(mailbox)
            if self._stops and not self._started:
                found = "it was stopped before its processes had started"
                raise InterruptedRunError("the run", found, "Give the same command again.")
        self._collect(mailbox)
        return self._conclude(processes)

    def _train(self, mailbox: Any, spec: LaunchSpec, processes: int, on_gpu: bool) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from finetune.launch.ray_worker import RendezvousConfig, work

        failures = FailureConfig(max_failures=0, controller_failure_limit=0)
        trainer = DataParallelTrainer(
            work,
            train_loop_config={"spec": spec, "mailbox": mailbox},
            backend_config=RendezvousConfig(),
            scaling_config=ScalingConfig(num_workers=processes, use_gpu=on_gpu),
            run_config=RunConfig(name="run", storage_path=str(self._home), failure_config=failures),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray raises errors of many types
            self._ray_error = error

    # --- messages --------------------------------------------------------------------------------

    def _collect(self, mailbox: Any) -> None:
        failed = any(self._codes.values())  # then the others are stopped as well, as by torch's launcher
        for message in self._ray.get(mailbox.collect.remote(len(self._stops) + failed)):
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message.kind:
            case MessageKind.STARTED:
                self._started.add(message.rank)
            case MessageKind.STDOUT:
                _write(sys.stdout.buffer, message.content)
            case MessageKind.STDERR:
                _write(sys.stderr.buffer, message.content)
            case MessageKind.EXIT:
                self._codes[message.rank] = int(message.content)
            case MessageKind.HEARTBEAT if message.rank == 0 and self._pipe is not None:
                *lines, self._unfinished_line = (self._unfinished_line + message.content).split(b"\n")
                for line in lines:  # one write per line, so that a full pipe drops whole lines
                    with suppress(OSError):
                        os.write(self._pipe, line + b"\n")

    # --- the end ---------------------------------------------------------------------------------

    def _conclude(self, processes: int) -> int:
        """Return the main process's exit code; without one, -SIGKILL: it was killed."""
        code = self._codes.get(0)
        if code is None and not self._started:
            message = " ".join(str(self._ray_error).split())[-300:]
            fix = "Look at the logs of Ray; finetune must be installed on every machine of the cluster."
            raise EnvironmentFaultError(f"starting {processes} processes on the cluster", message, fix)
        first = next((code for code in self._codes.values() if code), 0)
        if code == ExitCode.INTERRUPTED and first > 0 and not self._stops:
            code = first  # the main process was stopped because this process had failed
        if (code is None or code == ExitCode.INTERRUPTED) and not self._stops:
            self._heartbeat.send({"lost": True})  # without a request to stop: a process or machine is lost
        if code is None:
            return -signal.SIGKILL
        return code


def _write(stream: IO[bytes], content: bytes) -> None:
    with suppress(OSError, ValueError):  # a closed pipe must not end the run
        stream.write(content)
        stream.flush()
