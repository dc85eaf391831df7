"""``finetune explain cam``: Grad-CAM or LayerCAM of some images, drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from finetune.errors import UsageError, suggest
from finetune.explain.attribution.cam import GradCam
from finetune.explain.attribution.heat_map import ComputeMaps
from finetune.explain.attribution.layer_cam import LayerCam
from finetune.explain.commands.checked_maps import MOST_CLASSES, MapJob
from finetune.explain.commands.heat_maps import write_heat_maps
from finetune.explain.commands.images import find_images
from finetune.explain.commands.model import find_class, name_outputs, open_model
from finetune.explain.commands.record import say_written
from finetune.explain.positions import find_position
from finetune.recipe import Recipe
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

METHODS: dict[str, type[GradCam]] = {"grad-cam": GradCam, "layer-cam": LayerCam}


def explain_cam(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    layer: str | None,
    class_name: str | None,
    method: str,
    display: Display,
) -> dict[str, Any]:
    """Write the class activation maps of some images.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        layer: the layer whose map is weighted; None for the deepest that keeps the place in the image.
        class_name: the class that is explained; None for those that the network predicts.
        method: ``grad-cam`` or ``layer-cam``.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        kind = _find_method(method)
        network = open_model(recipe, display)
        classes = name_outputs(network)
        wanted = None if class_name is None else find_class(classes, class_name)
        model, size = network.backbone.network, network.backbone.card.preprocessing.input_size
        position = None if layer is None else find_position(model, network.find_layer(layer), size)
        cam = kind(model, size, position)
        if cam.reason:
            asked = f"a heat map of {network.backbone.card.name}"
            raise UsageError(asked, cam.reason, "Name another --layer, or another model.")

        def make(other: nn.Module) -> ComputeMaps:
            maps_of = kind(other, size, cam.position)
            return lambda pixels, indices: maps_of(pixels, indices)[0]

        facts = {"layer": layer or _name(cam), "layer_size": _size(cam)}
        job = MapJob(method, network, classes, wanted, make, facts, MOST_CLASSES)
        found = find_images(recipe, images, output, display)
        with new_folder(output) as folder:
            record = write_heat_maps(job, found, folder, display)
        return say_written(output, record, display)


def _find_method(method: str) -> type[GradCam]:
    if method not in METHODS:
        found = f"there is no such method{suggest(method, METHODS)}"
        raise UsageError(f"--method {method}", found, f"Take {' or '.join(METHODS)}.")
    return METHODS[method]


def _name(cam: GradCam) -> str:
    return "the stages that the classifier reads" if cam.position is None else str(cam.position.point)


def _size(cam: GradCam) -> list[int] | None:
    return list(cam.position.form.size or ()) if cam.position is not None else None
