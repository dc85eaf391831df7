"""Observe, record and replace the values in a forward pass. All temporary hooks are registered here.

All hooks are removed when the call or the ``with`` block ends, also after an error. They run before the hooks
that others registered on the same modules, so they see what the module itself takes and returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from finetune.errors import InternalError
from pretrained.graph.structures import map_tensors


class FeaturePoint(NamedTuple):
    """The input or the output of one call of a module.

    Attributes:
        module: name of the module, as in ``network.named_modules()``.
        number: how many calls of that module come before this one in a forward pass.
        at_input: the first positional argument of the call; otherwise its return value.
    """

    module: str
    number: int
    at_input: bool

    def __str__(self) -> str:
        again = f" (call {self.number + 1})" if self.number else ""
        return f"{'input of ' if self.at_input else ''}{self.module or 'the network'}{again}"


class FeatureRecorder:
    """Run a network and return what it computes at some points.

    Recorded tensors keep their autograd history if gradients are enabled.

    Args:
        network: takes images (B, C, H, W).
        points: at least one.
        transforms: one function for each point, applied to its value as soon as it is computed; the value
            itself is not kept. A value is a tensor or a nested structure of tensors. By default values are
            copied, because a later operation in place (a ReLU) may overwrite them.
    """

    def __init__(
        self,
        network: nn.Module,
        points: Sequence[FeaturePoint],
        transforms: Sequence[Callable[[Any], Any]] | None = None,
    ) -> None:
        self._network, self._points = network, tuple(points)
        self._transforms = transforms or [copy_tensors] * len(points)

    def record(self, images: Tensor) -> list[Any]:
        """Return the value of each point; the forward pass ends as soon as the last one is computed.

        Raises:
            PointNotReachedError: the forward pass does not reach every point.
        """
        values: dict[int, Any] = {}
        try:
            self._run(images, values, stop_early=True)
        except _StopForward as stopped:
            if stopped.recorder is not self:  # of a recorder around this one
                raise
        return self._in_order(values)

    def record_all(self, images: Tensor) -> tuple[list[Any], Any]:
        """Return the value of each point, and the output of the complete forward pass.

        Raises:
            PointNotReachedError: the forward pass does not reach every point.
        """
        values: dict[int, Any] = {}
        output = self._run(images, values, stop_early=False)
        return self._in_order(values), output

    def _run(self, images: Tensor, values: dict[int, Any], stop_early: bool) -> Any:
        def store(reached: FeaturePoint, value: Any) -> None:
            for index, (point, transform) in enumerate(zip(self._points, self._transforms, strict=True)):
                if point == reached:
                    values[index] = transform(value)
            if stop_early and len(values) == len(self._points):
                raise _StopForward(self)

        with _visit(self._network, self._points, store):
            return self._network(images)

    def _in_order(self, values: Mapping[int, Any]) -> list[Any]:
        missing = [str(point) for index, point in enumerate(self._points) if index not in values]
        if missing:
            found = f"the forward ended without reaching {', '.join(missing)}"
            fix = "Please report this with the backbone's name."
            raise PointNotReachedError("recording features", found, fix)
        return [values[index] for index in range(len(self._points))]


class PointNotReachedError(InternalError):
    """A forward pass that takes another way than the traced one, in another mode for example."""


class _StopForward(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    def __init__(self, recorder: FeatureRecorder) -> None:
        super().__init__()
        self.recorder = recorder


def copy_tensors(value: Any) -> Any:
    """Return a nested structure with every tensor copied."""
    return map_tensors(Tensor.clone, value)


@contextmanager
def replace_value(network: nn.Module, point: FeaturePoint, change: Callable[[Any], Any]) -> Iterator[None]:
    """While the block runs, continue the forward pass with ``change(value)`` in place of a point's value.

    Calls are counted from the start of the block, so the block should hold one forward pass.
    """
    with _visit(network, [point], lambda _, value: change(value)):
        yield


@contextmanager
def _visit(
    network: nn.Module, points: Sequence[FeaturePoint], visit: Callable[[FeaturePoint, Any], Any]
) -> Iterator[None]:
    """Call ``visit(point, value)`` when a point is reached; a result other than None replaces the value."""
    calls: Counter[tuple[str, bool]] = Counter()

    def next_call(name: str, at_input: bool) -> FeaturePoint:
        point = FeaturePoint(name, calls[name, at_input], at_input)
        calls[name, at_input] += 1
        return point

    def before(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        point = next_call(name, at_input=True)
        replaced = visit(point, arguments[0]) if point in points else None
        return None if replaced is None else (replaced, *arguments[1:])

    def after(name: str, output: Any) -> Any:
        point = next_call(name, at_input=False)
        return visit(point, output) if point in points else None

    modules = {point.module: network.get_submodule(point.module) for point in points}
    with observe_calls(modules, before, after):
        yield


@contextmanager
def observe_calls(
    modules: Mapping[str, nn.Module],
    before: Callable[[str, tuple[Any, ...]], Any] | None = None,
    after: Callable[[str, Any], Any] | None = None,
) -> Iterator[None]:
    """Observe every call of some modules while the block runs.

    Args:
        modules: by name.
        before: gets the name and the positional arguments before a call; may return other arguments.
        after: gets the name and the output after a call; may return another output.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                hook = _pre_hook(name, before)
                stack.callback(module.register_forward_pre_hook(hook, prepend=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(_hook(name, after), prepend=True).remove)
        yield


def _pre_hook(name: str, before: Callable[[str, tuple[Any, ...]], Any]) -> Callable[..., Any]:
    return lambda _, arguments: before(name, arguments)


def _hook(name: str, after: Callable[[str, Any], Any]) -> Callable[..., Any]:
    return lambda _, __, output: after(name, output)
