"""``finetune explain saliency``: which pixels change the score of a class, drawn over the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import UsageError, suggest
from finetune.explain.attribution.gradient import compute_saliency
from finetune.explain.attribution.heat_map import ComputeMaps, HeatMap, MakeCompute, to_heat_map
from finetune.explain.attribution.integrated import compute_integrated
from finetune.explain.attribution.occlusion import compute_occlusion
from finetune.explain.attribution.smoothgrad import compute_smoothgrad
from finetune.explain.commands.checked_maps import MOST_CLASSES, MapJob
from finetune.explain.commands.heat_maps import write_heat_maps
from finetune.explain.commands.images import find_images
from finetune.explain.commands.model import find_class, name_outputs, open_model
from finetune.explain.commands.record import say_written
from finetune.recipe import Recipe
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "gradient": compute_saliency,
    "smoothgrad": compute_smoothgrad,
    "integrated": compute_integrated,
    "occlusion": compute_occlusion,
}
"""Each takes a network, images (B, 3, H, W) and classes (B,), and returns maps (B, H, W)."""


def explain_saliency(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    class_name: str | None,
    method: str,
    display: Display,
) -> dict[str, Any]:
    """Write the saliency maps of some images.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        class_name: the class that is explained; None for those that the network predicts.
        method: one of :data:`METHODS`.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        make = make_saliency(method)
        network = open_model(recipe, display)
        classes = name_outputs(network)
        wanted = None if class_name is None else find_class(classes, class_name)
        job = MapJob(method, network, classes, wanted, make, {"layer": None}, MOST_CLASSES)
        found = find_images(recipe, images, output, display)
        with new_folder(output) as folder:
            record = write_heat_maps(job, found, folder, display)
        return say_written(output, record, display)


def make_saliency(method: str) -> MakeCompute:
    """Return what makes the function that computes maps of a network.

    Raises:
        UsageError: there is no such method.
    """
    if method not in METHODS:
        found = f"there is no such method{suggest(method, METHODS)}"
        raise UsageError(f"--method {method}", found, f"Take {', '.join(METHODS)}.")

    def make(network: nn.Module) -> ComputeMaps:
        def compute(images: Tensor, classes: Sequence[int]) -> list[HeatMap]:
            maps = METHODS[method](network, images, torch.tensor(classes))
            return [to_heat_map(evidence) for evidence in maps.cpu()]

        return compute

    return make
