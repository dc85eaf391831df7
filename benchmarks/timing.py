"""One process, timed from outside: wall seconds, processor seconds, and the memory of everything it starts.

Memory is the proportional set size (PSS) summed over the process and its descendants: pages that several of
them share count once, so that a tool with decoding processes is not charged twice for what they share. The
kernel takes 10 to 20 ms to add up one process with torch in it, and sampling may take at most 3 % of one
core, so that it is about every second there: a shorter peak can be missed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.results import Figures

SAMPLE_SECONDS = 0.05
MOST_SAMPLING = 0.03
"""Largest share of one core that sampling may take."""


class ProcessFailedError(Exception):
    """A process ended with an error; the text has its last words."""


def run_timed(
    words: Sequence[str], folder: Path, watch: Path | None = None, limit: float = 4 * 3600.0
) -> tuple[Figures, str]:
    """Run a command to its end; return what it cost, and its standard output.

    ``wall`` and ``cpu`` are seconds, ``peak_mb`` is the largest sampled sum of PSS in MB of 10^6 bytes,
    ``rss_mb`` the largest single process, and ``appeared`` the seconds until the watched file existed.

    Args:
        words: of the command line.
        folder: working folder, which also takes ``stdout`` and ``stderr``.
        watch: a file whose appearance is timed.
        limit: seconds after which it is killed.

    Raises:
        ProcessFailedError: it ended with an error, or was killed.
    """
    paths = folder / "stdout", folder / "stderr"
    figures: Figures = {"peak_mb": 0.0}
    with paths[0].open("wb") as out, paths[1].open("wb") as err:
        began = due = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603 - the benchmark's own words
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            # Reaping is what gives the sums of the kernel; Popen's own way of waiting throws them away.
            while not (reaped := os.wait4(process.pid, os.WNOHANG))[0]:
                now = time.perf_counter()
                if watch and "appeared" not in figures and watch.exists():
                    figures["appeared"] = now - began
                if now >= due:
                    figures["peak_mb"] = max(figures["peak_mb"], _sum_memory(process.pid) / 1e6)
                    due = now + max(SAMPLE_SECONDS, (time.perf_counter() - now) / MOST_SAMPLING)
                if now - began > limit:
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.005)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    _, status, usage = reaped
    process.returncode = os.waitstatus_to_exitcode(status)
    said, errors = (path.read_text("utf-8", "replace") for path in paths)
    if process.returncode:
        last = "\n".join(errors.strip().splitlines()[-5:])
        raise ProcessFailedError(f"exit status {process.returncode}: {last}")
    figures |= {"wall": time.perf_counter() - began, "cpu": usage.ru_utime + usage.ru_stime}
    return figures | {"rss_mb": usage.ru_maxrss * 1024 / 1e6}, said


def _sum_memory(pid: int) -> int:
    """Return the bytes of PSS of a process and its descendants."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            content = (entry / "stat").read_text("utf-8", "replace")
            parent = content.rpartition(")")[2].split()[1]  # names may hold spaces and brackets
            children[int(parent)].append(int(entry.name))
    tree, total = [pid], 0
    for member in tree:  # grows while it is walked
        tree.extend(children[member])
        with suppress(OSError, StopIteration):
            lines = Path("/proc", str(member), "smaps_rollup").read_text("ascii").splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total
