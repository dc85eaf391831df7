"""A resumed attempt keeps the decisions of the first one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from finetune.pipeline.setup import fit_batches, prepare
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.system.display import SilentDisplay


def test_the_first_attempt_chooses_the_batch_size(image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    """As on a GPU, whose free memory differs between attempts."""
    recipe = load_recipe(None, {"backbone.name": str(tiny), "data.path": str(image_folder)})
    setup, _ = prepare(recipe, SilentDisplay())
    folder = RunFolder(tmp_path)
    with mock.patch("finetune.pipeline.setup.fit_batch_size", side_effect=[8, 4]) as fit:
        first = fit_batches(setup, folder)
        assert first.recipe.training.batch_size == 8
        folder.recipe.write_text(first.recipe.to_yaml())
        assert fit_batches(setup, folder) == replace(setup, recipe=first.recipe)
        folder.recipe.write_text("{")
        assert fit_batches(setup, folder).recipe.training.batch_size == 4
    assert fit.call_count == 2


@pytest.mark.parametrize("size", [8, 64])
def test_a_given_batch_size_is_used(image_folder: Path, tiny: Path, size: int) -> None:
    keys = {"backbone.name": str(tiny), "data.path": str(image_folder), "training.batch_size": size}
    setup, _ = prepare(load_recipe(None, keys), SilentDisplay())
    assert setup.recipe.training.batch_size == size
