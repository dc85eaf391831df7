"""The supervisor: a small parent process that detects hangs and restarts a run after a crash.

::

    finetune run ...           the supervisor: no torch, a few megabytes
      '- finetune run ...      the child, which does the work, in its own session
         '- decoding processes

The supervisor reads heartbeats (:mod:`finetune.system.heartbeat`), forwards signals, kills a child whose
heartbeat stops, and starts it again if another attempt may succeed. The child resumes from its last
checkpoint, so a restart costs minutes at most and does not change the result.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.errors import ExitCode, FinetuneError
from finetune.runs.folder import Outcome, RunFolder
from finetune.runs.reader import RunReader
from finetune.system.heartbeat import VARIABLE
from finetune.system.signals import ECHO, signals_to_stop
from finetune.system.temporary import temporary_file

_GRACE_AT_ONCE = 5.0
"""Seconds that a child has to end after the second signal, or after it has saved."""
_TICK = 0.2


@dataclass
class Attempt:
    """What the supervisor knows of one child.

    Attributes:
        folder: run folder, as soon as the child has chosen it.
        number: number of the attempt, as soon as the child has claimed the folder; 0 before.
        saving: whether the child is writing a checkpoint, for which the deadline is extended.
        step: training step that was reached.
        code: exit code; negative for the signal that ended the child.
        stalled: whether the child was killed because it sent no heartbeat for too long.
        lost: whether the job has lost one of its processes.
        output: what the child wrote to stdout.
    """

    folder: RunFolder | None = None
    number: int = 0
    saving: bool = False
    step: int = 0
    code: int = 0
    stalled: bool = False
    lost: bool = False
    output: bytes = b""


@dataclass
class Supervisor:
    """Runs a command in a child process, and starts it again until its end is final.

    Args:
        arguments: command-line arguments after ``finetune``.
        stall_timeout: seconds without a heartbeat after which the child is killed.
        say: shows one line to the user.
        command: command that starts ``finetune``; by default :func:`own_command`.
        waits: seconds before each restart; the run has failed when all are used up without progress.
        grace: seconds that a child has to save and end after the first signal.
    """

    arguments: Sequence[str]
    stall_timeout: float
    say: Callable[[str], None]
    command: Sequence[str] = ()
    waits: Sequence[float] = (1.0, 5.0, 15.0)
    grace: float = 25.0
    _signals: list[int] = field(default_factory=list)
    _child: subprocess.Popen[bytes] | None = None
    _deadline: float = 0.0
    _last_signal: float = 0.0

    def run(self) -> tuple[int, bytes]:
        """Run the command; return its exit code, and what the last child wrote to stdout."""
        starts, best_step, internal = 0, 0, 0
        with self._handled_signals():
            while True:
                attempt = self._attempt()
                internal += attempt.code == ExitCode.INTERNAL
                if attempt.step > best_step:
                    starts, best_step, internal = 0, attempt.step, int(attempt.code == ExitCode.INTERNAL)
                if self._is_final(attempt, internal) or starts == len(self.waits):
                    break
                self.say(f"warning: {self._describe(attempt)}; starting again in {self.waits[starts]:g} s")
                self._continue_in(attempt)
                self._sleep(self.waits[starts])
                if self._signals:
                    break
                starts += 1
            return self._conclude(attempt), attempt.output

    def _is_final(self, attempt: Attempt, internal: int) -> bool:
        """Return whether to stop restarting: a child's own exit is final, an internal error is retried."""
        if self._signals or attempt.folder is None:
            return True
        if attempt.stalled or attempt.lost or attempt.code < 0:
            return False
        return attempt.code != ExitCode.INTERNAL or internal > 1

    def _continue_in(self, attempt: Attempt) -> None:
        """Add ``--output`` with the folder that the child chose, so that the next child resumes there."""
        options = [argument.partition("=")[0] for argument in self.arguments]
        short = any(option.startswith("-o") for option in options)
        if "--output" not in options and not short and attempt.folder is not None:
            self.arguments = [*self.arguments, "--output", str(attempt.folder.path)]

    # --- one child -------------------------------------------------------------------------------

    def _attempt(self) -> Attempt:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        command = [*(self.command or own_command()), *self.arguments]
        environment = os.environ | {VARIABLE: f"{writing}:{os.getpid()}"}
        attempt = Attempt()
        try:
            with temporary_file() as stdout:
                with subprocess.Popen(  # noqa: S603 - our own program, and the user's own arguments
                    command, env=environment, pass_fds=[writing], start_new_session=True, stdout=stdout
                ) as child:
                    os.close(writing)
                    self._child = child
                    self._watch(child, reading, attempt)
                    self._child = None
                _kill_group(child.pid)
                stdout.seek(0)
                attempt.output = stdout.read()
        finally:
            os.close(reading)
        return attempt

    def _watch(self, child: subprocess.Popen[bytes], pipe: int, attempt: Attempt) -> None:
        """Wait until the child ends; kill it if it stalls or does not end in time after a signal."""
        heartbeats = _HeartbeatReader(pipe)
        if self._signals:  # one arrived while the child was being started
            self._forward()
        while child.poll() is None:
            for facts in heartbeats.wait(_TICK):
                _update(attempt, facts)
            if attempt.folder is not None and heartbeats.silence() > self.stall_timeout:
                attempt.stalled = True
                _kill_group(child.pid)
            if self._overdue(attempt):
                _kill_group(child.pid)
        for facts in heartbeats.wait(0):
            _update(attempt, facts)
        attempt.code = child.returncode

    # --- signals ---------------------------------------------------------------------------------

    @contextmanager
    def _handled_signals(self) -> Iterator[None]:
        handlers: dict[signal.Signals, Any] = dict.fromkeys(signals_to_stop(), self._handle)
        if signal.getsignal(signal.SIGTSTP) is not signal.SIG_IGN:
            handlers[signal.SIGTSTP] = self._suspend
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal module's shape
        now = time.monotonic()
        if self._signals and now - self._last_signal < ECHO:
            return
        self._signals.append(number)
        self._last_signal = now
        first = len(self._signals) == 1
        self._deadline = now + self.grace if first else min(self._deadline, now + _GRACE_AT_ONCE)
        self._forward()

    def _forward(self) -> None:
        """Ask the child to stop, by SIGTERM: Python would print a traceback for an early SIGINT."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)

    def _suspend(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Suspend child and supervisor on Ctrl-Z, and resume both on `fg`."""
        if self._child is not None:
            self._child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._child is not None:
            self._child.send_signal(signal.SIGCONT)

    def _overdue(self, attempt: Attempt) -> bool:
        now = time.monotonic()
        if attempt.saving and len(self._signals) == 1:
            self._deadline = max(self._deadline, now + _GRACE_AT_ONCE)  # counts from the end of saving
        return bool(self._signals) and now > self._deadline

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signals:
            time.sleep(_TICK)

    # --- the end ---------------------------------------------------------------------------------

    def _describe(self, attempt: Attempt) -> str:
        if attempt.stalled:
            return f"the run sent no heartbeat for {self.stall_timeout:g} s and was killed"
        if attempt.lost:
            return "the run lost one of its processes"
        if attempt.code < 0:
            return f"the run was ended by {_signal_name(-attempt.code)}"
        return "the run ended with an unexpected error"

    def _conclude(self, attempt: Attempt) -> int:
        """Return the exit code; write the outcome if the child was killed before it could do so."""
        if not attempt.stalled and attempt.code >= 0:
            return attempt.code
        outcome = self._outcome(attempt)
        _write_outcome(outcome, attempt)
        self.say(f"error: {outcome.message}")
        self.say(outcome.hint)
        attempt.output = json.dumps(outcome.to_dict()).encode() + b"\n" if "--json" in self.arguments else b""
        return outcome.exit_code

    def _outcome(self, attempt: Attempt) -> Outcome:
        message, progress = self._describe(attempt), {"step": attempt.step, "attempt": max(attempt.number, 1)}
        resume = "Give the same command again to resume from the last checkpoint."
        if self._signals:
            message = "the run was asked to stop and ended before it had saved"
            return Outcome(
                "interrupted", message, resume, int(ExitCode.INTERRUPTED), "interrupted", True, **progress
            )
        if attempt.stalled:
            hint = f"Look for a disk or network that does not answer, or raise --stall-timeout. {resume}"
            return Outcome("failed", message, hint, int(ExitCode.ENVIRONMENT), "stalled", False, **progress)
        if attempt.code == -signal.SIGKILL:
            hint = f"The usual reason is a lack of memory: lower --workers or --batch-size. {resume}"
            return Outcome("failed", message, hint, 128 + signal.SIGKILL, "killed", True, **progress)
        return Outcome("failed", message, resume, int(ExitCode.INTERNAL), "crashed", True, **progress)


def own_command() -> list[str]:
    """Return the command that starts this installation of finetune.

    Without ``-P`` Python would import from the working folder first, where a user may have a folder called
    ``pretrained``; with it, Python would not find a checkout that is run from its own folder.
    """
    root = Path(__file__).parents[1]
    from_checkout = not sys.flags.safe_path and Path(sys.path[0] or ".").absolute() == root
    return [sys.executable, *([] if from_checkout else ["-P"]), "-m", "finetune"]


class _HeartbeatReader:
    """The receiving side of the heartbeat.

    Args:
        pipe: file descriptor of the pipe's reading end.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe, self._unfinished_line = pipe, b""
        self._last_heartbeat = self._last_wait = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """Return the facts that have arrived, after waiting at most ``seconds`` for them."""
        ready = self._selector.select(seconds)
        now = time.monotonic()
        if now - self._last_wait > seconds + 1:  # the supervisor itself was suspended or got no CPU time
            self._last_heartbeat = now
        self._last_wait = now
        content = b""
        if ready:
            with suppress(BlockingIOError):
                content = os.read(self._pipe, 1 << 16)
        if not content:
            time.sleep(0 if not ready else seconds)  # a closed pipe is ready all the time
            return []
        self._last_heartbeat = time.monotonic()
        *lines, self._unfinished_line = (self._unfinished_line + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def silence(self) -> float:
        """Return the seconds since the last heartbeat."""
        return time.monotonic() - self._last_heartbeat


def _update(attempt: Attempt, facts: dict[str, Any]) -> None:
    if "folder" in facts:
        attempt.folder = RunFolder(Path(facts["folder"]))
    attempt.number = facts.get("attempt", attempt.number)
    attempt.saving = facts.get("saving", attempt.saving)
    attempt.lost = facts.get("lost", attempt.lost)
    attempt.step = facts.get("step", attempt.step)


def _write_outcome(outcome: Outcome, attempt: Attempt) -> None:
    """Write the outcome of a killed child; one that the child or another process has written stays."""
    if attempt.folder is None:
        return
    written = RunReader(attempt.folder, tolerant=True).outcome
    if (written.get("state"), written.get("attempt")) == ("running", attempt.number):
        with suppress(FinetuneError):
            attempt.folder.write_outcome(outcome)


def _kill_group(pid: int) -> None:
    """Kill a process and its group: its decoding processes end with it, suspended ones too."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
