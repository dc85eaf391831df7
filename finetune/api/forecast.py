"""What more images would bring: the function behind ``finetune forecast``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from finetune.api.shared import AnyPath, loading_torch, to_path
from finetune.recipe import Recipe
from finetune.recipe.flags import Flags, build_recipe
from finetune.runs.folder import default_folder
from finetune.system.display import Display

if TYPE_CHECKING:
    from finetune.features.forecast.forecast import Forecast


def forecast(
    run: AnyPath | None = None,
    *,
    target_accuracy: float | None = None,
    output: AnyPath | None = None,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> Forecast:
    """Forecast the accuracy of a linear classifier with twice and four times the images (docs/forecast.md).

    Args:
        run: folder of a run, whose images, network and features are taken; instead of ``data`` and
            ``backbone``.
        target_accuracy: accuracy in (0, 1) whose number of images is wanted.
        output: a new folder for ``forecast.json``, ``.csv``, ``.svg`` and ``.png``; by default
            ``runs/<time>-forecast``.
        recipe, settings, display, flags: see :func:`run`.

    Raises:
        DataError: a class has fewer than eight images.
        FinetuneError: every other refusal and failure.
    """
    wanted = build_recipe(recipe, flags, settings)
    with loading_torch(display) as shown:
        from finetune.features.forecast.forecast import forecast as forecast_images
        from finetune.features.forecast.forecast import take_run
    folder = to_path(run)
    wanted = wanted if folder is None else take_run(folder, wanted)
    return forecast_images(wanted, target_accuracy, to_path(output) or default_folder("forecast"), shown)
