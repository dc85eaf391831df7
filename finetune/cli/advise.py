"""``finetune advise``: choose a strategy from the position of the data in the lectures' matrix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import (
    JsonOption,
    takes_source,
)
from finetune.cli.output import print_json, print_line, print_table
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.pipeline.advise import Advice
    from finetune.recipe import Recipe


@takes_source
def advise_command(
    recipe: Recipe,
    backbones: Annotated[
        str | None,
        typer.Option("--backbones", help="Comma-separated names: rank them on these images."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder for advice.json, probe.png and matrix.png."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a strategy by the number of images and their similarity to what the backbone was trained on.

    Only linear classifiers on cached features are trained. `finetune run --strategy auto` does the same, and
    then trains with the chosen strategy.
    """
    if backbones is not None:
        from finetune.recipe.flags import split_words

        _rank(recipe, split_words(backbones), as_json)
        return
    from finetune import api

    advice = api.advise(recipe=recipe, output=output)
    if as_json:
        print_json(advice.to_dict())
    else:
        _print(advice)


def _rank(recipe: Recipe, names: list[str], as_json: bool) -> None:
    from finetune.system.display import Display

    if not names:
        raise UsageError("--backbones", "no name was given", "Give names with commas between.")
    if recipe.backbone.weights and len(names) > 1:
        found = "a weights file belongs to one backbone"
        raise UsageError(
            f"--weights {recipe.backbone.weights}", found, "Rank backbones by their own weights."
        )
    display = Display()
    with display.busy("loading torch"):
        from finetune.features.rank_backbones import rank_backbones
        from finetune.targets import METRIC_NAMES
    ranked = rank_backbones(recipe, names, display)
    if as_json:
        print_json([vars(ranking) for ranking in ranked])
        return
    rows = [
        [
            ranking.backbone,
            f"{ranking.score:.3f} ± {ranking.error:.3f}",
            f"{ranking.num_features:,}",
            f"{ranking.num_parameters:,}",
        ]
        for ranking in ranked
    ]
    metric = METRIC_NAMES[ranked[0].metric]
    print_table(("backbone", f"{metric} of neighbours", "features", "parameters"), rows)


def _print(advice: Advice) -> None:
    from finetune.pipeline.rule import CELLS, SIMILARITIES, SIZES

    decision = advice.decision
    for size in SIZES:
        for column in SIMILARITIES:
            mark = "->" if (size, column) == (decision.size, decision.similarity) else "  "
            print_line(f"{mark} {size + ',':<7} {column:<10} {CELLS[size, column].description}")
    print_line()
    rows = [
        [depth.layer, f"{depth.num_features:,}", f"{depth.neighbours:.3f}", f"{depth.score:.3f}"]
        for depth in advice.depths
    ]
    print_table(("layer", "features", "nearest neighbours", "linear classifier"), rows)
    print_line()
    for reason in decision.reasons:
        print_line(reason)
    for warning in decision.warnings:
        print_line(f"warning: {warning}")
    print_line()
    _print_plan(advice)


def _print_plan(advice: Advice) -> None:
    from finetune.pipeline.auto import describe_keys

    keys = advice.decision.keys
    print_line(f"strategy: {describe_keys(keys)}")
    solved = "features" in keys
    rows = [
        [
            row.group,
            row.stage.name,
            "solved" if solved and row.trained else f"{row.lr:g}" if row.trained else "frozen",
        ]
        for row in advice.plan.rows
    ]
    print_table(("group", "stage", "rate"), rows)
    print_line()
    rows = [
        [name, f"{advice.num_trained[name]:,}", f"{seconds:,.0f} s"]
        for name, seconds in advice.seconds.items()
    ]
    print_table(("strategy", "numbers trained", "estimated"), rows)
    print_line()
    print_line("What would change this:")
    for change in advice.decision.changes or ("nothing that is measured here",):
        print_line(f"  {change}")
