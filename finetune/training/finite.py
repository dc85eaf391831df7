"""Know that a loss is finite before the weights move, without making the GPU wait."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteCheck:
    """Asks right after the forward pass, and reads the answer while the backward pass is on its way.

    On a GPU the host only waits for the forward pass, with the backward pass queued behind it, so the
    device has no gap. On a CPU both calls are immediate.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._answer = torch.ones((), dtype=torch.bool, pin_memory=self._on_gpu)
        self._event = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]

    def start(self, loss: Tensor) -> None:
        """Ask of a loss; call before the backward pass."""
        self._answer.copy_(torch.isfinite(loss.detach()).all(), non_blocking=self._on_gpu)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(loss.device))

    def wait(self) -> bool:
        """Return whether it is finite; call before the update."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._answer)
