"""A network in two parts, trunk and rest, with ``rest(trunk(x)) == network(x)`` bit for bit.

Nothing of the network is copied or rewritten: both parts are its own forward.

- The *trunk* is the forward, left as soon as the cut is reached.
- The *rest* is the forward as well, with every module call that ended before the cut skipped: it returns an
  empty tensor of the right shape, and what was carried over is put in at the cut.

What the skipped calls return must not reach the output. :func:`split_at` fills it with NaN and looks, in the
modes of training and of evaluation, before a cut is used.

Shape legend: B batch, D numbers that the cut carries for one image.
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
"""Largest difference of logits, as a share of the largest logit. Bit-equal nearly everywhere; some networks
take other kernels where their trunk needs no gradients."""


@dataclass(frozen=True)
class Packing:
    """How what a cut carries lies in one row of numbers for each image.

    Attributes:
        carries: its structure.
        dtypes: of its tensors.
        orders: their axes but the first, from the slowest to the fastest in memory. Kernels are chosen by
            the order (channels-last, say), and with them the last bits.
    """

    carries: Structure
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, cut: Cut, carried: Any) -> Packing:
        """Return the packing for what a trunk gave."""
        tensors = tensors_in(carried)
        return cls(cut.carries, tuple(t.dtype for t in tensors), tuple(_order(t) for t in tensors))

    @property
    def numel(self) -> int:
        """D."""
        return sum(shape.numel for shape in shapes_in(self.carries))

    def pack(self, carried: Any, batch: int) -> Tensor:
        """Return rows (B, D) of what a trunk gave for ``batch`` images."""
        tensors = zip(tensors_in(carried), self.orders, strict=True)
        parts = [tensor.permute(0, *order).reshape(batch, -1) for tensor, order in tensors]
        return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=1)

    def unpack(self, rows: Tensor) -> Any:
        """Return what was carried from rows (B, D); a copy, for what comes next may work in place."""
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
    """The axes but the first as they lie in memory; as they are counted where they do not lie densely."""
    counted, strides = tuple(range(1, tensor.ndim)), tensor.stride()
    order = tuple(sorted(counted, key=lambda axis: -strides[axis]))
    return order if not tensor.is_contiguous() and tensor.permute(0, *order).is_contiguous() else counted


class Trunk:
    """The part of a network above a cut.

    Args:
        network: (B, 3, H, W) -> (B, K).
        cut: where it ends.
    """

    def __init__(self, network: nn.Module, cut: Cut) -> None:
        # No copy: the forward pass ends here, so nothing overwrites the value.
        self._recorder = FeatureRecorder(network, [cut.point], [lambda value: value])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Return what the cut carries for a batch of images.

        Raises:
            PointNotReachedError: the forward pass does not reach the cut.
        """
        [carried] = self._recorder.record(images)
        return carried


class Rest:
    """The part of a network below a cut; it learns, and keeps its modes, with the network itself.

    Args:
        network: (B, 3, H, W) -> (B, K).
        trace: of the network.
        cut: where it begins.
        packing: of the rows that it takes.
        input_size: (C, H, W) of the images.
        filler: what skipped calls return; memory as it comes, since nobody reads it.
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
        """Return the logits (B, K) of what a trunk gave, as rows (B, D)."""
        with self._replayed(self.packing.unpack(rows), len(rows), rows.device):
            dtype = self.packing.dtypes[0] if self.packing.dtypes[0].is_floating_point else torch.float32
            image = self._filler((len(rows), *self._input_size), dtype=dtype, device=rows.device)
            logits: Tensor = self.network(image)
        return logits

    @contextmanager
    def _replayed(self, carried: Any, batch: int, device: torch.device) -> Iterator[None]:
        """Let modules skip their calls above the cut, and take what was carried at it, during the block."""

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
                undo.callback(_give_back_forward, module, vars(module).get("forward"))
                module.forward = _stand_in(module.forward, returns)
            yield


def _give_back_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Undo a stand-in; some modules (timm's FasterNet) choose a forward of their own."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def _stand_in(forward: Callable[..., Any], returns: Mapping[int, Callable[[], Any]]) -> Callable[..., Any]:
    """A forward whose calls of these numbers compute nothing."""
    calls = itertools.count()

    def stand_in(*arguments: Any, **keys: Any) -> Any:
        number = next(calls)
        return returns[number]() if number in returns else forward(*arguments, **keys)

    return stand_in


def _plan_replay(calls: Sequence[Call], cut: Cut) -> tuple[list[tuple[Call, int]], int]:
    """Which calls are skipped: the outermost that end before the cut; those inside of them never happen.

    Returns:
        Each with its number among the calls of its module that do happen, and the number of the cut's own.
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
    raise ValueError(f"{cut.name} is no place of this forward")


class Split:
    """A network cut in two.

    Args:
        network: that is cut.
        trace: of it.
        cut: the place.
        input_size: (C, H, W) of the images.
        packing: of what the cut carries.
    """

    def __init__(
        self, network: nn.Module, trace: Trace, cut: Cut, input_size: tuple[int, int, int], packing: Packing
    ) -> None:
        self._trace, self.cut, self.packing, self._input_size = trace, cut, packing, input_size
        self._trunk = Trunk(network, cut)

    def trunk(self, images: Tensor) -> Tensor:
        """Return rows (B, D) for images (B, C, H, W); the frozen part alone runs, without gradients."""
        return self.packing.pack(self._trunk(images), len(images))

    def rest(self, network: nn.Module, filler: Callable[..., Tensor] = torch.empty) -> Rest:
        """Return the rest of the network, or of a copy of it (an average of its weights)."""
        return Rest(network, self._trace, self.cut, self.packing, self._input_size, filler)


def split_at(
    network: nn.Module, trace: Trace, cut: Cut, images: Tensor, set_train_mode: Callable[[], None]
) -> Split | None:
    """Cut a network in two, and try whether the parts do what the whole does.

    Args:
        network: on its device; its modes and buffers are left as they were.
        trace: of it.
        cut: the place.
        images: (B, C, H, W) a few images to try it on; what they show does not matter.
        set_train_mode: puts the network into the modes of training.

    Returns:
        The parts; None where something goes around the cut, or where what is above it changes in training
        (a dropout, a normalisation that learns).
    """
    with _left_alone(network, images.device), suppress(PointNotReachedError):
        network.eval()
        carried = Trunk(network, cut)(images)
        split = Split(network, trace, cut, tuple(images.shape[1:]), Packing.of(cut, carried))  # type: ignore[arg-type]
        rows = split.packing.pack(carried, len(images))
        for set_mode in (network.eval, set_train_mode):
            set_mode()
            if not _agrees(network, split, images, rows):
                return None
        return split
    return None


def _agrees(network: nn.Module, split: Split, images: Tensor, rows: Tensor) -> bool:
    """Whether the parts, in the modes the network has, give what it gives, and the trunk what it gave."""
    buffers = [buffer.clone() for buffer in network.buffers()]
    state = torch.random.get_rng_state()
    unchanged = torch.equal(split.trunk(images), rows) and torch.equal(torch.random.get_rng_state(), state)
    same = all(map(torch.equal, network.buffers(), buffers))
    if not unchanged or not same:
        return False
    torch.manual_seed(0)
    try:
        parts = split.rest(network, _nan)(rows)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # a forward that looks at what was skipped
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    torch.manual_seed(0)
    whole = network(images)
    if not isinstance(whole, Tensor) or not isinstance(parts, Tensor):
        return False
    difference = (whole - parts).abs().max()
    return bool(difference <= TOLERANCE * whole.abs().max().clamp_min(1e-3))  # NaN is no agreement


def _nan(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(tuple(size), float("nan"), dtype=dtype, device=device)


@contextmanager
def _left_alone(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Give modes, buffers and random states back after the block."""
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
