"""A run on more images: the function behind ``finetune extend``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.api.shared import AnyPath, loading_torch, to_path
from finetune.runs.folder import default_folder
from finetune.system.display import Display

if TYPE_CHECKING:
    from finetune.pipeline.forgetting import Forgetting
    from finetune.pipeline.run import Run


@dataclass(frozen=True)
class Extension:
    """A run on more images.

    Attributes:
        run: the new run.
        forgetting: its scores on old classes beside those of the run before; None if no evaluated image is of
            an old class.
    """

    run: Run
    forgetting: Forgetting | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "output": str(self.run.folder.path),
            "metrics": dict(self.run.metrics),
            "forgetting": None if self.forgetting is None else self.forgetting.to_dict(),
        }


def extend(
    run: AnyPath,
    data: AnyPath,
    *,
    replace: bool = False,
    settings: Mapping[str, Any] | None = None,
    output: AnyPath | None = None,
    display: Display | None = None,
) -> Extension:
    """Add images or classes to a run (docs/extend.md).

    Args:
        run: folder of a finished run; it is not changed.
        data: more images, in any layout that :func:`run` reads.
        replace: these are all images: those of the run that are not among them are left out.
        settings: keys of the recipe that differ from the run's, such as ``{"training.epochs": 5}``.
        output: folder of the new run, by default ``runs/<time>-extend``; its images are listed in a table
            beside it, with the ending ``.csv``. The same call resumes it.
        display: where progress is shown; stderr by default.

    Raises:
        DataError: images of the run are gone, classes were renamed, or nothing is new.
        FinetuneError: every other refusal and failure.
    """
    with loading_torch(display) as shown:
        from finetune.pipeline.extend import plan_extension
        from finetune.pipeline.forgetting import measure_forgetting, write_forgetting
        from finetune.pipeline.run import run as run_recipe
        from finetune.recipe import load_recipe
        from finetune.runs.outcome import translated_errors
    before, folder = to_path(run), to_path(output) or default_folder("extend")
    assert before is not None
    with translated_errors():
        recipe = plan_extension(before, str(data), replace, folder, shown)
    done = run_recipe(load_recipe(recipe, dict(settings or {})), folder, shown)
    with translated_errors():
        found = measure_forgetting(before, folder, shown)
        if found is not None:
            write_forgetting(done.folder.forgotten, found)
    return Extension(done, found)
