"""What every layer of a network costs: parameters, multiply-adds, activations, and memory for training.

The network runs on the meta device (:func:`pretrained.graph.flow.meta_replica`), so nothing is computed and
the largest networks take about a second. Everything is attributed to the innermost module that is running: a
convolution owns its multiplications, and a block owns the addition or the attention that its own ``forward``
computes. The rows add up to the totals of the network.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from finetune.errors import UsageError
from pretrained.graph.flow import meta_replica
from pretrained.graph.recorder import observe_calls
from pretrained.graph.structures import tensors_in

_TRAINED_BATCH_SIZES = (2, 3)
"""The memory of other batch sizes is extrapolated linearly from these; batch norm needs two images."""
_BYTES = 4
"""Bytes of a float32 value."""


@dataclass(frozen=True)
class LayerCost:
    """What one call of a module costs, without the modules that it calls.

    Attributes:
        name: as in ``network.named_modules()``; ``input`` for the image, ``""`` for the network itself.
        number: how many calls of that module came before.
        kind: the class of the module.
        settings: kernel size, stride and groups, such as ``3x3/2``; ``""`` if it has none.
        is_leaf: whether it calls no other module. Otherwise the row is about its own operations only.
        output: shape of what it returns for one image; the axis of the batch is left out.
        activations: elements of the outputs of one image that are new tensors. Operations in place and views
            (ReLU in place, flatten) make none.
        weights: number of parameters that are not biases. They count in the first call.
        biases: number of biases.
        macs: multiply-adds of one image, of convolutions, linear layers and matrix products.
        kept: bytes that the backward pass needs (float32), fixed and for each image.
    """

    name: str
    number: int
    kind: str
    settings: str
    is_leaf: bool
    output: tuple[int, ...]
    activations: int
    weights: int
    biases: int
    macs: int
    kept: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Number of parameters, biases included."""
        return self.weights + self.biases


@dataclass(frozen=True)
class NetworkCost:
    """The layers of a network in the order of execution, and their totals.

    Attributes:
        rows: the image, and every call of a module that costs anything or calls no other module.
    """

    rows: tuple[LayerCost, ...]

    @property
    def weights(self) -> int:
        """Number of parameters that are not biases."""
        return sum(row.weights for row in self.rows)

    @property
    def biases(self) -> int:
        """Number of biases."""
        return sum(row.biases for row in self.rows)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.weights + self.biases

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return sum(row.macs for row in self.rows)

    @property
    def activations(self) -> int:
        """Elements of the image and of all outputs that are new tensors, for one image."""
        return sum(row.activations for row in self.rows)

    def forward_bytes(self, batch_size: int) -> int:
        """Return the bytes of all activations of a batch in float32, as if none were freed."""
        return _BYTES * batch_size * self.activations

    def training_bytes(self, batch_size: int) -> int:
        """Return the bytes that a training step keeps from the forward to the backward pass, in float32.

        Weights, gradients and the state of the optimiser are not in it.
        """
        return sum(row.kept[0] + batch_size * row.kept[1] for row in self.rows)


def compute_costs(network: nn.Module, input_size: tuple[int, int, int]) -> NetworkCost:
    """Compute the costs of each layer of a network; the network does not change.

    Args:
        network: (B, C, H, W) -> logits, on any device.
        input_size: (C, H, W) of its images.

    Raises:
        UsageError: a forward pass fails at that size.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.random.fork_rng(devices=[]))
        for mode in (torch.inference_mode(False), torch.device("meta")):
            modes.enter_context(mode)
        try:
            calls = _trace_forward(network, input_size)
            kept = [_trace_training(network, input_size, size) for size in _TRAINED_BATCH_SIZES]
        except Exception as error:  # the forward of any network may raise anything
            asked = f"the layers of {type(network).__name__} at {input_size[1]} x {input_size[2]} pixels"
            found = f"a trial forward failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            raise UsageError(asked, found, "Leave --img-size out, or take another network.") from error
    owners = _assign_parameters(network, {call.name for call in calls})
    image = LayerCost("input", 0, "", "", True, input_size, _numel(input_size), 0, 0, 0, (0, 0))
    rows = [_to_row(network, call, owners, kept) for call in calls]
    return NetworkCost((image, *(row for row in rows if row.is_leaf or _costs(row))))


def _costs(row: LayerCost) -> bool:
    return any((row.activations, row.parameters, row.macs, *row.kept))


def _to_row(
    network: nn.Module, call: _Call, owners: Counter[tuple[str, bool]], kept: Sequence[Counter[_Key]]
) -> LayerCost:
    module = network.get_submodule(call.name)
    small, large = (found[call.name, call.number] for found in kept)
    growth = large - small
    return LayerCost(
        name=call.name,
        number=call.number,
        kind=type(module).__name__,
        settings=describe_settings(module) if call.is_leaf else "",
        is_leaf=call.is_leaf,
        output=call.output,
        activations=call.activations,
        weights=owners[call.name, False] if call.number == 0 else 0,
        biases=owners[call.name, True] if call.number == 0 else 0,
        macs=call.flops // 2,
        kept=(small - growth * _TRAINED_BATCH_SIZES[0], growth),
    )


def describe_settings(module: nn.Module) -> str:
    """Return the kernel, stride and groups of a convolution or pooling: ``3x3``, ``3x3/2, 32 groups``."""
    kernel = getattr(module, "kernel_size", None)
    if kernel is None:
        return ""
    height, width = _pair(kernel)
    stride = _pair(getattr(module, "stride", None) or kernel)
    text = f"{height}x{width}"
    if stride != (1, 1):
        text += f"/{stride[0]}" if stride[0] == stride[1] else f"/{stride[0]}x{stride[1]}"
    groups = getattr(module, "groups", 1)
    return text if groups == 1 else f"{text}, {groups} groups"


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _assign_parameters(network: nn.Module, called: set[str]) -> Counter[tuple[str, bool]]:
    """Count the weights and biases of each module that is called.

    A parameter of a module that is not called itself (the projection of torch's attention) belongs to the
    nearest module around it that is.
    """
    counts: Counter[tuple[str, bool]] = Counter()
    for name, parameter in network.named_parameters():
        owner, _, last = name.rpartition(".")
        while owner and owner not in called:
            owner = owner.rpartition(".")[0]
        counts[owner, last == "bias" or last.endswith("_bias")] += parameter.numel()
    return counts


# --- tracing -------------------------------------------------------------------------------------

_Key = tuple[str, int]
"""Name of a module, and number of the call."""


@dataclass
class _Call:
    """A call of a module while it is traced; ``flops`` are its own, without those of the calls inside."""

    name: str
    number: int
    flops: int = 0
    is_leaf: bool = True
    output: tuple[int, ...] = ()
    activations: int = 0


@dataclass
class _Storages:
    """The memory blocks that were seen. They are held, so that no later one has the same address."""

    held: dict[int, object] = field(default_factory=dict)

    def is_new(self, tensor: Tensor) -> bool:
        """Return whether a tensor's memory was not seen before, and remember it."""
        storage = tensor.untyped_storage()
        is_new = storage._cdata not in self.held
        self.held[storage._cdata] = storage
        return is_new


@contextmanager
def _follow(
    replica: nn.Module, enter: Callable[[str, int], None], leave: Callable[[str, Any], None]
) -> Iterator[None]:
    """Call ``enter(name, number)`` before each call of a module, and ``leave(name, output)`` after it."""
    numbers: Counter[str] = Counter()

    def before(name: str, _: object) -> None:
        enter(name, numbers[name])
        numbers[name] += 1

    with observe_calls(dict(replica.named_modules()), before, leave):
        yield


def _trace_forward(network: nn.Module, input_size: tuple[int, int, int]) -> list[_Call]:
    """Return every call of a forward pass of one image in eval mode, in the order of their ends."""
    replica = meta_replica(network).requires_grad_(False)  # the counter fails on some trained parameters
    image = torch.empty(1, *input_size)
    finished: list[_Call] = []
    stack: list[_Call] = []
    storages = _Storages()
    storages.is_new(image)
    counter, last = FlopCounterMode(display=False), 0

    def charge() -> None:
        nonlocal last
        total = counter.get_total_flops()
        if stack:
            stack[-1].flops += total - last
        last = total

    def enter(name: str, number: int) -> None:
        charge()
        if stack:
            stack[-1].is_leaf = False
        stack.append(_Call(name, number))

    def leave(name: str, output: Any) -> None:
        charge()
        call = stack.pop()
        while call.name != name:  # that one ended by an exception, which its caller handled
            call = stack.pop()
        tensors = tensors_in(output)
        call.output = _shape_of_one(tensors[0]) if tensors else ()
        call.activations = sum(tensor.numel() for tensor in tensors if storages.is_new(tensor))
        finished.append(call)

    with torch.no_grad(), counter, _follow(replica, enter, leave):
        replica(image)
    return finished


def _shape_of_one(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[1:] if shape[:1] == (1,) else shape  # windows may be folded into the axis of the batch


def _trace_training(network: nn.Module, input_size: tuple[int, int, int], batch_size: int) -> Counter[_Key]:
    """Return the bytes that each call saves for the backward pass, in train mode.

    A tensor that several calls save counts once, and parameters do not count.
    """
    replica = meta_replica(network).train()
    images = torch.empty(batch_size, *input_size)
    stack: list[_Key] = []
    kept: Counter[_Key] = Counter()
    storages = _Storages()
    for tensor in (*replica.parameters(), *replica.buffers()):
        storages.is_new(tensor)

    def pack(tensor: Tensor) -> None:
        if storages.is_new(tensor):
            kept[stack[-1] if stack else ("", 0)] += tensor.untyped_storage().nbytes()

    def leave(name: str, _: object) -> None:
        while stack.pop()[0] != name:
            pass

    def enter(name: str, number: int) -> None:
        stack.append((name, number))

    hooks = saved_tensors_hooks(pack, _never)
    with torch.enable_grad(), hooks, FusedAttention(), _follow(replica, enter, leave):
        replica(images)
    return kept


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels compute it, which keep no matrix of weights; meta has none of them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attend(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    is_plain = query.ndim == 4 and query.shape[-1] == value.shape[-1] and not more.get("enable_gqa")
    if not is_plain or dropout_p or (attn_mask is not None and attn_mask.requires_grad):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]
    return output


def _never(_: object) -> Tensor:
    raise AssertionError("there is no backward pass")
