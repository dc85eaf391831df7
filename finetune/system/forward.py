"""Run a forward pass: mixed precision, and smaller parts of a batch where memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune.system.device import DTYPES, Precision, is_out_of_memory, release_memory


class InParts:
    """Runs a forward without gradients, in smaller parts from where memory ran out.

    In eval mode parts change nothing.

    Args:
        forward: (B, ...) -> (B, ...).
        most: that go through at a time from the start; 0 takes all.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], most: int = 0) -> None:
        self.forward, self._most = forward, most

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the forward makes of a batch; one image too many raises its error."""
        logits: list[Tensor] = []
        done = 0
        while done < len(images):
            part = images[done : done + (self._most or len(images))]
            try:
                logits.append(self.forward(part))
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
            else:
                done += len(part)
                continue
            self._most = -(-len(part) // 2)
            release_memory()
        return torch.cat(logits)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the mixed-precision context of a forward pass; it does nothing for float32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "float32")
