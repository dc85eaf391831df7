"""What a launcher says of one process of a job, in torch.distributed's environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from finetune.errors import UsageError


@dataclass(frozen=True)
class RankInfo:
    """What a launcher says of one process.

    Attributes:
        rank: of the process, from 0.
        size: number of processes.
        local_rank: of the process on its machine.
        local_size: processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def find_rank() -> RankInfo | None:
    """Return what a launcher says of this process; None where none has started it.

    Raises:
        UsageError: it contradicts itself.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_size = _number("LOCAL_WORLD_SIZE", 0) or (size if "LOCAL_RANK" not in os.environ else 1)
    local_rank = _number("LOCAL_RANK", rank % max(local_size, 1))
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank} WORLD_SIZE={size}", "a rank lies below the size", "Mend the launcher.")
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        found = "MASTER_ADDR and MASTER_PORT do not say where the first process is"
        raise UsageError(f"WORLD_SIZE={size}", found, "Set them, or start with torchrun.")
    return RankInfo(rank, size, local_rank, local_size)


def _number(name: str, otherwise: int | None = None) -> int:
    text = os.environ.get(name, "" if otherwise is None else str(otherwise))
    if not text.isdecimal():
        raise UsageError(f"{name}={text}", "it is no whole number", "Mend the launcher, or unset it.")
    return int(text)
