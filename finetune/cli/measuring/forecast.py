"""``finetune forecast``: the learning curve, extrapolated to twice and four times the images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import JsonOption, OutputOption, takes_source
from finetune.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from finetune.features.forecast.forecast import Forecast
    from finetune.recipe import Recipe


@takes_source
def forecast_command(
    recipe: Recipe,
    run: Annotated[
        Path | None,
        typer.Argument(help="A run, whose images, network and features are taken.", metavar="[RUN]"),
    ] = None,
    target_accuracy: Annotated[
        float | None,
        typer.Option("--target-accuracy", help="How many images does this accuracy need? A share: 0.95."),
    ] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast the accuracy with twice and four times the images, from the learning curve of those at hand.

    Linear classifiers are solved on cached features of subsets; no network is trained.
    """
    from finetune import api

    result = api.forecast(run, recipe=recipe, target_accuracy=target_accuracy, output=output)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(result: Forecast) -> None:
    from finetune.features.forecast.extrapolation import LEVEL
    from finetune.features.forecast.forecast import TIMES, can_say

    level = f"{100 * LEVEL:.0f} % interval"
    rows = [
        ["measured", f"{point.images:,}", f"{100 * point.accuracy:.1f} %", _range(point.low, point.high)]
        for point in result.measured
    ]
    for times, point in zip(TIMES, result.forecast, strict=True):
        name = f"forecast, {times}x" if times > 1 else "fitted, 1x"
        value = f"{100 * point.accuracy:.1f} %" if can_say(point) else "cannot say"
        rows.append([name, f"{point.images:,}", value, _range(point.low, point.high)])
    print_table(("", "images", "accuracy", level), rows)
    print_line()
    end = _range(result.limit.low, result.limit.high)
    print_line(f"with any number of images: {100 * result.limit.accuracy:.1f} % ({level}: {end})")
    if result.num_groups < result.num_images:
        print_line(
            f"independent images: {result.num_groups:,} of {result.num_images:,}; look-alikes count once"
        )
    if result.requirement is not None:
        print_line(result.requirement.describe())


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"
