"""The kernels of a convolution: as images where they look at colours, as norms elsewhere.

Shape legend: O output channels, I input channels of each group, k l height and width of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from finetune.errors import UsageError, suggest

_DEAD = 1e-3
"""A filter is dead if its norm is below this share of the median one: weight decay has removed it."""


@dataclass(frozen=True)
class Filters:
    """The filters of a convolution, on the CPU.

    Attributes:
        kernels: (O, I, k, l) float32.
        norms: (O, I), the Euclidean norm of each kernel.
    """

    kernels: Tensor
    norms: Tensor

    @property
    def is_picture(self) -> bool:
        """Whether a filter can be drawn as it is: it reads three colours, or one channel."""
        return self.kernels.shape[1] in (1, 3) and self.kernels.shape[2:].numel() > 1

    @property
    def strengths(self) -> Tensor:
        """(O,), the norm of each filter."""
        return self.norms.square().sum(dim=1).sqrt()

    @property
    def is_dead(self) -> Tensor:
        """(O,) bool, whether a filter is zero beside the others."""
        return self.strengths <= _DEAD * self.strengths.median()

    @property
    def num_dead(self) -> int:
        """Number of filters that are zero beside the others."""
        return int(self.is_dead.sum())

    def order(self) -> list[int]:
        """Return the filters by their norms, the largest first."""
        return [int(index) for index in self.strengths.argsort(descending=True, stable=True)]


def find_convolution(network: nn.Module, name: str | None) -> tuple[str, nn.Conv2d]:
    """Return a convolution and its name.

    Args:
        network: it does not change.
        name: name of a module; None for the first convolution.

    Raises:
        UsageError: there is no such module (the message lists similar names), it is no convolution, or the
            network has none.
    """
    modules = dict(network.named_modules())
    convolutions = {key: module for key, module in modules.items() if isinstance(module, nn.Conv2d)}
    if name is None:
        for first, convolution in convolutions.items():
            return first, convolution
        found = f"{type(network).__name__} has no convolution"
        raise UsageError("the filters of a network", found, "Name another model.")
    if name in convolutions:
        return name, convolutions[name]
    inside = [key for key in convolutions if key.startswith(f"{name}.")]
    if name in modules:
        found = f"it is no convolution, but {type(modules[name]).__name__}"
        fix = f"Take one inside it: {', '.join(inside[:3])}." if inside else "Name a convolution."
        raise UsageError(f"--layer {name}", found, fix)
    found = f"there is no such convolution{suggest(name, convolutions)}"
    raise UsageError(f"--layer {name}", found, "`finetune extract --layers list` shows the modules.")


def read_filters(convolution: nn.Conv2d) -> Filters:
    """Return the filters of a convolution."""
    kernels = convolution.weight.detach().float().cpu()
    return Filters(kernels, kernels.flatten(2).norm(dim=2))
