"""What is known of a network's parameters before it is divided: their shapes, their order, and the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from torch import nn

from pretrained.flow import Flow


class Anatomy:
    """What is known of a network's parameters: shapes, owners, and their place in the flow."""

    def __init__(self, network: nn.Module, flow: Flow) -> None:
        self.network, self.flow = network, flow
        self.shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        self.containers = {
            name for name, module in network.named_modules() if next(module.children(), None) is not None
        }

    @cached_property
    def used(self) -> list[str]:
        """The parameters that an output depends on, in the order of the flow."""
        return sorted(self.flow.segments, key=self.order)

    def order(self, name: str) -> tuple[int, int]:
        """When a parameter is first used: by segment, then by the first call of the module around it."""
        calls = self.flow.calls
        called = (calls[module] for module in ancestors(name) if module in calls)
        return self.flow.segments[name], next(called, 0)

    def holds_weight(self, names: Iterable[str]) -> bool:
        """Whether a matrix is among them; norms, biases, scales, tokens and position tables are none."""
        shapes = (self.shapes[name] for name in names)
        return any(shape[0] > 1 and sum(size > 1 for size in shape) > 1 for shape in shapes if shape)

    def grid(self, names: Sequence[str]) -> int:
        """The coarsest grid that the weights among ``names`` leave; a pooled tensor counts where all are.

        Blocks that begin on a finer grid, or are grouped with a layer behind the pooling, are so told right.
        """
        weights = [name for name in names if self.holds_weight([name])] or names
        grids = {self.flow.grids[self.flow.segments[name]] for name in weights}
        return min((grid for grid in grids if grid > 1), default=max(grids))


def ancestors(name: str) -> Iterator[str]:
    """The dotted names above ``name``, nearest first, the root ``""`` last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def owner(name: str) -> str:
    """The module that holds a parameter, by name."""
    return name.rpartition(".")[0]


def find_head(anatomy: Anatomy) -> set[str]:
    """The classifier's parameters: declared by the network, else the last layer executed."""
    declared = getattr(anatomy.network, "get_classifier", None)
    if callable(declared):
        held = {id(parameter) for module in _modules_in(declared()) for parameter in module.parameters()}
        head = {name for name, parameter in anatomy.network.named_parameters() if id(parameter) in held}
        return head | _used_after(anatomy, head)
    return _last_layer(anatomy) if anatomy.flow.is_classifier else set()


def _modules_in(item: object) -> Iterator[nn.Module]:
    if isinstance(item, nn.Module):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _modules_in(part)


def _used_after(anatomy: Anatomy, head: set[str]) -> set[str]:
    """What is first used after the head began: it makes class scores too (VOLO's second classifier)."""
    began = min((anatomy.order(name) for name in anatomy.used if name in head), default=None)
    return {name for name in anatomy.used if began is not None and anatomy.order(name) > began}


def _last_layer(anatomy: Anatomy) -> set[str]:
    """The last executed module that holds a weight, and whatever is used after it (a scale of the logits)."""
    used = anatomy.used
    last = next((name for name in reversed(used) if anatomy.holds_weight([name])), None)
    if last is None:
        return set()
    after = used[used.index(last) :]
    return {name for name in used if owner(name) == owner(last) or name in after}
