"""Run the command line in forks of a warm process, and kill a fork at any call that changes the disk.

Importing torch takes seconds, a fork of a process that has imported it takes none: so every single rename,
flush, link and removal of a run can have its own kill. Run as a program it takes one JSON object a line on
stdin (:class:`Order`) and answers with one (:class:`End`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

CALLS = ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir")
When = Literal["before", "after", "torn"]


@dataclass(frozen=True)
class LaunchSpec:
    """A command for a fork.

    Attributes:
        words: of the command line, after ``finetune``.
        kill: number of the call at which the fork is killed, from 0; -1 lets it live.
        when: before the call, after it, or before it with only half of the file on the disk.
        signal: that is sent; others than SIGKILL let the fork go on.
    """

    words: list[str]
    kill: int = -1
    when: When = "before"
    signal: int = int(signal.SIGKILL)


@dataclass(frozen=True)
class End:
    """How a fork ended: its exit code (negative for a signal), what it said, and the calls it made."""

    code: int
    said: str
    calls: list[str]


class Crasher:
    """The testing side: sends orders to the warm process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def run(self, *words: object, kill: int = -1, when: When = "before", number: int = signal.SIGKILL) -> End:
        """Run ``finetune`` with these words."""
        assert self._process.stdin and self._process.stdout
        order = LaunchSpec([str(word) for word in words], kill, when, int(number))
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return End(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def open_crasher() -> Iterator[Crasher]:
    crasher = Crasher()
    try:
        yield crasher
    finally:
        crasher.close()


# --- in the fork -----------------------------------------------------------------------------------


def patch_calls(order: LaunchSpec, calls: list[str]) -> None:
    """Count the calls that change the disk, and send a signal to this process at one of them."""
    for name in CALLS:
        setattr(os, name, _counted(name, getattr(os, name), order, calls))


def _counted(name: str, call: Callable[..., Any], order: LaunchSpec, calls: list[str]) -> Callable[..., Any]:
    def counted(*arguments: Any, **keys: Any) -> Any:
        number = len(calls)
        calls.append(f"{name} {_target(name, arguments)}")
        if number == order.kill and order.when != "after":
            if order.when == "torn" and name == "fsync":
                _tear(arguments[0])
            os.kill(os.getpid(), order.signal)
        result = call(*arguments, **keys)
        if number == order.kill and order.when == "after":
            os.kill(os.getpid(), order.signal)
        return result

    return counted


def _target(name: str, arguments: tuple[Any, ...]) -> str:
    """Name of the file or folder that the call is about."""
    if name == "fsync":
        return Path(f"/proc/self/fd/{arguments[0]}").readlink().name
    return Path(os.fsdecode(arguments[name in ("replace", "rename", "link")])).name  # where it leads to


def _tear(descriptor: int) -> None:
    """Leave half of a file, as a power cut may."""
    size = os.fstat(descriptor).st_size
    path = Path(f"/proc/self/fd/{descriptor}").readlink()
    if path.is_file():
        os.truncate(path, size // 2)


def run_fork(order: LaunchSpec, report: Path) -> None:
    """Run the command line here and end; the report tells of the calls even when a kill comes first."""
    from finetune.cli.app import main
    from finetune.training import checkpoint as pace

    pace.SHARE = 1e9  # a checkpoint after every epoch, however short
    calls: list[str] = []
    patch_calls(order, calls)
    sys.argv = ["finetune", *order.words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    report.write_text(json.dumps(calls))
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Fork for every order."""
    import tempfile

    import torch

    import finetune.pipeline.run

    assert finetune.pipeline.run
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = LaunchSpec(**json.loads(line))
        with tempfile.TemporaryDirectory() as folder:
            said, report = Path(folder) / "said", Path(folder) / "calls"
            child = os.fork()
            if child == 0:
                descriptor = os.open(said, os.O_CREAT | os.O_WRONLY)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                run_fork(order, report)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            calls = json.loads(report.read_text()) if report.exists() else []
            sys.stdout.write(json.dumps(asdict(End(code, said.read_text(), calls))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
