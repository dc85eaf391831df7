"""Cut a network into trunk and rest, with ``rest(trunk(x)) == network(x)`` bit for bit.

No code or weight of the network is copied: both parts run the network's own forward.

- The *trunk* is a forward pass that ends as soon as it reaches the cut.
- The *rest* is a forward pass in which module calls that end before the cut compute nothing: they return an
  empty tensor of the right shape. The output of the trunk is inserted at the cut.

What the skipped calls return must not affect the output. Before a cut is used, :func:`cut_at` checks this
with NaN as their return value, in training and evaluation mode.

Shape legend: B batch, D elements per image that the trunk passes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrained.graph.cuts import Call, Cut, Trace
from pretrained.graph.recorder import FeaturePoint, FeatureRecorder, PointNotReachedError, replace_value
from pretrained.graph.structures import Shape, Structure, map_tensors, shapes_in, tensors_in

TOLERANCE = 1e-5
"""Largest allowed difference of float32 logits, relative to the largest logit. Most networks are bit-equal;
some use other kernels if their trunk needs no gradients."""
ROUNDINGS = 4
"""The same in mixed precision, in units of its rounding error: other kernels round elsewhere."""


@dataclass(frozen=True)
class Packing:
    """How the tensors that a trunk passes on are stored as one row per image.

    Attributes:
        carries: shapes of the tensors.
        dtypes: dtypes of the tensors.
        orders: their axes without the first, from slowest to fastest in memory. Kernels, and with them the
            last bits of results, depend on the memory order (such as channels-last).
    """

    carries: Structure
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, cut: Cut, carried: Any) -> Packing:
        """Return the packing of a trunk's output."""
        tensors = tensors_in(carried)
        return cls(cut.carries, tuple(t.dtype for t in tensors), tuple(_order(t) for t in tensors))

    @property
    def numel(self) -> int:
        """Length of a row, D."""
        return sum(shape.numel for shape in shapes_in(self.carries))

    def pack(self, carried: Any, batch: int) -> Tensor:
        """Return a trunk's output for ``batch`` images as rows (B, D)."""
        tensors = zip(tensors_in(carried), self.orders, strict=True)
        parts = [tensor.permute(0, *order).reshape(batch, -1) for tensor, order in tensors]
        return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=1)

    def unpack(self, rows: Tensor) -> Any:
        """Return a copy of the trunk's output from rows (B, D); the rest may change it in place."""
        shapes = shapes_in(self.carries)
        columns = torch.split(rows, [shape.numel for shape in shapes], dim=1)
        parts = iter(zip(columns, self.dtypes, self.orders, strict=True))

        def unfold(shape: Shape) -> Tensor:
            column, dtype, order = next(parts)
            size = shape.of(len(rows))
            tensor = column.to(dtype, copy=True).reshape(size[0], *(size[axis] for axis in order))
            return tensor.permute(0, *(order.index(axis) + 1 for axis in range(1, len(size))))

        carried: Any = map_tensors(unfold, self.carries)
        return carried


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The axes without the first in memory order; in their usual order if the tensor is not dense."""
    counted, strides = tuple(range(1, tensor.ndim)), tensor.stride()
    order = tuple(sorted(counted, key=lambda axis: -strides[axis]))
    return order if not tensor.is_contiguous() and tensor.permute(0, *order).is_contiguous() else counted


class Trunk:
    """The part of a network before a cut.

    Args:
        network: (B, 3, H, W) -> (B, K).
        cut: where it ends.
    """

    def __init__(self, network: nn.Module, cut: Cut) -> None:
        # No copy: the forward pass ends here, so nothing overwrites the value.
        self._recorder = FeatureRecorder(network, [cut.point], [lambda value: value])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Return the tensors at the cut for a batch of images.

        Raises:
            PointNotReachedError: the forward pass does not reach the cut.
        """
        [carried] = self._recorder.record(images)
        return carried


class Rest:
    """The part of a network after a cut. It shares weights and modes with the network.

    Args:
        network: (B, 3, H, W) -> (B, K).
        trace: trace of the network.
        cut: where it begins.
        packing: layout of the rows that it takes.
        input_size: (C, H, W) of the images.
        filler: creates the return values of skipped calls; uninitialised memory by default.
    """

    def __init__(
        self,
        network: nn.Module,
        trace: Trace,
        cut: Cut,
        packing: Packing,
        input_size: tuple[int, int, int],
        filler: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.network, self.cut, self.packing = network, cut, packing
        self._input_size, self._filler = input_size, filler
        calls, self._fed = _plan_replay(trace.calls, cut)
        skipped: dict[str, dict[int, Structure]] = {}
        for call, number in calls:
            skipped.setdefault(call.name, {})[number] = call.outputs
        self._cut_module = network.get_submodule(cut.call.name)
        if not cut.at_input:
            skipped.setdefault(cut.call.name, {})
        self._stand_ins = [(network.get_submodule(name), calls) for name, calls in skipped.items()]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return logits (B, K) for a trunk's output as rows (B, D)."""
        with self._replayed(self.packing.unpack(rows), len(rows), rows.device):
            dtype = self.packing.dtypes[0] if self.packing.dtypes[0].is_floating_point else torch.float32
            image = self._filler((len(rows), *self._input_size), dtype=dtype, device=rows.device)
            logits: Tensor = self.network(image)
        return logits

    @contextmanager
    def _replayed(self, carried: Any, batch: int, device: torch.device) -> Iterator[None]:
        """During the block, skip module calls before the cut, and insert the trunk's output at the cut."""

        def fill(shape: Shape) -> Tensor:
            if not shape.dtype.is_floating_point:
                return torch.zeros(shape.of(batch), dtype=shape.dtype, device=device)
            return self._filler(shape.of(batch), dtype=shape.dtype, device=device)

        with ExitStack() as undo:
            if self.cut.at_input:
                place = FeaturePoint(self.cut.call.name, self._fed, True)
                undo.enter_context(replace_value(self.network, place, lambda _: carried))
            for module, skipped in self._stand_ins:
                is_cut = module is self._cut_module and not self.cut.at_input
                returns: dict[int, Callable[[], Any]] = {
                    number: partial(map_tensors, fill, outputs) for number, outputs in skipped.items()
                }
                if is_cut:
                    returns[self._fed] = lambda: carried
                undo.callback(_restore_forward, module, vars(module).get("forward"))
                module.forward = _stand_in(module.forward, returns)
            yield


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Restore the forward of a module; some (timm's FasterNet) have one as an attribute of the instance."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def _stand_in(forward: Callable[..., Any], returns: Mapping[int, Callable[[], Any]]) -> Callable[..., Any]:
    """A forward whose calls with these numbers return a given value and compute nothing."""
    calls = itertools.count()

    def stand_in(*arguments: Any, **keys: Any) -> Any:
        number = next(calls)
        return returns[number]() if number in returns else forward(*arguments, **keys)

    return stand_in


def _plan_replay(calls: Sequence[Call], cut: Cut) -> tuple[list[tuple[Call, int]], int]:
    """Return the calls to skip: the outermost ones that end before the cut. Calls inside them do not happen.

    Returns:
        Each with its number among the calls of its module that happen, and the number of the cut's own call.
    """
    happened: dict[str, int] = {}
    skipped: list[tuple[Call, int]] = []
    inside_until = -1
    for call in calls:
        if call.began <= inside_until:
            continue
        number = happened.get(call.name, 0)
        if call is cut.call:
            return skipped, number
        happened[call.name] = number + 1
        if call.ended < cut.time:
            inside_until = call.ended
            skipped.append((call, number))
    raise ValueError(f"{cut.name} is not a call of this forward pass")


class CutNetwork:
    """A network cut in two.

    Args:
        network: the complete network.
        trace: trace of the network.
        cut: where it is cut.
        input_size: (C, H, W) of the images.
        packing: layout of the trunk's output as rows.
    """

    def __init__(
        self, network: nn.Module, trace: Trace, cut: Cut, input_size: tuple[int, int, int], packing: Packing
    ) -> None:
        self._trace, self.cut, self.packing, self._input_size = trace, cut, packing, input_size
        self._trunk = Trunk(network, cut)

    def trunk(self, images: Tensor) -> Tensor:
        """Return rows (B, D) for images (B, C, H, W); only the trunk runs, without gradients."""
        # len() would fix the batch size of a traced trunk.
        return self.packing.pack(self._trunk(images), images.shape[0])

    def rest(self, network: nn.Module, filler: Callable[..., Tensor] = torch.empty) -> Rest:
        """Return the rest of the network, or of a copy of it with other weights (EMA)."""
        return Rest(network, self._trace, self.cut, self.packing, self._input_size, filler)


def cut_at(
    network: nn.Module, trace: Trace, cut: Cut, images: Tensor, set_train_mode: Callable[[], None]
) -> CutNetwork | None:
    """Cut a network in two, and check that the parts compute what the network computes.

    Args:
        network: on its device; its modes and buffers do not change.
        trace: trace of the network.
        cut: where to cut.
        images: a few images (B, C, H, W) for the check, of any content.
        set_train_mode: sets the network's modes for training.

    Returns:
        The parts; None if something bypasses the cut, or if the trunk's output differs in training (dropout,
        a batch norm in training mode).
    """
    with _preserved(network, images.device), suppress(PointNotReachedError):
        network.eval()
        carried = Trunk(network, cut)(images)
        cut_network = CutNetwork(network, trace, cut, tuple(images.shape[1:]), Packing.of(cut, carried))  # type: ignore[arg-type]
        rows = cut_network.packing.pack(carried, len(images))
        for set_mode in (network.eval, set_train_mode):
            set_mode()
            if not _agrees(network, cut_network, images, rows):
                return None
        return cut_network
    return None


def _agrees(network: nn.Module, cut_network: CutNetwork, images: Tensor, rows: Tensor) -> bool:
    """Whether, in the network's current modes, the parts give its output and the trunk gives ``rows``."""
    buffers = [buffer.clone() for buffer in network.buffers()]
    state = torch.random.get_rng_state()
    unchanged = torch.equal(cut_network.trunk(images), rows) and torch.equal(
        torch.random.get_rng_state(), state
    )
    same = all(map(torch.equal, network.buffers(), buffers))
    if not unchanged or not same:
        return False
    torch.manual_seed(0)
    try:
        parts = cut_network.rest(network, _nan)(rows)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # the forward reads what a skipped call returned
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    torch.manual_seed(0)
    whole = network(images)
    if not isinstance(whole, Tensor) or not isinstance(parts, Tensor):
        return False
    whole, parts = whole.float(), parts.float()
    difference = (whole - parts).abs().max()
    allowed = _tolerance(images.device) * whole.abs().max().clamp_min(1e-3)
    return bool(difference <= allowed)  # NaN is no agreement


def _tolerance(device: torch.device) -> float:
    """Return the largest allowed difference in the precision of the surrounding autocast."""
    if not torch.is_autocast_enabled(device.type):
        return TOLERANCE
    return max(TOLERANCE, ROUNDINGS * torch.finfo(torch.get_autocast_dtype(device.type)).eps)


def _nan(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(tuple(size), float("nan"), dtype=dtype, device=device)


@contextmanager
def _preserved(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore modes, buffers and random states after the block."""
    modes = {module: module.training for module in network.modules()}
    buffers = [buffer.clone() for buffer in network.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, before in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(before)
            for module, mode in modes.items():
                module.training = mode
