"""``--strategy auto`` in a run: decided once, and then a recipe like any other."""

from __future__ import annotations

from pathlib import Path

from finetune.display import Display
from finetune.errors import FinetuneError, UsageError
from finetune.job.advise import Advice, advise
from finetune.job.verify import verify
from finetune.recipe import Recipe, StrategySettings, load_recipe
from finetune.runs.folder import RunFolder

_DECIDED = ("features", "probe_first", "floor")
"""Keys of the section ``strategy`` that are the advice's to set."""


def choose_strategy(recipe: Recipe, output: Path | None, display: Display) -> tuple[Recipe, Advice | None]:
    """Return the recipe with a strategy, and the advice that led to it.

    A run that was begun before keeps its strategy; no advice comes with it then.

    Raises:
        UsageError: keys are given that are the advice's to set.
        FinetuneError: as ``advise``.
    """
    for key in _DECIDED:
        if (value := getattr(recipe.strategy, key)) != getattr(StrategySettings(), key):
            found = "--strategy auto decides that itself"
            raise UsageError(f"strategy.{key}={value}", found, "Drop the key, or name the strategy.")
    if recipe.strategy.head == "keep":
        found = "--strategy auto begins with a new linear classifier"
        raise UsageError("strategy.head=keep", found, "Name the strategy: --strategy top, say.")
    before = _read_strategy(output)
    if before is not None:
        return recipe.model_copy(update={"strategy": before}), None
    advice = advise(recipe, display)
    if recipe.advise.verify:
        advice = verify(recipe, advice, display)
    for reason in advice.decision.reasons:
        display.say(f"  {reason}")
    for warning in advice.decision.warnings:
        display.warn(warning)
    strategy = recipe.strategy.model_copy(update=dict(advice.decision.keys))
    chosen = ", ".join(f"{key} {value}" for key, value in advice.decision.keys.items())
    display.say(f"strategy: {chosen}", style="bold")
    return recipe.model_copy(update={"strategy": strategy}), advice


def _read_strategy(output: Path | None) -> StrategySettings | None:
    folder = RunFolder(output) if output is not None else None
    try:
        saved = load_recipe(str(folder.recipe)) if folder is not None and folder.recipe.exists() else None
    except (FinetuneError, OSError):  # the claim refuses a damaged one, in its own words
        return None
    return saved.strategy if saved is not None else None
