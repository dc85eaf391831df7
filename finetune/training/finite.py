"""Know that a loss and its gradient are finite numbers before the weights move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def compute_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the whole gradient, on its device; infinite as well where squares overflow."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def is_finite(loss: Tensor, norm: Tensor) -> bool:
    """Return whether both are finite: one word from the device, when the backward pass has ended."""
    return bool(torch.isfinite(loss.detach()) & torch.isfinite(norm))
