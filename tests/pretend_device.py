"""A GPU that this machine does not have: its tensors compute on the CPU, and never meet the CPU's own.

Like a GPU, an operation refuses tensors of both devices, but for numbers (0 dimensions) on the CPU. So code
that forgets to move a tensor fails here as it would there, and all values are real. torch's own
``FakeTensorMode`` cannot do this: without a driver no backward pass runs on its ``cuda`` tensors ("expects a
valid device index"), nor does it know values, without which no loss is judged. Python sees tensors on
``cuda:0``; for the C++ side of torch they are on ``meta``, which needs no driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
_INNER_DEVICE = torch.device("meta")
"""Of torch's own devices the one that needs no hardware, and that nothing else here uses."""
_FROM_DATA = (torch.tensor, torch.as_tensor)
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class PretendTensor(Tensor):
    """A tensor that says it is on :data:`DEVICE`."""

    inner: Tensor
    device = DEVICE
    is_cuda = True
    is_meta = False

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_INNER_DEVICE,
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        made = PretendTensor(self.inner.detach().clone())
        made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        memo[id(self)] = made
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
    if not (pretended if asked is None else torch.device(asked) == _INNER_DEVICE):
        return found
    originals = {id(one.inner): one for one in pretended}  # of operations in place
    return tree_map(
        lambda one: originals.get(id(one), PretendTensor(one)) if isinstance(one, Tensor) else one, found
    )


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keys: Any = None) -> Any:
        return _compute(function, arguments, keys or {})


class _Redirecting(TorchFunctionMode):
    """Turns every ``cuda`` in a call into the device that torch's C++ side gets to see."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keys: Any = None) -> Any:
        if function is Tensor.pin_memory:
            return arguments[0]
        keys = {key: value for key, value in (keys or {}).items() if key != "pin_memory"}
        if function is Tensor.cuda:
            return arguments[0].to(_INNER_DEVICE)
        if function in _FROM_DATA and _names_gpu(keys.get("device")):  # they bypass the dispatcher
            return function(*arguments, **keys | {"device": "cpu"}).to(_INNER_DEVICE)
        arguments, keys = tree_map(lambda one: _INNER_DEVICE if _names_gpu(one) else one, (arguments, keys))
        return function(*arguments, **keys)


def _names_gpu(value: Any) -> bool:
    if isinstance(value, str):
        return value.partition(":")[0] == DEVICE.type
    return isinstance(value, torch.device) and value.type == DEVICE.type


class _Generator(torch.Generator):
    """Draws on the CPU, whatever device is asked for."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Give a device whose tensors are kept apart from those of the CPU while the block runs."""
    # A view of a wrapped tensor cannot be made in inference mode; without gradients is what it means here.
    plain = mock.patch.object(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode))
    generators = mock.patch.object(torch, "Generator", _Generator)
    fork = torch.random.fork_rng
    forks = mock.patch.object(torch.random, "fork_rng", lambda devices=(), **keys: fork([], **keys))
    waits = mock.patch.object(torch.cuda, "synchronize", lambda device=None: None)
    with plain, generators, forks, waits, _Pretending(), _Redirecting():
        yield DEVICE
