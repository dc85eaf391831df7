"""The image's health check: 0 while the job sends heartbeats, 1 if none has arrived for half a minute.

The supervisor of `finetune run` reads its pipe when a heartbeat arrives, and reads nothing else
(`finetune/launch/supervisor.py`). The kernel counts the reads of a process (`syscr` in /proc/PID/io), so this
check needs no file and works with a read-only root. It runs every minute, hence the standard library only.

Without a supervisor (other commands, and the first seconds of a run) the answer is 0.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

SECONDS = 30.0
"""Seconds within which a heartbeat must arrive. The image counts as unhealthy after three failed checks."""
PULSE = re.compile(rb"(?:^|\0)FINETUNE_PULSE=[^\0]*:(\d+)(?:\0|$)")
"""The variable that the supervisor sets for its child: a pipe, and the supervisor's process id."""


def find_watchers(processes: Path) -> set[int]:
    """Return the process ids of supervisors that have no supervisor themselves.

    Args:
        processes: the folder /proc. Processes of other users are skipped.
    """
    watchers, watched = set(), set()
    for folder in processes.glob("[0-9]*"):
        try:
            match = PULSE.search((folder / "environ").read_bytes())
        except OSError:
            continue
        if match:
            watchers.add(int(match[1]))
            watched.add(int(folder.name))
    return watchers - watched


def count_reads(processes: Path, number: int) -> int | None:
    """Return the number of reads of a process; None if it has ended or belongs to another user."""
    try:
        match = re.search(r"^syscr: (\d+)$", (processes / str(number) / "io").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def find_silent(processes: Path, seconds: float) -> set[int]:
    """Return the supervisors that received no heartbeat within ``seconds``."""
    deadline = time.monotonic() + seconds
    before = {number: count_reads(processes, number) for number in find_watchers(processes)}
    silent = {number for number, count in before.items() if count is not None}
    while silent and time.monotonic() < deadline:
        time.sleep(0.2)
        silent = {number for number in silent if count_reads(processes, number) == before[number]}
    return silent


def main() -> int:
    """Print one line for each silent job; return the exit code."""
    silent = find_silent(Path("/proc"), SECONDS)
    for number in sorted(silent):
        print(f"no heartbeat for {SECONDS:g} s: process {number} receives nothing from its job")  # noqa: T201
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main())
