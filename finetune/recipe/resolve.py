"""Resolve a recipe: replace every ``"auto"`` by a value from the machine, the backbone and the data.

The result has a type whose fields admit no ``"auto"``: code that takes a :class:`ResolvedRecipe` need not ask
whether a value is decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.recipe.reading import set_dotted, validate
from finetune.recipe.schema import Recipe
from finetune.recipe.sections import (
    Augmentation,
    CacheSettings,
    DataSettings,
    InputSettings,
    Precision,
    Resize,
    Runtime,
    StrategySettings,
    TrainingSettings,
)
from finetune.strategies import find_strategy
from finetune.targets import TargetKind

BASE_LRS = {"sgd": 0.01, "adamw": 0.001}
"""Learning rate of a new head if ``training.lr`` is auto. SGD: the lectures' example (0.01 for the head,
0.001 for the top, 0.0001 below). AdamW normalises its steps and usually starts from a tenth of that
(Loshchilov and Hutter, arXiv:1711.05101)."""


EPOCHS_PER_VIEW = 2.5
"""Epochs that a cached view must serve. It costs one pass of the trunk, and saves one in each of these epochs
but one: a view for each epoch would save nothing. Chosen so that ten epochs, the default, have four views."""


@dataclass(frozen=True)
class AutoValues:
    """Values that the machine, the backbone and the data give to keys that are ``"auto"``.

    Attributes:
        device: device with its index, such as ``cuda:0``.
        precision: number format of the forward pass.
        channels_last: memory layout.
        workers: number of decoding processes.
        num_train: number of training images.
        preprocessing: values of the section ``input`` that belong to the weights, by key.
        dropout: dropout probability of the network.
        runtime: what computes cached features.
        target: what the labels are.
    """

    device: str
    precision: Precision
    channels_last: bool
    workers: int
    num_train: int
    preprocessing: Mapping[str, Any]
    dropout: float
    runtime: Runtime
    target: TargetKind


class ResolvedData(DataSettings):
    """The section ``data`` without ``"auto"``."""

    workers: int
    target: TargetKind


class ResolvedInput(InputSettings):
    """The section ``input`` without ``"auto"``."""

    img_size: int | tuple[int, int]
    crop_pct: float
    resize: Resize
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    channels: Literal["rgb", "grey", "array"] | int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ResolvedStrategy(StrategySettings):
    """The section ``strategy`` without ``"auto"``."""

    norm: Literal["train", "eval"]
    dropout: float


class ResolvedTraining(TrainingSettings):
    """The section ``training`` without ``"auto"``."""

    batch_size: int
    lr: float
    precision: Precision
    channels_last: bool


class ResolvedCache(CacheSettings):
    """The section ``cache`` without ``"auto"``."""

    views: int


class ResolvedRecipe(Recipe):
    """A recipe in which nothing is left to decide: what a run uses, and saves."""

    data: ResolvedData
    input: ResolvedInput
    strategy: ResolvedStrategy
    training: ResolvedTraining
    cache: ResolvedCache
    budget: None = None
    runtime: Runtime


def resolve_recipe(recipe: Recipe, facts: AutoValues) -> ResolvedRecipe:
    """Return a new recipe without any ``"auto"``."""
    decided = {
        "data.workers": facts.workers,
        "data.target": facts.target,
        "strategy.norm": recipe.strategy.norm_mode,
        "strategy.dropout": facts.dropout,
        "training.batch_size": compute_batch_size(facts.num_train),
        "training.lr": BASE_LRS[recipe.training.optimizer],
        "training.precision": facts.precision,
        "training.channels_last": facts.channels_last,
        "cache.views": compute_views(recipe.strategy.name, recipe.input.augmentation, recipe.training.epochs),
        **{f"input.{key}": value for key, value in facts.preprocessing.items()},
        "device": facts.device,
        "runtime": facts.runtime,
    }
    values = recipe.to_dict()
    for key in {*recipe.auto_keys(), "device"}:  # "cuda" becomes "cuda:0" as well
        set_dotted(values, key, decided[key])
    values["budget"] = None  # it has chosen this recipe, or had no part in it
    return ResolvedRecipe.model_validate(validate(values).model_dump())


def compute_views(strategy: str, augmentation: Augmentation, epochs: int) -> int:
    """Return how many random views of a training image to cache (docs/cache.md).

    They follow from the recipe alone, not from a clock, so that the same recipe gives the same bits.
    """
    if augmentation == "none":
        return 1
    return max(1, min(find_strategy(strategy).views, int(epochs / EPOCHS_PER_VIEW)))


def compute_batch_size(num_train: int) -> int:
    """Return the images per step: small data sets get small batches, so that an epoch has enough steps."""
    if num_train < 1_000:
        return 16
    return 32 if num_train < 10_000 else 64
