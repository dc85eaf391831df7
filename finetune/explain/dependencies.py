"""Which pixels can change which units: a network made linear and positive, whose gradient shows it exactly.

The gradient of a real network misses pixels: a ReLU that is off, or a pixel that is not the maximum of its
window, passes nothing. In this replica

* every activation is the identity, so that it passes everything;
* a convolution is the mean over its channels and its window, a linear layer that over its features;
* the maximum over a window is the mean, and attention is the mean over its tokens;
* a recurrent layer is the mean over the steps that it has read, of all if it reads in both directions;
* a normalisation over channels is the identity.

All values and slopes are then positive, and no two paths cancel: the gradient of a unit with respect to a
pixel is zero if and only if there is no path between them. The channels that a grouped convolution keeps
apart stay apart. Operations that are not listed run as they are: the mean of a squeeze-and-excitation, a
normalisation over positions, an interpolation, a shift.

Shape legend: B batch, C channels, H W pixels, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune.explain.positions import MapPosition
from finetune.explain.units import record_maps
from pretrained.graph.flow import replicate

_DTYPE = torch.float64
"""A corner of a field gets the share 1/9 from each 3x3 convolution: float32 would round it to zero."""
_IDENTITY = {
    "relu",
    "relu_",
    "relu6",
    "hardtanh",
    "hardtanh_",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "elu",
    "elu_",
    "celu",
    "selu",
    "softplus",
    "tanh",
    "clamp",
    "clamp_",
    "clamp_min",
    "batch_norm",
    "rms_norm",
    "normalize",
    "local_response_norm",
}
_Pair = tuple[int, int]


@contextmanager
def linear_replica(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the replica of a network; its forward passes must run inside the block.

    Args:
        network: it does not change. The replica is on the CPU, and holds no copy of the weights.
    """
    with torch.inference_mode(False), torch.enable_grad(), _Linear():
        yield replicate(network, _replace)


def record_positive(
    replica: nn.Module, positions: Sequence[MapPosition], size: tuple[int, int, int]
) -> tuple[Tensor, list[Tensor]]:
    """Return a random positive image (1, C, H, W), and the maps (1, C, h, w) that the replica computes of it.

    Args:
        replica: a network of :func:`linear_replica`.
        positions: the layers, at least one.
        size: (C, H, W) of the image.
    """
    image = torch.rand(1, *size, dtype=_DTYPE, generator=torch.Generator().manual_seed(0)) + 0.5
    image.requires_grad_()
    # A forward may begin with an operation in place, which a leaf does not allow.
    return image, record_maps(replica, positions, image * 1)


def _replace(tensor: Tensor) -> Tensor:
    """Return ones for weights, in no memory; buffers (masks, positions) keep their values."""
    if not tensor.is_floating_point():
        return tensor.cpu()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(torch.ones((), dtype=_DTYPE).expand(tensor.shape), requires_grad=False)
    return tensor.detach().to("cpu", _DTYPE)


class _Linear(TorchFunctionMode):
    """Exchanges the functions of a forward pass for linear, positive ones."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        exchanged = _EXCHANGED.get(getattr(func, "__name__", ""))
        if exchanged is None or not any(isinstance(one, Tensor) and one.requires_grad for one in args):
            return func(*args, **kwargs)
        return exchanged(func, *args, **kwargs)


def _level(tensor: Tensor) -> Tensor:
    """Return a tensor scaled to the mean one, so that the values of a deep network stay in range."""
    mean = tensor.detach().mean().item()
    return tensor / mean if math.isfinite(mean) and mean > 0 else tensor


def _identity(_: Callable[..., Any], tensor: Tensor, *__: Any, **___: Any) -> Tensor:
    return tensor


def _convolve(
    _: Callable[..., Any],
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001 - a caller may name it
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the mean over the channels of each group and over the window, for every channel."""
    kernel, steps, spread = _pair(weight.shape[2:]), _pair(stride), _pair(dilation)
    mixed = images.reshape(len(images), groups, -1, *images.shape[2:]).mean(dim=2)
    mixed = F.pad(mixed, _sides(padding, kernel, spread))
    if spread == (1, 1):
        means = F.avg_pool2d(mixed, kernel, steps)
    else:
        box = mixed.new_full((groups, 1, *kernel), 1 / math.prod(kernel))
        means = F.conv2d(mixed, box, None, steps, 0, spread, groups)
    return _level(means.repeat_interleave(len(weight) // groups, dim=1))


def _sides(padding: int | str | Sequence[int], kernel: _Pair, dilation: _Pair) -> list[int]:
    """Return the padding at left, right, top and bottom."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        extra = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        return [extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2]
    assert not isinstance(padding, str)
    rows, columns = _pair(padding)
    return [columns, columns, rows, rows]


def _pair(value: int | Sequence[int]) -> _Pair:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _project(_: Callable[..., Any], rows: Tensor, weight: Tensor, *__: Any, **___: Any) -> Tensor:
    """Return the mean over features, for every output of a linear layer."""
    return _level(rows.mean(dim=-1, keepdim=True)).repeat_interleave(len(weight), dim=-1)


def _pool(
    _: Callable[..., Any],
    images: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    **__: Any,
) -> Tensor:
    """Return the mean over each window of a max pooling, holes of a dilation included."""
    kernel, spread = _pair(kernel_size), _pair(dilation)
    steps = _pair(stride) if stride else kernel
    reach = (spread[0] * (kernel[0] - 1) + 1, spread[1] * (kernel[1] - 1) + 1)
    return F.avg_pool2d(images, reach, steps, _pair(padding), ceil_mode)


def _pool_adaptive(_: Callable[..., Any], images: Tensor, output_size: Any, **__: Any) -> Tensor:
    return F.adaptive_avg_pool2d(images, output_size)


def _normalise(
    func: Callable[..., Any], tensor: Tensor, normalized_shape: Sequence[int], *rest: Any, **named: Any
) -> Any:
    """Return the tensor itself if only its last axis, the channels of a position, is normalised."""
    return tensor if len(normalized_shape) == 1 else func(tensor, normalized_shape, *rest, **named)


def _spread(_: Callable[..., Any], scores: Tensor, dim: int | None = None, *__: Any, **___: Any) -> Tensor:
    """Return equal attention to all tokens, which depends on all scores."""
    axis = -1 if dim is None else dim
    return _level(scores.mean(dim=axis, keepdim=True)).expand_as(scores) / scores.shape[axis]


def _attend(_: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> Tensor:
    """Return the mean of all values and keys, plus the own query."""
    common = value.mean(dim=-2, keepdim=True) + key.mean(dim=(-2, -1), keepdim=True)
    return _level(common + query.mean(dim=-1, keepdim=True))


def _recur(
    _: Callable[..., Any],
    steps: Tensor,
    state: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    *settings: Any,
) -> tuple[Tensor, ...]:
    """Return the mean of the steps so far, or of all, for every output of a recurrent layer, and its states.

    ``settings`` ends with whether it reads in both directions, and whether the batch is the first axis.
    """
    in_both, batch_first = settings[-2:]
    axis = 1 if batch_first else 0
    means = steps.mean(dim=-1, keepdim=True)
    whole = means.mean(dim=axis, keepdim=True)
    read = whole.expand_as(means) if in_both else means.cumsum(dim=axis)
    states = [state] if isinstance(state, Tensor) else state
    width = weights[1].shape[1] * (2 if in_both else 1)  # of the weights on the state
    last = _level(whole).reshape(1, -1, 1)
    return _level(read).repeat_interleave(width, dim=-1), *(last.expand_as(one) for one in states)


def _add(_: Callable[..., Any], one: Tensor, other: Tensor, *__: Any, **___: Any) -> Tensor:
    return one + other


_EXCHANGED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_IDENTITY, _identity),
    "conv2d": _convolve,
    "linear": _project,
    "max_pool2d": _pool,
    "_max_pool2d": _pool,
    "adaptive_max_pool2d": _pool_adaptive,
    "_adaptive_max_pool2d": _pool_adaptive,
    "layer_norm": _normalise,
    "softmax": _spread,
    "scaled_dot_product_attention": _attend,
    "maximum": _add,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recur),
}
"""The linear function in place of each function of torch, by its name."""
