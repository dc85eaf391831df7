"""Which backbone a command works with when none was named."""

from __future__ import annotations

from pathlib import Path

from finetune.display import Display
from finetune.errors import FinetuneError, UsageError
from finetune.recipe import Recipe, load_recipe
from finetune.runs.folder import RunFolder
from finetune.runtime import resolve_device
from pretrained.present import Present, choose_best


def name_backbone(recipe: Recipe, output: Path | None, display: Display) -> Recipe:
    """Return the recipe with a backbone: the one that was named, that the run began with, or the best here.

    Args:
        recipe: what was asked for.
        output: the run folder, if one was named. A run that was begun keeps its backbone, whatever has been
            downloaded since.
        display: is told which it is.

    Raises:
        UsageError: weights were named, and no network that they belong to.
    """
    if recipe.backbone.name:
        return recipe
    if recipe.backbone.weights:
        found = "no backbone was named that they belong to"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, "Add --backbone NAME.")
    name = _read_name(output)
    if name is None:
        with display.busy("looking for weights on this machine"):
            best = choose_best(resolve_device(recipe.device).type == "cuda")
        name = best.card.name
        display.say(f"no backbone was named: {name}, {_describe(best)}")
    return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"name": name})})


def _read_name(output: Path | None) -> str | None:
    """The backbone of a run that was begun in this folder."""
    if output is None or not RunFolder(output).recipe.is_file():
        return None
    try:
        return load_recipe(str(RunFolder(output).recipe)).backbone.name
    except (FinetuneError, OSError):  # the claim refuses a damaged one, in its own words
        return None


def _describe(best: Present) -> str:
    if best.is_bundled:
        return "which comes with the installation (`finetune pull NAME` fetches a larger one)"
    return f"the best whose weights are on this machine ({best.accuracy:.1f} % on ImageNet)"
