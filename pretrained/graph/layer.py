"""A place in a network whose features are taken, and how to read what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pretrained.graph.pooling import Form, Pool


class TapPoint(NamedTuple):
    """A place in a network: a call of a module, and whether what it takes is meant or what it returns."""

    module: str
    number: int
    at_input: bool


@dataclass(frozen=True)
class Layer:
    """A place in a network, and how to read what is there.

    Attributes:
        name: that users and tables know it by.
        module: whose call it is.
        number: of that call; how many came before it.
        at_input: what the call takes, and not what it returns.
        forms: of its tensors; more than one in networks with parallel branches.
        share: of the network's multiplications that are done by then, in [0, 1].
        has_token: the network's classifier reads a class token (``auto`` takes it).
    """

    name: str
    module: str
    number: int
    at_input: bool
    forms: tuple[Form, ...]
    share: float
    has_token: bool

    @property
    def point(self) -> TapPoint:
        """Its place in the network."""
        return TapPoint(self.module, self.number, self.at_input)

    def pool_of(self, pool: Pool) -> Pool:
        """Return what ``auto`` means here."""
        if pool != "auto":
            return pool
        return "token" if self.has_token and all(form.prefix for form in self.forms) else "avg"

    def num_features(self, pool: Pool) -> int:
        """Return how many numbers an image gets."""
        return sum(form.num_features(self.pool_of(pool)) for form in self.forms)

    @property
    def size(self) -> str:
        """What it gives for one image, for people: ``512x7x7``, ``197x192``, ``512``."""
        return " + ".join(_describe(form) for form in self.forms)


def _describe(form: Form) -> str:
    if form.order == "vector" or form.size is None:
        return str(form.width)
    if form.order == "tokens":
        return f"{form.num_positions + form.prefix}x{form.width}"
    return f"{form.width}x{form.size[0]}x{form.size[1]}"
