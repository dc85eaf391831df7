"""Recipes that arrive over the network: checked as on the command line, and kept to the server's own data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.samples import check_sample, is_sample
from finetune.errors import UsageError
from finetune.recipe import Recipe
from finetune.recipe.reading import read_values

DATASET = "dataset:"
"""What ``data.path`` begins with where it names an uploaded data set."""
JOB = "job:"
"""What ``backbone.name`` begins with where it names the model of a job."""
Find = Callable[[str], Path]
"""Returns the folder of an id; raises an UnknownError where there is none."""


class Submission:
    """Turns the recipe of a request into the recipe of a job.

    Args:
        roots: folders whose images a recipe may name by path.
        find_dataset: returns the folder of a data set.
        find_model: returns the model folder of a job.
    """

    def __init__(self, roots: Sequence[Path], find_dataset: Find, find_model: Find) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._find_dataset, self._find_model = find_dataset, find_model

    def read(self, values: Any) -> dict[str, Any]:
        """Return the plain values of a valid recipe, whose paths are those of this machine.

        Raises:
            UsageError: the recipe has mistakes (all of them in one message), or names a file that it may not.
            UnknownError: there is no such data set or job.
        """
        if not isinstance(values, Mapping):
            raise UsageError("recipe", "it is not an object", 'Send {"data": {"path": ...}, ...}.')
        recipe = read_values(dict(values))
        data = recipe.data.model_copy(update={"path": self._read_data(recipe)})
        if data.follow_links:
            found = "links of a data set may lead to any file of the server"
            raise UsageError("data.follow_links", found, "Leave it out.")
        name, weights = recipe.backbone.name, recipe.backbone.weights
        backbone = recipe.backbone.model_copy(
            update={
                "name": self._read_backbone(name) if name else None,
                "weights": self._check_root("backbone.weights", weights) if weights else None,
            }
        )
        if data.image_root and Path(data.image_root).is_absolute():
            self._check_root("data.image_root", data.image_root)
        changed = recipe.model_copy(update={"data": data, "backbone": backbone})
        return changed.to_dict()

    def _read_data(self, recipe: Recipe) -> str:
        path = recipe.data.path
        if not path:
            fix = "Upload images (POST /v1/datasets), and set data.path to dataset:ID."
            raise UsageError("data.path", "no data was named", fix)
        if path.startswith(DATASET):
            return str(self._find_dataset(path.removeprefix(DATASET)))
        if is_sample(path):
            check_sample(path)
            return path
        return self._check_root("data.path", path)

    def _read_backbone(self, name: str) -> str:
        if name.startswith(JOB):
            return str(self._find_model(name.removeprefix(JOB)))
        folder = name.removeprefix("local-dir:")
        is_path = folder != name or Path(folder).is_absolute() or ".." in Path(folder).parts
        return self._check_root("backbone.name", folder) if is_path else name

    def _check_root(self, key: str, path: str) -> str:
        """Return a path below one of the roots, links resolved.

        What lies elsewhere and what does not exist are refused alike: an answer must not tell which.
        """
        real = Path(os.path.realpath(path)) if Path(path).is_absolute() and "\0" not in path else None
        if real is None or not any(real.is_relative_to(root) for root in self._roots) or not real.exists():
            found = "it is no path below a folder that this server gives to jobs"
            fix = "Upload the images (POST /v1/datasets), or start the server with --data-root."
            raise UsageError(f"{key}={path[:200]}", found, fix)
        return str(real)
