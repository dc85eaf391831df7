"""The image's health check: 0 while the job gives signs of life, 1 where none came for half a minute.

`finetune run` is watched over by a process that reads its pipe when a sign of life comes in, and nothing else
(`finetune/launch/supervisor.py`). The kernel counts the reads of a process (`syscr` in /proc/PID/io), so that
nothing has to be written for this check, and a read-only root does no harm. It runs every minute, hence on
Python's own library alone.

Where nobody watches there is nothing to say, and the answer is 0: other commands, and a run's first seconds.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

SECONDS = 30.0
"""In which a sign has to come. The image asks three times before it says that something is wrong."""
PULSE = re.compile(rb"(?:^|\0)FINETUNE_PULSE=[^\0]*:(\d+)(?:\0|$)")
"""The supervisor sets it for its child: a pipe, and its own process number (finetune/system/heartbeat.py)."""


def find_watchers(processes: Path) -> set[int]:
    """Return the processes that watch over others and are not watched themselves.

    Args:
        processes: /proc. Processes of other users are passed over.
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
    """Return how many times a process has read something; None when it has ended, or may not be looked at."""
    try:
        match = re.search(r"^syscr: (\d+)$", (processes / str(number) / "io").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def find_silent(processes: Path, seconds: float) -> set[int]:
    """Return the watching processes that heard nothing, after waiting for a sign that long at most."""
    deadline = time.monotonic() + seconds
    before = {number: count_reads(processes, number) for number in find_watchers(processes)}
    silent = {number for number, count in before.items() if count is not None}
    while silent and time.monotonic() < deadline:
        time.sleep(0.2)
        silent = {number for number in silent if count_reads(processes, number) == before[number]}
    return silent


def main() -> int:
    """Say in one line how the job is; return the exit code."""
    silent = find_silent(Path("/proc"), SECONDS)
    for number in sorted(silent):
        print(f"no sign of life for {SECONDS:g} s: process {number} hears nothing from its job")  # noqa: T201
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main())
