"""Run a forward pass: mixed precision, and smaller chunks of a batch after memory has run out.

Other computations go to the CPU where a GPU's memory runs out (:func:`compute_where_it_fits`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from finetune.system.device import DTYPES, Precision
from finetune.system.memory import attempt

T = TypeVar("T")
_NUM_TIMED = 8
"""Images of a pass that is timed."""


class ChunkedForward:
    """A forward pass without gradients that halves its chunks of a batch whenever memory runs out.

    The network must be in eval mode, where chunks do not change the result.

    Args:
        forward: function (B, ...) -> (B, ...).
        chunk_size: largest number of images in a chunk at the start; 0 takes the whole batch.
        least: smallest number of images in a chunk; a smaller rest joins the chunk before it.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], chunk_size: int = 0, least: int = 1) -> None:
        self.forward, self._chunk_size, self._least = forward, chunk_size, least

    def __call__(self, images: Tensor) -> Tensor:
        """Return the output for a batch.

        Raises:
            torch.OutOfMemoryError: memory runs out for the smallest chunk.
        """
        outputs: list[Tensor] = []
        done = 0
        while done < len(images):
            size = self._chunk_size or len(images)
            chunk = images[done : done + size]
            if 0 < len(images) - done - size < self._least:
                chunk = images[done:]
            output = attempt(partial(self.forward, chunk))
            if not isinstance(output, str):
                outputs.append(output)
                done += len(chunk)
            elif len(chunk) < 2 * self._least:
                raise torch.OutOfMemoryError(output)
            else:
                self._chunk_size = max(self._least, -(-len(chunk) // 2))
        return torch.cat(outputs)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the mixed-precision context of a forward pass; it does nothing for float32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "float32")


def compute_where_it_fits(device: torch.device, compute: Callable[[torch.device], T]) -> T:
    """Return ``compute(device)``, or that of the CPU if the memory of a GPU runs out."""
    if device.type != "cpu":
        found = attempt(partial(compute, device))
        if not isinstance(found, str):
            return found
    return compute(torch.device("cpu"))


def time_forward(
    network: nn.Module, input_size: tuple[int, int, int], device: torch.device, channels_last: bool
) -> float:
    """Return the seconds of a forward pass per image, in batches of 8, measured after a first pass."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.zeros(_NUM_TIMED, *input_size, device=device).to(memory_format=layout)
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            began = time.perf_counter()
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
    return seconds / _NUM_TIMED
