"""Views of whole networks: more functions behind ``finetune explain``."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from finetune.api.explain import build_model_recipe, list_paths
from finetune.api.shared import AnyPath, loading_torch
from finetune.recipe.flags import Flags
from finetune.system.display import Display

if TYPE_CHECKING:
    from finetune.recipe import Recipe


def explain_class(
    model: AnyPath,
    *,
    output: AnyPath,
    class_name: str | None = None,
    seeds: int = 3,
    smooth: bool = False,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Draw the image that the network scores highest for a class (arXiv:1312.6034).

    Args:
        output: a new folder for ``class-images.png``, ``class-images.csv``, ``class-images.npz`` and
            ``explain.json``.
        class_name: the class; by default all classes of a model with at most ten.
        seeds: images of each class, at least 1.
        smooth: shift and blur the image between the steps, which leaves less noise.
        model, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.class_image import explain_class as write_class
    return write_class(wanted, Path(fspath(output)), class_name, seeds, smooth, shown)


def explain_invariance(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layers: str | None = None,
    class_name: str | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Measure how features and probabilities change when images are moved, scaled and turned.

    Args:
        output: a new folder for ``invariance.png``, ``invariance.csv``, ``invariance.npz`` and
            ``explain.json``.
        layers: names of at most seven layers, separated by commas; by default the stages.
        class_name: the class of the images; by default that of the labels of ``data``, and the predicted
            class of images that are named one by one.
        model, images, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.invariance import explain_invariance as write_invariance
    return write_invariance(wanted, list_paths(images), Path(fspath(output)), layers, class_name, shown)


def explain_ablate(
    model: AnyPath,
    *,
    output: AnyPath,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Measure the error without each block that can be removed, without training again.

    Args:
        output: a new folder for ``ablation.png``, ``ablation.csv`` and ``explain.json``.
        model, recipe, display, flags: see :func:`finetune.explain_cam`. ``data`` are labelled images; by
            default those that the run ``model`` was tested on.

    Returns:
        The content of ``explain.json``, and the path of the output.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.ablation import explain_ablate as write_ablation
    return write_ablation(wanted, Path(fspath(output)), shown)


def explain_influence(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Name the training images that answers of a solved classifier depend on (docs/explain.md).

    Args:
        model: a finished run with ``strategy.features``.
        images: evaluated images; by default its most confident mistakes.
        output: a new folder for ``influence.png``, ``influence.csv`` and ``explain.json``.
        recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.influence import explain_influence as write_influence
    return write_influence(wanted, list_paths(images), Path(fspath(output)), shown)
