"""Pictures of what a network computes: the functions behind ``finetune explain``."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from finetune.api.shared import AnyPath, loading_torch, to_path
from finetune.errors import UsageError
from finetune.recipe.flags import Flags, build_recipe
from finetune.system.display import Display

if TYPE_CHECKING:
    from finetune.recipe import Recipe


def explain_cam(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    layer: str | None = None,
    class_name: str | None = None,
    method: str = "grad-cam",
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Draw which regions of images are evidence for a class (class activation maps).

    Args:
        model: a finished run, an exported folder, or a backbone's name, to which ``weights`` may be given.
        images: files, folders, CSV files or patterns; one, or several. ``data`` adds those of a data set.
        output: a new folder for ``heat-maps.png``, ``heat-maps.csv``, ``heat-maps.npz`` and ``explain.json``.
        layer: the layer whose map is weighted; by default the deepest that keeps the place in the image.
        class_name: the class that is explained; by default the predicted class of each image.
        method: ``grad-cam`` (arXiv:1610.02391) or ``layer-cam`` (doi:10.1109/TIP.2021.3089943).
        recipe: settings of input and machine; its backbone is not read.
        display: where progress is shown; stderr by default.
        flags: ``data``, ``weights``, ``img_size``, ``device`` and so on
            (:class:`finetune.recipe.flags.Flags`).

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: every refusal and failure; its ``exit_code`` is documented in docs/errors.md.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.cam import explain_cam as write_cam
    return write_cam(wanted, list_paths(images), Path(fspath(output)), layer, class_name, method, shown)


def explain_saliency(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    class_name: str | None = None,
    method: str = "gradient",
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Draw which pixels of images change the score of a class.

    Args:
        method: ``gradient`` (arXiv:1312.6034), ``smoothgrad`` (arXiv:1706.03825), ``integrated``
            (arXiv:1703.01365) or ``occlusion`` (arXiv:1311.2901).
        model, images, output, class_name, recipe, display, flags: see :func:`explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.
    """
    wanted = build_model_recipe(model, recipe, flags)
    with loading_torch(display) as shown:
        from finetune.explain.commands.saliency import explain_saliency as write_saliency
    return write_saliency(wanted, list_paths(images), Path(fspath(output)), class_name, method, shown)


def explain_localise(
    model: AnyPath,
    images: AnyPath | Sequence[AnyPath] = (),
    *,
    output: AnyPath,
    class_name: str | None = None,
    boxes: AnyPath | None = None,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> dict[str, Any]:
    """Find a box around the object of each image from its saliency map: no boxes are needed for training.

    GrabCut is used where OpenCV is installed, otherwise a threshold.

    Args:
        output: a new folder for ``boxes.png``, ``boxes.csv`` and ``explain.json``.
        boxes: a CSV file with true boxes (path, x0, y0, x1, y1), which the boxes found are compared with.
        model, images, class_name, recipe, display, flags: see :func:`explain_cam`.

    Returns:
        The content of ``explain.json``, and the path of the output.
    """
    wanted, truth = build_model_recipe(model, recipe, flags), to_path(boxes)
    with loading_torch(display) as shown:
        from finetune.explain.commands.localise import explain_localise as write_boxes
    return write_boxes(wanted, list_paths(images), Path(fspath(output)), class_name, truth, shown)


def build_model_recipe(model: AnyPath, recipe: Recipe | None, flags: Flags) -> Recipe:
    """Return the recipe whose backbone is the model.

    Raises:
        UsageError: a flag is unknown or invalid, or the model is named twice.
    """
    if flags.get("backbone"):
        found = "the model is named already"
        raise UsageError(f"backbone={flags['backbone']}", found, "Leave the argument out.")
    return build_recipe(recipe, {**flags, "backbone": fspath(model)})


def list_paths(images: AnyPath | Sequence[AnyPath]) -> list[str]:
    """Return one path, or several, as texts."""
    listed = [images] if isinstance(images, str | PathLike) else images
    return [fspath(one) for one in listed]
