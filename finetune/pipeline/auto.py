"""``--strategy auto``: choose the strategy of a run once, and write the advice to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.pipeline.advise import Advice, advise
from finetune.pipeline.rule import CELLS
from finetune.plots.features import draw_probe, draw_strategy_matrix
from finetune.recipe import Recipe, StrategySettings, flatten, load_recipe
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.reader import RunReader
from finetune.system.display import Display
from finetune.targets import METRIC_NAMES

_DECIDED = ("features", "probe_first", "floor", "head_factor", "body_factor")
"""Keys of the section ``strategy`` that the advice sets."""


def choose_strategy(recipe: Recipe, output: Path | None, display: Display) -> tuple[Recipe, Advice | None]:
    """Return the recipe with a strategy, and the advice that chose it.

    A run that resumes keeps its strategy; the advice is None then.

    Raises:
        UsageError: keys are given that the advice sets.
        FinetuneError: as ``advise``.
    """
    for key in _DECIDED:
        if (value := getattr(recipe.strategy, key)) != getattr(StrategySettings(), key):
            found = "--strategy auto sets this key itself"
            raise UsageError(f"strategy.{key}={value}", found, "Drop the key, or name the strategy.")
    if recipe.strategy.head != "replace":
        found = "--strategy auto puts a new linear classifier on the unchanged network"
        fix = "Name a strategy, for example --strategy top."
        raise UsageError(f"strategy.head={recipe.strategy.head}", found, fix)
    before = _read_keys(output)
    if before is not None:
        return _with_keys(recipe, before), None
    advice = advise(recipe, display, output)
    for reason in advice.decision.reasons:
        display.say(f"  {reason}")
    for warning in advice.decision.warnings:
        display.warn(warning)
    display.say(f"strategy: {describe_keys(advice.decision.keys)}", style="bold")
    return _with_keys(recipe, advice.decision.keys), advice


def describe_keys(keys: Mapping[str, Any]) -> str:
    """Return the keys as one line, such as ``freeze, features last``."""
    others = [f"{key} {value}" for key, value in keys.items() if key != "name"]
    return ", ".join([str(keys["name"]), *others])


def _with_keys(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    changes = {f"strategy.{key}": value for key, value in keys.items()}
    return load_recipe(None, dict(flatten(recipe.to_dict())) | changes)


def _read_keys(output: Path | None) -> Mapping[str, Any] | None:
    """Return the strategy keys from the advice of an existing run folder; None if there are none."""
    if output is None:
        return None
    keys = RunReader(RunFolder(output), tolerant=True).advice.get("strategy")
    return keys if isinstance(keys, dict) and "name" in keys else None


# --- the files of an advice: advice.json, probe.png and matrix.png --------------------------------


def write_advice(advice: Advice, output: Path) -> None:
    """Write the advice into a new folder.

    Raises:
        UsageError: the folder exists already.
        DiskError: a file cannot be written.
    """
    names = [depth.layer for depth in advice.depths]
    depths, evidence = advice.depths, advice.evidence
    curves = {
        "linear classifier": ([one.score for one in depths], [one.score_error for one in depths]),
        "nearest neighbours": (
            [one.neighbours for one in depths],
            [one.neighbours_error for one in depths],
        ),
    }
    metric = METRIC_NAMES[evidence.metric]
    with new_folder(output) as folder:
        write_json(folder / "advice.json", advice.to_dict())
        title = f"{advice.backbone}: {metric} by depth"
        draw_probe(folder / "probe.png", names, curves, evidence.chance, title, metric)
        cells: dict[tuple[str, str], str] = {key: cell.description for key, cell in CELLS.items()}
        chosen = (advice.decision.size, advice.decision.similarity)
        draw_strategy_matrix(folder / "matrix.png", cells, chosen, "Which strategy")
