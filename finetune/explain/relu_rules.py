"""Other backward rules for ReLU: the deconvolutional network and guided backpropagation.

==========  =====================================  =======================================
rule        backward through y = ReLU(x)           source
==========  =====================================  =======================================
deconv      g where g > 0                          Zeiler and Fergus, arXiv:1311.2901
guided      g where g > 0 and x > 0                Springenberg et al., arXiv:1412.6806
==========  =====================================  =======================================

Every ReLU is exchanged, be it a module or a function, in place or not, with an upper bound (ReLU6) or
without. A hook on modules, as in most libraries, misses functions: the result is then the plain gradient,
without any sign of it. Both rules are defined for ReLU only; :class:`ReluRule` counts other activations so
that the caller can refuse them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rule = Literal["deconv", "guided"]

_RELU = {F.relu, torch.relu, Tensor.relu}
_RELU_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}
_CLAMP = {torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min, torch.clip, Tensor.clip}
_OTHER = {
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.leaky_relu,
    F.leaky_relu_,
    F.prelu,
    F.elu,
    F.elu_,
    F.celu,
    F.selu,
    F.softplus,
    F.softsign,
    F.tanh,
    torch.tanh,
    Tensor.tanh,
    torch.maximum,  # the activation after a filter response normalisation
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.scaled_dot_product_attention,
}
"""Activations, and attention, for which the rules are not defined. Sigmoid is not among them: beside ReLU it
is the gate of a squeeze-and-excitation, whose gradient passes."""


class ReluRule(TorchFunctionMode):
    """While the block runs, every ReLU that takes part in a gradient gets another backward rule.

    The forward pass does not change. The rule stays with the autograd graph after the block.

    Args:
        rule: the backward rule.

    Attributes:
        num_relus: number of ReLUs that were called.
        others: number of calls of each other activation, by name.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self._rule = rule
        self.num_relus = 0
        self.others: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Exchange a call of ReLU; run every other function as it is."""
        kwargs = dict(kwargs or {})
        if not (args and isinstance(args[0], Tensor) and args[0].requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        bounds = _bounds_of(func, args[1:], kwargs)
        if bounds is None:
            if func in _OTHER or func in (F.hardtanh, F.hardtanh_):
                self.others[func.__name__.rstrip("_")] += 1
            return func(*args, **kwargs)
        self.num_relus += 1
        most, in_place = bounds
        return _Rectify.apply(args[0], self._rule, most, in_place)


def _bounds_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float | None, bool] | None:
    """Return upper bound and whether it works in place, if a call is a ReLU; None if it is not."""

    def argument(number: int, name: str, default: Any) -> Any:
        return args[number] if len(args) > number else kwargs.get(name, default)

    if func in _RELU_IN_PLACE:
        return None, True
    if func in _RELU:
        return None, bool(argument(0, "inplace", False))
    if func is F.relu6:
        return 6.0, bool(argument(0, "inplace", False))
    if func in (F.hardtanh, F.hardtanh_) and argument(0, "min_val", -1.0) == 0:
        in_place = func is F.hardtanh_ or bool(argument(2, "inplace", False))
        return float(argument(1, "max_val", 1.0)), in_place
    # A clamp with both bounds is part of a gate, such as that of a hard swish.
    if func in _CLAMP and argument(0, "min", None) == 0 and argument(1, "max", None) is None:
        return None, False
    return None


class _Rectify(torch.autograd.Function):
    """min(max(x, 0), most), with another backward rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, most: float | None, in_place: bool) -> Tensor:
        """Return the rectified tensor; in place, since a caller may ignore what ``relu_`` returns."""
        ctx.rule = rule
        if rule == "guided":
            ctx.save_for_backward(x > 0 if most is None else (x > 0) & (x < most))
        if in_place:
            ctx.mark_dirty(x)
            return x.clamp_(0, most)
        return x.clamp(0, most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the part of the gradient that passes."""
        passed = gradient.clamp(min=0)
        if ctx.rule == "guided":
            passed = passed * ctx.saved_tensors[0]
        return passed, None, None, None
