"""Is the accuracy honest? The function behind ``finetune audit``."""

from __future__ import annotations

from collections.abc import Mapping
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from finetune.api.shared import AnyPath, loading_torch, to_path
from finetune.errors import UsageError
from finetune.recipe import Recipe, flatten, load_recipe
from finetune.recipe.flags import Flags, build_recipe
from finetune.runs.folder import default_folder
from finetune.system.display import Display

if TYPE_CHECKING:
    from finetune.shortcuts.audit import Audit


def audit(
    run: AnyPath | None = None,
    *,
    output: AnyPath | None = None,
    recipe: Recipe | str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
    **flags: Unpack[Flags],
) -> Audit:
    """Find shortcuts: can the label be predicted from the border, the background or facts of the files alone?

    Args:
        run: a finished run, whose images and predictions are audited with the backbone that it began with;
            or None, with ``data``.
        output: a new folder for ``audit.json`` and ``audit.png``; by default ``runs/<time>-audit``.
        recipe, settings, display, flags: see :func:`finetune.run`.

    Raises:
        UsageError: a run and data were named, or neither.
        DataError: there are no labels, or too few images.
        FinetuneError: every other refusal and failure.
    """
    wanted = build_recipe(recipe, flags, settings)
    begun = None if run is None else Path(fspath(run))
    if begun is not None:
        _refuse_with_run(begun, wanted)
    elif not wanted.data.path:
        raise UsageError("finetune audit", "no images were named", "Name a run, or add --data FOLDER.")
    with loading_torch(display) as shown:
        from finetune.shortcuts.audit import audit as audit_images
        from finetune.shortcuts.audit import read_run
    if begun is not None:
        wanted = _lay_over(read_run(begun), wanted)
    return audit_images(wanted, to_path(output) or default_folder("audit"), shown, begun)


def _refuse_with_run(run: Path, wanted: Recipe) -> None:
    own = {
        "--data": wanted.data.path,
        "--backbone": wanted.backbone.name,
        "--group-by": wanted.data.group_by,
    }
    if given := [name for name, value in own.items() if value]:
        found = f"a run was named as well, which has its own: {run}"
        raise UsageError(", ".join(given), found, "Name the run alone, or its images with --data.")


def _lay_over(begun: Recipe, wanted: Recipe) -> Recipe:
    """Return the recipe of a run with what the user asked for besides."""
    usual = dict(flatten(Recipe().to_dict()))
    return load_recipe(begun, {key: value for key, value in flatten(wanted.to_dict()) if value != usual[key]})
