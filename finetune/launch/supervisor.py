"""A light process that watches over the one that works: no hang goes unnoticed, no crash is the end.

::

    finetune run ...           this process: no torch, a few megabytes
      '- finetune run ...      the work, in a session of its own
         '- decoding processes

The parent reads heartbeats (:mod:`finetune.system.heartbeat`), passes signals on, ends a child whose
heartbeat stops, and starts it again where a second attempt may succeed. The child resumes from its last
checkpoint, so a restart costs minutes at most and does not change the result.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
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

_GRACE_AT_ONCE = 5.0
"""Seconds that a child has to leave after the second signal, or after it has saved."""
_TICK = 0.2


@dataclass
class Attempt:
    """What the parent knows of one child.

    Attributes:
        folder: of the run, as soon as the child has found it.
        number: of the attempt, as soon as the child has claimed the folder.
        saving: it is writing a checkpoint, and must not be ended for taking its time.
        step: of training that was reached.
        code: exit code; negative for the signal that ended it.
        stalled: it gave no sign of life for too long.
        lost: one of several processes was gone, so that the others had to end.
        output: what it wrote to stdout.
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
    """Runs a command in a child process until it ends for good.

    Args:
        arguments: of the command, as they stand after ``finetune``.
        stall_timeout: seconds without a sign of life after which the child is ended.
        say: shows one line to the user.
        command: that starts ``finetune``; by default as this process was started.
        waits: seconds before each new start; when they are used up without a step of progress, the run
            has failed.
        grace: seconds that a child has to save and leave after the first signal.
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
        """Return the exit code, and what the last child wrote to stdout."""
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
        """Ends that the child chose are final, but for an unforeseen one, which is tried once more."""
        if self._signals or attempt.folder is None:
            return True
        if attempt.stalled or attempt.lost or attempt.code < 0:
            return False
        return attempt.code != ExitCode.INTERNAL or internal > 1

    def _continue_in(self, attempt: Attempt) -> None:
        """Name the folder that the child chose by the time of day."""
        words = [word.partition("=")[0] for word in self.arguments]
        short = any(word.startswith("-o") for word in words)
        if "--output" not in words and not short and attempt.folder is not None:
            self.arguments = [*self.arguments, "--output", str(attempt.folder.path)]

    # --- one child -------------------------------------------------------------------------------

    def _attempt(self) -> Attempt:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        command = [*(self.command or own_command()), *self.arguments]
        environment = os.environ | {VARIABLE: f"{writing}:{os.getpid()}"}
        attempt = Attempt()
        try:
            with tempfile.TemporaryFile() as stdout:
                with subprocess.Popen(  # noqa: S603 - our own program, and the user's own words
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
        """Wait for the child's end, and bring it about where that is due."""
        signs = _Signs(pipe)
        if self._signals:  # one came in while the child was being started
            self._forward()
        while child.poll() is None:
            for facts in signs.wait(_TICK):
                _note(facts, attempt)
            if attempt.folder is not None and signs.silence() > self.stall_timeout:
                attempt.stalled = True
                _kill_group(child.pid)
            if self._overdue(attempt):
                _kill_group(child.pid)
        for facts in signs.wait(0):
            _note(facts, attempt)
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
        """Ask the child to stop; SIGTERM, since Python answers an early SIGINT with a traceback."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)

    def _suspend(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Ctrl-Z stops both, and `fg` wakes both."""
        if self._child is not None:
            self._child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._child is not None:
            self._child.send_signal(signal.SIGCONT)

    def _overdue(self, attempt: Attempt) -> bool:
        now = time.monotonic()
        if attempt.saving and len(self._signals) == 1:
            self._deadline = max(self._deadline, now + _GRACE_AT_ONCE)  # to leave, when it has saved
        return bool(self._signals) and now > self._deadline

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signals:
            time.sleep(_TICK)

    # --- the end ---------------------------------------------------------------------------------

    def _describe(self, attempt: Attempt) -> str:
        if attempt.stalled:
            return f"the run gave no sign of life for {self.stall_timeout:g} s, and was ended"
        if attempt.lost:
            return "the run lost one of its processes"
        if attempt.code < 0:
            return f"the run was ended by {_signal_name(-attempt.code)}"
        return "the run ended with an unforeseen error"

    def _conclude(self, attempt: Attempt) -> int:
        """Return the exit code, and write the outcome that a killed child could not."""
        if not attempt.stalled and attempt.code >= 0:
            return attempt.code
        outcome = self._outcome(attempt)
        _write_outcome(outcome, attempt)
        self.say(f"error: {outcome.message}")
        self.say(outcome.hint)
        attempt.output = json.dumps(outcome.to_dict()).encode() + b"\n" if "--json" in self.arguments else b""
        return outcome.exit_code

    def _outcome(self, attempt: Attempt) -> Outcome:
        message, place = self._describe(attempt), {"step": attempt.step, "attempt": max(attempt.number, 1)}
        again = "Give the same command again to go on from the last checkpoint."
        if self._signals:
            message = "the run was asked to stop, and ended before it had saved"
            return Outcome(
                "interrupted", message, again, int(ExitCode.INTERRUPTED), "interrupted", True, **place
            )
        if attempt.stalled:
            hint = f"Look for a disk or network that does not answer, or raise --stall-timeout. {again}"
            return Outcome("failed", message, hint, int(ExitCode.ENVIRONMENT), "stalled", False, **place)
        if attempt.code == -signal.SIGKILL:
            hint = f"Memory that ran out is the usual reason: lower --workers or --batch-size. {again}"
            return Outcome("failed", message, hint, 128 + signal.SIGKILL, "killed", True, **place)
        return Outcome("failed", message, again, int(ExitCode.INTERNAL), "crashed", True, **place)


def own_command() -> list[str]:
    """Return the command that runs this very installation.

    Without ``-P`` Python would look into the working folder first, where a user may well keep a folder
    called ``pretrained``; with it, it would not find a checkout that is run from its own folder.
    """
    root = Path(__file__).parents[1]
    from_checkout = not sys.flags.safe_path and Path(sys.path[0] or ".").absolute() == root
    return [sys.executable, *([] if from_checkout else ["-P"]), "-m", "finetune"]


class _Signs:
    """Signs of life, read from a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._rest = pipe, b""
        self._last = self._heard = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """Return the facts that came in, after waiting for them that long at most."""
        ready = self._selector.select(seconds)
        now = time.monotonic()
        if now - self._heard > seconds + 1:  # this process itself was stopped, or starved
            self._last = now
        self._heard = now
        content = b""
        if ready:
            with suppress(BlockingIOError):
                content = os.read(self._pipe, 1 << 16)
        if not content:
            time.sleep(0 if not ready else seconds)  # a closed pipe is ready all the time
            return []
        self._last = time.monotonic()
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def silence(self) -> float:
        """Return the seconds since the last sign."""
        return time.monotonic() - self._last


def _note(facts: dict[str, Any], attempt: Attempt) -> None:
    if "folder" in facts:
        attempt.folder = RunFolder(Path(facts["folder"]))
    attempt.number = facts.get("attempt", attempt.number)
    attempt.saving = facts.get("saving", attempt.saving)
    attempt.lost = facts.get("lost", attempt.lost)
    attempt.step = facts.get("step", attempt.step)


def _write_outcome(outcome: Outcome, attempt: Attempt) -> None:
    """Write the outcome that a killed child could not; what it, or another process, has written stays."""
    if attempt.folder is None:
        return
    written = RunReader(attempt.folder, tolerant=True).outcome
    if (written.get("state"), written.get("attempt")) == ("running", attempt.number):
        with suppress(FinetuneError):
            attempt.folder.write_outcome(outcome)


def _kill_group(pid: int) -> None:
    """Kill a process and its group; its decoding processes follow it, stopped ones too."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
