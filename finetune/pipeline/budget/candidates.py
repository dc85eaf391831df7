"""What a budget chooses among: a backbone at an input size, and what is learned on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.pipeline.rule import CELLS
from finetune.recipe import Recipe
from pretrained.catalog import Card, find_card
from pretrained.default_backbone import find_local, no_weights_error
from pretrained.published import published_accuracy

SIZES = (1.0, 5 / 7, 3 / 7)
"""Input sizes, as shares of the side that the weights were trained with: of 224 pixels 224, 160 and 96. The
work goes with the square: 1, 0.51 and 0.18."""
_STEP = 32
"""Smaller sizes are multiples of this: the stride of most networks."""
MOST_BACKBONES = 8
"""Most backbones that are tried where none is named: those with the highest accuracy on ImageNet."""
_FINE_TUNED = {name: cell for cell in CELLS.values() if (name := cell.name) != "freeze"}
FINE_TUNED = tuple(reversed(_FINE_TUNED))
"""Strategies that train from the solved classifier on (LP-FT, arXiv:2202.10054), the dearer first."""

Side = int | tuple[int, int]


@dataclass(frozen=True)
class View:
    """A backbone at an input size.

    Attributes:
        backbone: its name, as ``--backbone`` takes it.
        img_size: in pixels: one side, or height and width.
    """

    backbone: str
    img_size: Side

    @property
    def size_name(self) -> str:
        """The input size for messages: ``160``, or ``160x96``."""
        return str(self.img_size) if isinstance(self.img_size, int) else "{}x{}".format(*self.img_size)

    @property
    def rank(self) -> tuple[int, str]:
        """Order of inputs with equal scores: the smaller one wins, whatever their times were."""
        return (
            self.img_size**2 if isinstance(self.img_size, int) else math.prod(self.img_size)
        ), self.backbone

    @property
    def name(self) -> str:
        """The name for messages: ``timm/resnet18 at 160 px``."""
        return f"{self.backbone} at {self.size_name} px"

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe keys that give it."""
        return {"backbone.name": self.backbone, "input.img_size": self.img_size}


@dataclass(frozen=True)
class Candidate:
    """A view and what is learned on it.

    Attributes:
        view: the backbone at its input size.
        strategy: ``freeze`` (a solved linear classifier), ``top`` or ``full``.
        features: features of the solved classifier, ``last`` or ``all``.
        epochs: epochs of training; 0 if the classifier is solved.
    """

    view: View
    strategy: str
    features: str
    epochs: int = 0

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"{self.view.name}, {self.what}"

    @property
    def what(self) -> str:
        """What learns: ``classifier on all stages``, or ``full, 5 epochs``."""
        if self.strategy == "freeze":
            return f"classifier on {'the last features' if self.features == 'last' else 'all stages'}"
        return f"{self.strategy}, {self.epochs} epochs"

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe keys that train it.

        The last epoch counts, so that validation images choose nothing. The top is trained on features of
        unchanged images, since the trunk then runs once.
        """
        if self.strategy == "freeze":
            return self.view.keys | {"strategy.name": "freeze", "strategy.features": self.features}
        cell = {f"strategy.{key}": value for key, value in _FINE_TUNED[self.strategy].keys.items()}
        keys = self.view.keys | cell | {"strategy.name": self.strategy, "strategy.probe_first": True}
        keys |= {"training.epochs": self.epochs, "training.monitor": "last"}
        return keys | {"input.augmentation": "none"} if self.strategy == "top" else keys


def find_views(recipe: Recipe) -> list[View]:
    """Return the views that a recipe leaves open, the best backbone and its own size first.

    Raises:
        UsageError: there is no such backbone.
        EnvironmentFaultError: none is named, and no weights are on this machine.
    """
    if named := recipe.backbone.name:
        return [View(named, size) for size in _list_sizes(recipe, find_card(named, recipe.backbone.offline))]
    cards = _rank_local()[:MOST_BACKBONES]
    if not cards:
        raise no_weights_error()
    return [View(card.name, size) for card in cards for size in _list_sizes(recipe, card)]


def _rank_local() -> Sequence[Card]:
    """Return the backbones whose weights are on this machine, by published accuracy; unknown ones last."""
    return sorted(find_local(), key=lambda card: (-(published_accuracy(card) or 0.0), card.name))


def _list_sizes(recipe: Recipe, card: Card) -> Iterator[Side]:
    """Yield the size that the recipe gives, or that of the weights and smaller ones, the largest first."""
    if recipe.input.img_size != "auto":
        yield recipe.input.img_size
        return
    own = card.preprocessing.size
    sizes = [own, *(_shrink(own, share) for share in SIZES[1:])]
    for height, width in dict.fromkeys(sizes):
        if height * width <= own[0] * own[1]:
            yield height if height == width else (height, width)


def _shrink(size: Sequence[int], share: float) -> tuple[int, int]:
    height, width = (max(_STEP, round(side * share / _STEP) * _STEP) for side in size)
    return height, width
