"""Nested tuples, lists and dicts of tensors, as modules take and return them.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Structure: TypeAlias = Any
"""Nested tuples, lists and dicts with a :class:`Shape` in place of each tensor."""


class Shape(NamedTuple):
    """The shape of a tensor for any batch size: an axis has ``growth * B + fixed`` elements."""

    growth: tuple[int, ...]
    fixed: tuple[int, ...]
    dtype: torch.dtype

    def of(self, batch: int) -> tuple[int, ...]:
        """Return the shape for a batch size."""
        return tuple(growth * batch + fixed for growth, fixed in zip(self.growth, self.fixed, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements per image."""
        return torch.Size(self.of(1)).numel()

    @property
    def is_per_image(self) -> bool:
        """Whether only the first axis depends on the batch size, and is a multiple of it."""
        return bool(self.growth) and self.growth[0] > 0 and self.fixed[0] == 0 and not any(self.growth[1:])


def map_tensors(change: Callable[[Any], Any], item: Any) -> Any:
    """Return nested tuples, lists and dicts with ``change`` applied to every tensor (or shape)."""
    if isinstance(item, (Tensor, Shape)):
        return change(item)
    if isinstance(item, Mapping):
        return type(item)((key, map_tensors(change, value)) for key, value in item.items())  # type: ignore[call-arg]
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(map_tensors(change, part) for part in item))
    if isinstance(item, (list, tuple)):
        return type(item)(map_tensors(change, part) for part in item)
    return item


def shapes_in(item: Structure) -> list[Shape]:
    """Return every shape of a structure, in order."""
    found: list[Shape] = []
    map_tensors(found.append, item)
    return found


def tensors_in(item: object) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Mapping):
        return tensors_in(list(item.values()))
    if is_dataclass(item):
        return tensors_in([getattr(item, field.name) for field in fields(item)])
    if isinstance(item, (list, tuple)):
        return [tensor for part in item for tensor in tensors_in(part)]
    return []
