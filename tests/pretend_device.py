"""A device that this machine does not have: its tensors compute on the CPU, and never meet the CPU's own.

Like a GPU, an operation refuses tensors of both devices, but for numbers (0 dimensions) on the CPU. So code
that forgets to move a tensor fails here as it would there, and all values are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""Of torch's own devices the one that needs no hardware, and that nothing else here uses."""
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class PretendTensor(Tensor):
    """A tensor that says it is on :data:`DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keys: Any = None) -> Any:
        return _compute(function, arguments, keys or {})


def _compute(function: Any, arguments: Any, keys: dict[str, Any]) -> Any:
    tensors = [one for one in tree_flatten((arguments, keys))[0] if isinstance(one, Tensor)]
    pretended = [one for one in tensors if isinstance(one, PretendTensor)]
    if pretended and function not in _MOVES:
        strangers = [one for one in tensors if not isinstance(one, PretendTensor) and one.dim()]
        assert not strangers, f"{function} mixes devices"
    asked = keys.get("device")
    keys = keys | ({"device": torch.device("cpu")} if asked is not None else {})
    arguments, keys = tree_map(
        lambda one: one.inner if isinstance(one, PretendTensor) else one, (arguments, keys)
    )
    found = function(*arguments, **keys)
    if not (pretended if asked is None else torch.device(asked) == DEVICE):
        return found
    originals = {id(one.inner): one for one in pretended}  # of operations in place
    return tree_map(
        lambda one: originals.get(id(one), PretendTensor(one)) if isinstance(one, Tensor) else one, found
    )


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keys: Any = None) -> Any:
        return _compute(function, arguments, keys or {})


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Give a device whose tensors are kept apart from those of the CPU while the block runs."""
    with _Pretending():
        yield DEVICE
