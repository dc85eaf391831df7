"""Several processes of one job, forked from the test: a world each, over gloo on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import torch

from finetune.system.distributed import Distributed
from finetune.system.join import join_distributed

TIMEOUT = 20.0
"""Seconds that a process may let the others wait."""
_PATIENCE = 120
"""Seconds after which a test has hung."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(work: Callable[[Distributed], Any], size: int = 2) -> list[Any]:
    """What each process returns, by rank; its exception where it raised one."""
    children, ends = _start(work, size)
    try:
        return [_receive(end) for end in ends]
    finally:
        _end(children, 5)


def exit_codes(work: Callable[[Distributed], Any], size: int = 2) -> list[int | None]:
    """How each process ends, by rank: 0 where the work returns or raises, -9 where it was killed."""
    children, _ = _start(work, size)
    try:
        for child in children:
            child.join(_PATIENCE)
        return [child.exitcode for child in children]
    finally:
        _end(children, 0)


def _start(work: Callable[[Distributed], Any], size: int) -> tuple[list[ForkProcess], list[Connection]]:
    context = multiprocessing.get_context("fork")
    port = free_port()
    ends, children = [], []
    for rank in range(size):
        reading, writing = context.Pipe(duplex=False)
        child = context.Process(target=_play, args=(work, rank, size, port, writing))
        child.start()
        writing.close()
        ends.append(reading)
        children.append(child)
    return children, ends


def _end(children: list[ForkProcess], seconds: float) -> None:
    for child in children:
        child.join(seconds)
        child.kill()


def _receive(end: Connection) -> Any:
    assert end.poll(_PATIENCE), "a process hangs"
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        return None  # it was killed


def _play(work: Callable[[Distributed], Any], rank: int, size: int, port: int, end: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    try:
        result = work(join_distributed("cpu", TIMEOUT))
    except Exception as error:
        error.add_note(traceback.format_exc())
        result = error
    end.send_bytes(pickle.dumps(result))  # whole: tensors would go by the memory of a process that ends
    end.close()
    os._exit(0)
