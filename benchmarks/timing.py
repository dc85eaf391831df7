"""One process, timed from outside: wall seconds, processor seconds, and the memory of everything it starts.

Memory is the proportional set size (PSS) summed over the process and its descendants: pages that several of
them share count once, so that a tool with decoding processes is not charged twice for what they share. It is
sampled every 50 ms at best. The kernel takes 10 to 20 ms to add up one process with torch in it, and at most
3 % of one core may go into looking, so that it is about every second there: a shorter peak can be missed.
The largest resident size of a single process, which the kernel keeps exactly, is noted beside it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05
MOST_SAMPLING = 0.03
"""Largest share of one core that sampling may take."""
WATCH_SECONDS = 0.005
LIMIT_SECONDS = 4 * 3600.0


@dataclass(frozen=True)
class Command:
    """What is run.

    Attributes:
        words: of the command line.
        environment: added to this process's own.
        folder: working folder, which also takes ``stdout`` and ``stderr``.
        watch: a file whose appearance is timed.
    """

    words: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    watch: Path | None = None


@dataclass(frozen=True)
class Timed:
    """What one process cost.

    Attributes:
        code: exit status; negative for a signal.
        wall: seconds from start to end.
        cpu: processor seconds of all processes that were waited for.
        peak_mb: largest sampled sum of PSS, in MB of 10^6 bytes; 0 where it ended before the first look.
        rss_mb: largest resident size of a single process.
        appeared: seconds until the watched file was there.
        stdout: what it printed.
        stderr: what it said.
    """

    code: int
    wall: float
    cpu: float
    peak_mb: float
    rss_mb: float
    appeared: float | None
    stdout: str
    stderr: str


def run_timed(command: Command, limit: float = LIMIT_SECONDS) -> Timed:
    """Run a command to its end, or to the limit in seconds."""
    command.folder.mkdir(parents=True, exist_ok=True)
    paths = command.folder / "stdout", command.folder / "stderr"
    with paths[0].open("wb") as out, paths[1].open("wb") as err:
        began = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603 - the suite's own words
            command.words,
            env=os.environ | command.environment,
            cwd=command.folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            peak, appeared = _watch(process.pid, began, command.watch, limit)
        except BaseException:
            _kill(process.pid)
            raise
        # Reaping is what gives the sums of the kernel; Popen's own way of waiting throws them away.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    return Timed(
        code=process.returncode,
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak_mb=peak / 1e6,
        rss_mb=usage.ru_maxrss * 1024 / 1e6,
        appeared=appeared,
        stdout=paths[0].read_text("utf-8", "replace"),
        stderr=paths[1].read_text("utf-8", "replace"),
    )


def _watch(pid: int, began: float, file: Path | None, limit: float) -> tuple[int, float | None]:
    """Return the peak of memory in bytes, and when the file appeared; the process has ended then."""
    peak, appeared, due = 0, None, began
    handle = os.pidfd_open(pid)
    try:
        while True:
            now = time.perf_counter()
            if now - began > limit:
                _kill(pid)
            if file is not None and appeared is None and file.exists():
                appeared = now - began
            if now >= due:
                peak = max(peak, sum_memory(pid))
                took = time.perf_counter() - now
                due = now + max(SAMPLE_SECONDS, took / MOST_SAMPLING)
            pause = due - time.perf_counter()
            if file is not None and appeared is None:
                pause = min(pause, WATCH_SECONDS)
            if select.select([handle], [], [], max(pause, 0))[0]:
                if file is not None and appeared is None and file.exists():
                    appeared = time.perf_counter() - began
                return peak, appeared
    finally:
        os.close(handle)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def sum_memory(pid: int) -> int:
    """Return the bytes of PSS of a process and its descendants."""
    return sum(_read_pss(member) for member in find_tree(pid))


def find_tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                content = (entry / "stat").read_text("utf-8", "replace")
                parent = content.rpartition(")")[2].split()[1]  # names may hold spaces and brackets
                children[int(parent)].append(int(entry.name))
    tree = [pid]
    for member in tree:  # grows while it is walked
        tree.extend(children[member])
    return tree


def _read_pss(pid: int) -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc", str(pid), "smaps_rollup").read_text("ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return 0
