"""Connect the processes that a launcher has started, and close their connections."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune.errors import EnvironmentFaultError, LostProcessError, UsageError
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.gpu import choose_device, identify_card
from finetune.system.rank import RankInfo, find_rank


def join_distributed(device: str, timeout: float) -> Distributed:
    """Connect the processes that a launcher has started; :data:`SINGLE_PROCESS` if there is no launcher.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout: time-out of collectives, in seconds.

    Raises:
        UsageError: the launcher's variables contradict each other, or one device is named for several
            processes.
        EnvironmentFaultError: there are fewer GPUs than processes.
        LostProcessError: the other processes cannot be reached, or have not connected in time.
    """
    rank_info = find_rank()
    if rank_info is None or rank_info.size == 1:
        return SINGLE_PROCESS
    if ":" in device:
        fix = "Take --device cuda: each process uses its own GPU."
        raise UsageError(f"--device {device}", f"there are {rank_info.size} processes", fix)
    limit, on_gpu = timedelta(seconds=timeout), device != "cpu" and torch.cuda.is_available()
    if not dist.is_initialized():
        _connect(rank_info, on_gpu, limit)
    group: Any = dist.new_group(backend="gloo", timeout=limit)
    all_ranks = tuple(range(rank_info.size))
    found: list[Any] = [None] * rank_info.size
    card = identify_card(choose_device(rank_info)) if on_gpu else ""
    dist.all_gather_object(found, (socket.gethostname(), card), group=group)
    if on_gpu and len(set(found)) < rank_info.size:  # NCCL would fail later, with a less clear message
        raise _shared_cards(rank_info.size, len(set(found)))
    hosts = [host for host, _ in found]
    machines = {host: tuple(rank for rank in all_ranks if hosts[rank] == host) for host in hosts}
    if len(machines) == 1:
        return Distributed(rank_info, group, all_ranks)
    # torch requires every process to make every group, in the same order.
    groups = {host: dist.new_group(list(ranks), limit, "gloo") for host, ranks in machines.items()}
    host = hosts[rank_info.rank]
    ranks = machines[host]
    here = RankInfo(ranks.index(rank_info.rank), len(ranks), rank_info.local_rank, len(ranks))
    return Distributed(
        rank_info, group, all_ranks, machine=Distributed(here, groups[host], ranks, f"machine-{host}")
    )


def _shared_cards(processes: int, cards: int) -> EnvironmentFaultError:
    shown = f"{cards} GPU{'' if cards == 1 else 's'}"
    found = f"{processes} processes share {shown}; slices (MIG) of a card count as one"
    fix = "Start fewer processes, or take --device cpu."
    return EnvironmentFaultError("a GPU for each process", found, fix)


def _connect(rank_info: RankInfo, on_gpu: bool, timeout: timedelta) -> None:
    if on_gpu:
        torch.cuda.set_device(choose_device(rank_info))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        message = " ".join(str(error).split())[:200]
        fix = "Check that the machines can reach each other at that address; then start the job again."
        raise LostProcessError(f"connecting {rank_info.size} processes at {where}", message, fix) from None


def leave_distributed(distributed: Distributed) -> None:
    """Close the connections to the other processes, if they are still open."""
    if distributed.size > 1 and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
