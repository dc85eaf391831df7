"""Which backbone a command works with when none was named."""

from __future__ import annotations

from pathlib import Path

from finetune.display import Display
from finetune.errors import FinetuneError, UsageError
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.schema import BackboneSettings
from finetune.runs.folder import RunFolder
from finetune.runtime import resolve_device
from finetune.strategies import starts_random
from pretrained.present import Choice, choose_best

_SHOWN = 3
"""Backbones that were passed over, of those that are shown."""


def name_backbone(recipe: Recipe, output: Path | None, display: Display) -> Recipe:
    """Return the recipe with a backbone: the one that was named, that the run began with, or the best here.

    Args:
        recipe: what was asked for.
        output: the run folder, if one was named. A run that was begun keeps its backbone and its weights,
            whatever has been fetched since.
        display: is told which it is.

    Raises:
        UsageError: weights were named, and no network that they belong to; or nothing says which network is
            to be trained from random weights.
    """
    asked = recipe.backbone
    if asked.name:
        return recipe
    began = _read_begun(output)
    if began is not None:
        update = {"name": began.name, "weights": asked.weights or began.weights}
        return recipe.model_copy(update={"backbone": asked.model_copy(update=update)})
    _check_choosable(recipe)
    with display.busy("looking for weights on this machine"):
        choice = choose_best(resolve_device(recipe.device).type == "cuda")
    display.say(f"no backbone was named: {choice.best.card.name}, {_describe(choice)}")
    backbone = asked.model_copy(update={"name": choice.best.card.name})
    return recipe.model_copy(update={"backbone": backbone})


def _check_choosable(recipe: Recipe) -> None:
    fix = "Add --backbone NAME (see `finetune backbones`)."
    if recipe.backbone.weights:
        found = "no backbone was named that they belong to"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, fix)
    if starts_random(recipe.strategy.name):
        found = "no backbone was named, and what weights there are says nothing of what to train without any"
        raise UsageError(f"--strategy {recipe.strategy.name}", found, fix)


def _read_begun(output: Path | None) -> BackboneSettings | None:
    """The backbone of a run that was begun in this folder."""
    if output is None or not RunFolder(output).recipe.is_file():
        return None
    try:
        began = load_recipe(str(RunFolder(output).recipe)).backbone
    except (FinetuneError, OSError):  # the claim refuses a damaged one, in its own words
        return None
    return began if began.name else None


def _describe(choice: Choice) -> str:
    """Say why it is this one, and which others are here."""
    if choice.best.accuracy is not None:
        reason = f"the best whose weights are on this machine ({choice.best.accuracy:.1f} % on ImageNet)"
    elif choice.passed_over:
        reason = "which comes with the installation"
    else:
        return "which comes with the installation (`finetune pull NAME` fetches a larger one)"
    if not choice.passed_over:
        return reason
    shown = [f"{card.name} ({why})" for card, why in choice.passed_over[:_SHOWN]]
    more = [f"{len(choice.passed_over) - _SHOWN} more"] if len(choice.passed_over) > _SHOWN else []
    return f"{reason}; here too, if you name it: {', '.join([*shown, *more])}"
