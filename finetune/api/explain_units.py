"""Pictures of the layers and units of a network: more functions behind ``finetune explain``."""

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


def explain_filters(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Draw the kernels of a convolution.

    Kernels on the three colours are drawn as they are. Of others the norms are drawn and, if there are
    images, what excites the strongest of them, projected to pixels.

    Args:
        output: a new folder for ``filters.png``, ``filters.csv``, ``filters.npz`` and ``explain.json``.
        layer: the convolution; by default the first.
        model, images, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.filters import explain_filters as write_filters
    return write_filters(wanted, list_paths(images), Path(fspath(output)), layer, shown)


def explain_maps(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    class_name: str | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Draw the feature maps of images: the strongest, and those that add most to the score of a class.

    Args:
        output: a new folder for ``maps-1.png`` and so on, ``maps.csv``, ``maps.npz`` and ``explain.json``.
        layer: the layer; by default the last stage that is a feature map.
        class_name: the class whose score is meant; by default the predicted class of each image.
        model, images, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.maps import explain_maps as write_maps
    return write_maps(wanted, list_paths(images), Path(fspath(output)), layer, class_name, shown)


def explain_top(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    maps: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Find the nine images that excite each feature map most, and the pixels that its units see.

    One pass over the images serves all feature maps of all layers, and memory does not grow with the images.

    Args:
        output: a new folder for ``top-LAYER.png``, ``top.csv``, ``top.npz`` and ``explain.json``.
        layer: layers, separated by commas; by default all stages.
        maps: numbers of the feature maps that are drawn; by default the strongest of each layer.
        model, images, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.top import explain_top as write_top
    return write_top(wanted, list_paths(images), Path(fspath(output)), layer, maps, shown)


def explain_deconv(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    maps: Sequence[int] | None = None,
    method: str = "deconv",
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Project what excited feature maps back to pixels; for networks of ReLU only.

    Args:
        output: a new folder for ``deconv.png``, ``deconv.csv``, ``deconv.npz`` and ``explain.json``.
        layer: the layer; by default the last stage that is a feature map.
        maps: numbers of the feature maps; by default the strongest.
        method: ``deconv`` (arXiv:1311.2901) or ``guided`` (arXiv:1412.6806).
        model, images, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.deconv import explain_deconv as write_projections
    return write_projections(wanted, list_paths(images), Path(fspath(output)), layer, maps, method, shown)


def explain_evolution(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    maps: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Show what excites feature maps after some epochs of a run's training.

    The run must have kept the weights of these epochs (``training.keep_epochs``).

    Args:
        model: a finished run.
        output: a new folder for ``evolution.png``, ``evolution.csv`` and ``explain.json``.
        layer: the layer; by default the last stage that is a feature map.
        maps: numbers of the feature maps; by default those that are strongest at the end.
        images, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.evolution import explain_evolution as write_evolution
    return write_evolution(wanted, list_paths(images), Path(fspath(output)), layer, maps, shown)


def explain_receptive_field(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Measure what the units of each layer can see, exactly, and how much of it they make use of.

    Args:
        images: images over which gradients are averaged; by default random ones.
        output: a new folder for ``receptive-fields.png``, ``.csv`` and ``.npz``, and ``explain.json``.
        layer: layers, separated by commas; by default all convolutions, poolings and stages.
        model, recipe, display, flags: see :func:`finetune.explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.receptive_field import explain_receptive_field as write_fields
    return write_fields(wanted, list_paths(images), Path(fspath(output)), layer, shown)
