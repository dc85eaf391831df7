"""``finetune probe``: train classifiers on the features of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import (
    JsonOption,
    OutputOption,
    PoolOption,
    takes_source,
)
from finetune.cli.output import print_json, print_table

if TYPE_CHECKING:
    from finetune.features.probe import ProbeRow
    from finetune.recipe import Recipe


@takes_source
def probe_command(
    recipe: Recipe,
    layers: Annotated[
        str,
        typer.Option("--layers", "-l", help="Layers, as in `finetune extract`."),
    ] = "all",
    per_class: Annotated[
        int, typer.Option("--per-class", min=1, help="Training images of each class; the rest are tested.")
    ] = 30,
    classifiers: Annotated[
        str,
        typer.Option(
            "--classifiers",
            help="Comma-separated: svm, softmax, logreg, ridge, knn.",
            show_default="svm,softmax,knn; logreg,knn of several labels; ridge,knn of numbers",
        ),
    ] = "",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Number of random draws of training images.")
    ] = 5,
    output: OutputOption = None,
    pool: PoolOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train classifiers on the features of each layer: mean accuracy over classes and random draws.

    Of several labels an image it is the mean average precision, of numbers R squared.
    """
    from finetune import api

    rows = api.probe(
        recipe=recipe,
        layers=layers,
        per_class=per_class,
        classifiers=classifiers,
        repeats=repeats,
        output=output,
        pool=pool,
    )
    if as_json:
        print_json([row.to_dict(per_class) for row in rows])
    else:
        _print(rows)


def _print(rows: list[ProbeRow]) -> None:
    """Print a row per layer and a column per classifier: mean and standard deviation in percent."""
    kinds = list(dict.fromkeys(row.result.classifier for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        result = row.result
        cells.setdefault(row.layer.name, {"features": f"{row.num_features:,}"})[result.classifier] = (
            f"{100 * result.mean:.1f} ± {100 * result.std:.1f}"
        )
    lines = [[layer, found["features"], *(found[kind] for kind in kinds)] for layer, found in cells.items()]
    print_table(("layer", "features", *kinds), lines)
