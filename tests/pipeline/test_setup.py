"""A resumed attempt keeps the decisions of the first one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from finetune.errors import EnvironmentFaultError, UsageError
from finetune.pipeline.setup import (
    _check_batch_norm,
    check_deterministic,
    fit_batches,
    prepare,
    reload_backbone,
)
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.runs.outcome import translated_errors
from finetune.system.display import SilentDisplay
from finetune.system.distributed import Distributed
from tests.processes import together


def test_the_first_attempt_chooses_the_batch_size(image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    """As on a GPU, whose free memory differs between attempts."""
    recipe = load_recipe(None, {"backbone.name": str(tiny), "data.path": str(image_folder)})
    setup, _ = prepare(recipe, SilentDisplay())
    folder = RunFolder(tmp_path)
    with mock.patch("finetune.pipeline.setup.StepTrial.find_batch_size", side_effect=[8, 4]) as fit:
        first = fit_batches(setup, folder)
        assert first.recipe.training.batch_size == 8
        folder.recipe.write_text(first.recipe.to_yaml())
        assert fit_batches(setup, folder) == replace(setup, recipe=first.recipe)
        folder.recipe.write_text("{")
        assert fit_batches(setup, folder).recipe.training.batch_size == 4
    assert fit.call_count == 2


def test_the_smallest_gpu_decides_on_the_batch_size(image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(None, {"backbone.name": str(tiny), "data.path": str(image_folder)})

    def work(distributed: Distributed) -> int:
        setup, _ = prepare(recipe, SilentDisplay(), distributed)
        fits = 8 if distributed.rank == 1 else 16
        with mock.patch("finetune.pipeline.setup.StepTrial.find_batch_size", return_value=fits):
            return fit_batches(setup, RunFolder(tmp_path), distributed).recipe.training.batch_size

    assert together(work) == [8, 8]


@pytest.mark.parametrize("size", [8, 64])
def test_a_given_batch_size_is_used(image_folder: Path, tiny: Path, size: int) -> None:
    keys = {"backbone.name": str(tiny), "data.path": str(image_folder), "training.batch_size": size}
    setup, _ = prepare(load_recipe(None, keys), SilentDisplay())
    assert setup.recipe.training.batch_size == size


def test_an_operation_that_cannot_be_deterministic_is_found_before_images_are_read(
    image_folder: Path, tiny: Path
) -> None:
    """On a GPU it is the gradient of an adaptive pooling; torch has few such operations on a CPU."""
    keys = {"backbone.name": str(tiny), "data.path": str(image_folder), "strategy.name": "full"}
    for deterministic in (True, False):
        recipe = load_recipe(None, keys | {"deterministic": deterministic})
        setup, _ = prepare(recipe, SilentDisplay())
        setup.backbone.network.register_forward_pre_hook(lambda _, images: unpool(images[0]))
        try:
            torch.use_deterministic_algorithms(deterministic)
            if not deterministic:
                check_deterministic(setup)
                return
            with (
                pytest.raises(EnvironmentFaultError, match="deterministic implementation"),
                translated_errors(),
            ):
                check_deterministic(setup)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "given", "rate"),
    [
        ("nin_cifar", {}, 0.5),
        ("nin_cifar", {"strategy.dropout": 0.0}, 0.0),  # as in recipes that were saved before there was auto
        ("cifar_wrn_16_4", {}, 0.0),
        ("test_resnet", {}, 0.0),
        ("test_resnet", {"strategy.dropout": 0.3}, 0.3),
    ],
)
def test_dropout_is_that_of_the_network_unless_it_is_given(
    image_folder: Path, name: str, given: dict[str, float], rate: float
) -> None:
    keys = {"backbone.name": name, "data.path": str(image_folder), "strategy.name": "scratch"}
    setup, found = prepare(load_recipe(None, keys | given), SilentDisplay())
    for backbone in (setup.backbone, reload_backbone(setup, found.classes)):
        layers = [layer.p for layer in backbone.network.modules() if isinstance(layer, nn.Dropout)]
        built = max(layers) if layers else backbone.network.drop_rate  # timm's ResNets
        assert built == backbone.card.dropout == setup.recipe.strategy.dropout == rate


SINGLE = {
    "--batch-size 1": {"training.batch_size": 1},
    "training.microbatch=1": {"training.microbatch": 1},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("asked", SINGLE)
@pytest.mark.parametrize("strategy", ["full", "scratch"])
def test_one_image_a_step_is_refused_where_a_batch_norm_gets_one_value(
    image_folder: Path, tiny: Path, asked: str, strategy: str
) -> None:
    """The last stage of this network has features of 1x1 at 32 pixels, and of 2x2 at 64."""
    keys = {"backbone.name": str(tiny), "data.path": str(image_folder), "strategy.name": strategy}
    keys |= {"strategy.norm": "train"} | SINGLE[asked]
    with pytest.raises(UsageError) as error:
        prepare(load_recipe(None, keys), SilentDisplay())
    assert error.value.asked == asked
    assert "1x1" in error.value.found
    assert ("strategy.norm=eval" in error.value.fix) == (strategy == "full")
    for fix in ({"strategy.norm": "eval"}, {"input.img_size": 64}, {"strategy.name": "freeze"}):
        setup, _ = prepare(load_recipe(None, keys | fix), SilentDisplay())
        assert setup.recipe.training.microbatch == 1 or setup.recipe.training.batch_size == 1


def unpool(images: Tensor) -> Tensor:
    """The same images, through an operation that torch does not count as deterministic."""
    places = torch.arange(images[0, 0].numel()).view_as(images[0, 0]).expand_as(images)
    return torch.nn.functional.max_unpool2d(images.contiguous(), places.contiguous(), 1)


@pytest.mark.parametrize(("strategy", "norm"), [("full", "auto"), ("top", "eval"), ("scratch", "eval")])
def test_statistics_that_no_stage_learns_are_not_synchronised(strategy: str, norm: str) -> None:
    keys = {"strategy.name": strategy, "strategy.norm": norm, "training.sync_batch_norm": True}
    two = Mock(size=2)
    with pytest.raises(UsageError, match=r"strategy\.norm=eval") as error:
        _check_batch_norm(load_recipe(None, keys), torch.device("cuda"), two)
    assert "strategy.norm=train" in error.value.fix
    _check_batch_norm(load_recipe(None, keys | {"strategy.norm": "train"}), torch.device("cuda"), two)
