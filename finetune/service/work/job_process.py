"""The first program of a job's process: it ends with the server, and becomes ``finetune``.

    python -m finetune.service.work.job_process SERVER WORD ...        SERVER: id of its process

When a server is killed, the kernel asks its jobs to stop: they write a checkpoint and end, so that the next
server finds their folders free.
"""

from __future__ import annotations

import os
import signal
import sys

from finetune.launch.supervisor import own_command
from finetune.system.signals import end_with_parent


def main() -> None:
    """Become the command."""
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    command = [*own_command(), *sys.argv[2:]]
    os.execv(command[0], command)  # noqa: S606 - our own program; the kernel keeps the setting


if __name__ == "__main__":
    main()
