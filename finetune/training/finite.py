"""Know that a loss and its gradient are finite numbers before the weights move."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import and_

import torch
from torch import Tensor, nn


def compute_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the whole gradient, on its device; infinite as well where squares overflow."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def is_finite(*numbers: Tensor) -> bool:
    """Return whether all of some single numbers are finite: one word from their device."""
    return bool(reduce(and_, (torch.isfinite(number.detach()) for number in numbers)))


def add_up(tensors: list[Tensor]) -> Tensor:
    """Return the sum of tensors: infinite or nan where one of their values is, and cheaper than a maximum."""
    return torch.stack([tensor.detach().sum() for tensor in tensors]).sum()
