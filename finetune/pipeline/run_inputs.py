"""What a run starts from: the images, and the card of the backbone with the preprocessing for them."""

from __future__ import annotations

from pathlib import Path

from finetune.data.channels.bands import check_takes, measure_channels
from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.data.tables.config import TableConfig
from finetune.errors import UsageError
from finetune.features.network import fetch, resolve_preprocessing, take_channels
from finetune.recipe import Recipe
from finetune.system.display import Display
from pretrained.catalog import Card, find_card


def find_run_inputs(recipe: Recipe, display: Display) -> tuple[Dataset, Card]:
    """Return the images, and the card of the backbone for them; fetch its weights where they are not here."""
    dataset = find_run_images(recipe, display)
    card = find_card(str(recipe.backbone.name), recipe.backbone.offline)
    view = resolve_preprocessing(take_channels(recipe, dataset), card)
    card = card.with_input(view)
    check_takes(card, dataset)
    card = card.with_input(measure_channels(view, dataset, display))
    if not recipe.strategy.starts_random and not recipe.backbone.weights:
        fetch(card, recipe.backbone.offline, display)
    return dataset, card


def find_run_images(recipe: Recipe, display: Display) -> Dataset:
    """Return the images of a run as its data lay them out, with labels and splits."""
    with display.count(f"reading {recipe.data.path}") as on_progress:
        path, config = Path(recipe.data.path or ""), SplitConfig.of(recipe)
        return discover(path, config, recipe.data.follow_links, on_progress, table=TableConfig.of(recipe))


def check_target(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse settings that the labels do not have.

    Raises:
        UsageError: classes are weighted, smoothed or mixed, and labels are numbers; or the Huber loss is
            asked for, and labels are classes or a solver has its own loss.
    """
    training, target = recipe.training, dataset.target
    asked = {
        "training.class_weights": training.class_weights != "none",
        "training.label_smoothing": training.label_smoothing > 0,
        "training.mixup": training.mixup > 0,
        "training.cutmix": training.cutmix > 0,
    }
    key = next((key for key, is_set in asked.items() if is_set), None)
    if key is not None and not target.has_classes:
        raise UsageError(key, "labels are numbers, and have no classes", "Leave it out.")
    if training.huber_delta is None:
        return
    if target.has_classes:
        raise UsageError("training.huber_delta", "labels are classes, and no numbers", "Leave it out.")
    if recipe.strategy.features is not None:
        found = "strategy.features solves ridge regression, which squares every error"
        raise UsageError("training.huber_delta", found, "Drop one of the two.")


def limit_augmentation(recipe: Recipe, card: Card, display: Display) -> Recipe:
    """Return the recipe without the augmentation that only photographs, or only images, have."""
    asked, kind = recipe.input.augmentation, card.preprocessing.kind
    taken = {"array": ("none",), "bands": ("light", "shift", "none")}.get(kind, (asked,))
    if asked in taken:
        return recipe
    what = "arrays" if kind == "array" else "other channels than RGB"
    display.say(f"input.augmentation {asked} is {_AUGMENTED[asked]}: {taken[0]} for {what}")
    return recipe.model_copy(update={"input": recipe.input.model_copy(update={"augmentation": taken[0]})})


_AUGMENTED = {
    "shift": "for images",
    "light": "for images",
    "medium": "for RGB (TrivialAugment)",
    "heavy": "for RGB (RandAugment, random erasing)",
}
"""What augmentation is for, and what is left out with it."""
