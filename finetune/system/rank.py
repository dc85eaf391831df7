"""The rank of this process, from the environment variables that a launcher sets for torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass

from finetune.errors import UsageError


@dataclass(frozen=True)
class RankInfo:
    """The rank of one process and the number of processes.

    Attributes:
        rank: rank of the process, from 0.
        size: number of processes of the job.
        local_rank: rank of the process on its machine, from 0.
        local_size: number of processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def find_rank() -> RankInfo | None:
    """Return the rank that a launcher has given to this process; None if no launcher has started it.

    Raises:
        UsageError: the launcher's variables contradict each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_size = _number("LOCAL_WORLD_SIZE", 0) or (size if "LOCAL_RANK" not in os.environ else 1)
    local_rank = _number("LOCAL_RANK", rank % max(local_size, 1))
    if not 0 <= rank < size:
        raise UsageError(
            f"RANK={rank} WORLD_SIZE={size}",
            "a rank must be below the world size",
            "Correct the launcher's settings.",
        )
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        found = "MASTER_ADDR and MASTER_PORT are not set, so the address of rank 0 is unknown"
        raise UsageError(f"WORLD_SIZE={size}", found, "Set them, or start with torchrun.")
    return RankInfo(rank, size, local_rank, local_size)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        fix = "Correct the launcher's settings, or unset the variable."
        raise UsageError(f"{name}={text}", "it is not a whole number", fix)
    return int(text)
