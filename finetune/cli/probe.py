"""``finetune probe``: which layer is best."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import (
    JsonOption,
    OutputOption,
    PoolOption,
    default_folder,
    read_pool,
    split_words,
    takes_source,
)
from finetune.cli.output import hand_over, print_table
from finetune.errors import UsageError, suggest

if TYPE_CHECKING:
    from finetune.features.probe import Classifier, ProbeRow
    from finetune.recipe import Recipe


@takes_source
def probe_command(
    recipe: Recipe,
    layers: Annotated[
        str,
        typer.Option("--layers", "-l", help="As of `finetune extract`."),
    ] = "all",
    per_class: Annotated[
        int, typer.Option("--per-class", min=1, help="Training images of each class; the rest are judged.")
    ] = 30,
    classifiers: Annotated[
        str, typer.Option("--classifiers", help="Of svm, softmax, logreg and knn, with commas between.")
    ] = "svm,softmax,knn",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Draws of training images.")] = 5,
    output: OutputOption = None,
    pool: PoolOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Judge each layer by classifiers on its features: mean accuracy over classes, over several draws."""
    from finetune.system.display import Display

    display = Display()
    with display.busy("loading torch"):
        from finetune.features.probe import probe
    kinds = _read_classifiers(split_words(classifiers))
    folder = output or default_folder("probe")
    wanted = split_words(layers)
    rows = probe(recipe, wanted, per_class, kinds, repeats, folder, read_pool(pool), display)
    if as_json:
        hand_over(json.dumps([row.to_dict(per_class) for row in rows]) + "\n")
    else:
        _print(rows, kinds)


def _read_classifiers(words: list[str]) -> list[Classifier]:
    from finetune.features.probe import CLASSIFIERS

    known = {str(kind): kind for kind in CLASSIFIERS}
    for word in words:
        if word not in known:
            found = f"there is no such classifier{suggest(word, known)}"
            raise UsageError(f"--classifiers {word}", found, f"Take {', '.join(known)}.")
    if not words:
        raise UsageError("--classifiers", "none was named", f"Take {', '.join(known)}.")
    return [known[word] for word in dict.fromkeys(words)]


def _print(rows: list[ProbeRow], kinds: list[Classifier]) -> None:
    """A line a layer, a column a classifier: mean and standard deviation in percent."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        result = row.result
        cells.setdefault(row.layer.name, {"features": f"{row.num_features:,}"})[result.classifier] = (
            f"{100 * result.mean:.1f} ± {100 * result.std:.1f}"
        )
    lines = [[layer, found["features"], *(found[kind] for kind in kinds)] for layer, found in cells.items()]
    print_table(("layer", "features", *kinds), lines)
