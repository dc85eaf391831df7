"""``finetune explain invariance``: responses of features and answers to moved, scaled, turned images.

::

    invariance.png    three rows of curves: distances by layer, and the probability of the class
                      (or the number)
    invariance.csv    transformation, amount, layer, median and quartiles over the images
    invariance.npz    ``paths`` (N,), and of each transformation ``amounts`` (A,), ``distances`` (L, N, A),
                      ``probabilities`` (N, A), or ``values`` of a number
    explain.json      model, layers, number of images, versions

Shape legend: N images, L layers, A amounts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data.inputs import InputImage
from finetune.errors import UsageError
from finetune.explain.commands.images import ImageReader, find_images
from finetune.explain.commands.labelled import find_labelled_images
from finetune.explain.commands.model import find_class, find_target, name_outputs, open_model
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.explain.invariance import AMOUNTS, Responses, measure_responses
from finetune.features.network import Network
from finetune.plots.responses import MOST_LAYERS, ResponseRow, draw_responses
from finetune.recipe import Recipe
from finetune.recipe.flags import split_words
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from finetune.targets import decide
from pretrained.graph.layers import Layer
from pretrained.graph.structures import tensors_in

MOST_IMAGES = 64
"""Images that are measured, evenly spaced among those given: each takes 45 passes of the network."""
_BATCH = 16
_LABELS = {
    "translation": "vertical translation, in percent of the height",
    "scale": "scale",
    "rotation": "rotation, in degrees",
}
_COLUMNS = ("transformation", "amount", "layer", "value", "quartile_1", "median", "quartile_3")


def explain_invariance(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    layers: str | None,
    class_name: str | None,
    display: Display,
) -> dict[str, Any]:
    """Write how a network responds to transformed images.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        layers: names of layers, separated by commas; None for the stages, and the input of the classifier.
        class_name: the class whose probability is measured; None for that of the labels of ``--data``, and
            for the predicted class of images that have several, or are named one by one.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        network = open_model(recipe, display)
        chosen = _choose_layers(network, layers)
        labels = _find(recipe, images, network, class_name, output, display)
        with new_folder(output) as folder:
            reader = ImageReader(network)
            with display.track("transforming images", len(labels) * len(AMOUNTS)) as advance:
                paths, responses = _measure(network, chosen, labels, reader, advance)
            reader.report_bad(folder, len(labels), display)
            has_classes = find_target(network).has_classes
            rows = [_to_row(kind, responses[kind]) for kind in AMOUNTS]
            _write_numbers(folder, chosen, paths, responses, has_classes)
            title = f"{network.backbone.card.name}: medians and quartiles over {len(paths)} images"
            names = [layer.name for layer in chosen]
            draw_responses(folder / "invariance.png", names, rows, title, has_classes)
            facts: dict[str, Any] = {
                "layers": names,
                "class": class_name,
                "num_images": len(paths),
                "num_bad": len(reader.bad),
                "checks": {},
            }
            record = write_record(folder, "invariance", network, facts)
        return say_written(output, record, display)


def _choose_layers(network: Network, names: str | None) -> Sequence[Layer]:
    if names is None:
        found = network.layers.all
        places = np.linspace(0, len(found) - 1, min(len(found), MOST_LAYERS)).round().astype(int)
        return [found[place] for place in places]
    chosen = network.find_layers(split_words(names))
    if len(chosen) > MOST_LAYERS:
        found_many = f"these are {len(chosen)} layers"
        raise UsageError(f"--layer {names}", found_many, f"Name at most {MOST_LAYERS}.")
    return chosen


def _find(
    recipe: Recipe,
    images: Sequence[str],
    network: Network,
    class_name: str | None,
    output: Path,
    display: Display,
) -> dict[InputImage, int | None]:
    """Return the images, each with the index of its class; None for the predicted class."""
    classes = name_outputs(network)
    if class_name is not None or images:
        wanted = None if class_name is None else find_class(classes, class_name)
        found: dict[InputImage, int | None] = dict.fromkeys(
            find_images(recipe, images, output, display), wanted
        )
    else:
        labelled = find_labelled_images(recipe, network, output, display)
        found = dict(zip(labelled.images, labelled.outputs, strict=True))
    if len(found) > MOST_IMAGES:
        display.note(f"{MOST_IMAGES} of {len(found)} images are measured, evenly spaced")
        places = np.linspace(0, len(found) - 1, MOST_IMAGES).round().astype(int)
        listed = list(found.items())
        found = dict(listed[place] for place in places)
    return found


def _measure(
    network: Network,
    layers: Sequence[Layer],
    labels: dict[InputImage, int | None],
    reader: ImageReader,
    advance: Any,
) -> tuple[list[str], dict[str, Responses]]:
    """Return the paths of the images that could be read, and their responses."""
    model, points = network.backbone.network, [layer.point for layer in layers]
    target, temperature = find_target(network), network.backbone.card.temperature
    paths: list[str] = []
    parts: dict[str, list[Responses]] = {kind: [] for kind in AMOUNTS}
    for batch in reader.read(list(labels), _BATCH):
        with torch.inference_mode():
            predicted = decide(tensors_in(model(batch.pixels))[0]).tolist()
        known = [labels[image] for image in batch.images]
        outputs = torch.tensor(
            [other if own is None else own for own, other in zip(known, predicted, strict=True)]
        )
        paths += [image.path for image in batch.images]
        for kind, found in parts.items():
            found.append(
                measure_responses(
                    model,
                    points,
                    batch.pixels,
                    outputs,
                    kind,
                    lambda values: target.activate(values / temperature),
                )
            )
            advance(len(batch.images), kind)
    return paths, {kind: _join(found) for kind, found in parts.items() if found}


def _join(parts: Sequence[Responses]) -> Responses:
    distances = torch.cat([part.distances for part in parts], dim=1)
    return Responses(distances, torch.cat([part.answers for part in parts]))


def _to_row(kind: str, found: Responses) -> ResponseRow:
    factor = 100 if kind == "translation" else 1
    amounts = [factor * amount for amount in AMOUNTS[kind]]
    return ResponseRow(_LABELS[kind], amounts, found.distances.numpy(), found.answers.numpy())


def _write_numbers(
    folder: Path,
    layers: Sequence[Layer],
    paths: Sequence[str],
    responses: dict[str, Responses],
    has_classes: bool,
) -> None:
    one, several = ("probability", "probabilities") if has_classes else ("value", "values")
    arrays = {"paths": np.array(paths)}
    for kind, found in responses.items():
        arrays |= {
            f"{kind}_amounts": np.array(AMOUNTS[kind]),
            f"{kind}_distances": found.distances.numpy(),
            f"{kind}_{several}": found.answers.numpy(),
        }
    write_arrays(folder / "invariance.npz", **arrays)
    write_csv(folder / "invariance.csv", list(_list_rows(layers, responses, one)), _COLUMNS)


def _list_rows(
    layers: Sequence[Layer], responses: dict[str, Responses], answer: str
) -> Iterator[tuple[object, ...]]:
    for kind, found in responses.items():
        for number, layer in enumerate(layers):
            yield from _quartiles(kind, layer.name, "distance", found.distances[number].numpy())
        yield from _quartiles(kind, "", answer, found.answers.numpy())


def _quartiles(kind: str, layer: str, value: str, numbers: Any) -> Iterator[tuple[object, ...]]:
    for amount, column in zip(AMOUNTS[kind], numbers.T, strict=True):
        cells = [f"{number:.6g}" for number in np.quantile(column, (0.25, 0.5, 0.75))]
        yield kind, f"{amount:g}", layer, value, *cells
