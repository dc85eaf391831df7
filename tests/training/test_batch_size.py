from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from finetune.data.loader import Batch
from finetune.training.batch_size import find_batch_size, fit_batch_size
from finetune.training.step import Gradient
from tests.training.helpers import build_trainer, place


@pytest.mark.parametrize(
    ("limit", "least", "found"), [(1000, 1, 64), (64, 1, 64), (63, 1, 32), (5, 1, 4), (0, 1, 1), (0, 2, 2)]
)
def test_halves_until_it_fits(limit: int, least: int, found: int) -> None:
    assert find_batch_size(lambda size: size <= limit, 64, least) == found


def test_a_trial_leaves_no_trace(image_folder: Path, tmp_path: Path) -> None:
    task = build_trainer(image_folder, tmp_path, strategy="full").task
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    modes = [module.training for module in task.network.modules()]
    compute = Gradient.compute
    tried: list[int] = []

    def short_of_memory(self: Gradient, batch: Batch, microbatch: int = 0) -> torch.Tensor:
        tried.append(len(batch.labels))
        if len(batch.labels) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, batch, microbatch)

    with mock.patch.object(Gradient, "compute", short_of_memory):
        assert fit_batch_size(task.network, task.plan, (3, 16, 16), place(), 64) == 16
    assert tried == [80, 40, 20]
    assert all(tensor.equal(before[name]) for name, tensor in task.network.state_dict().items())
    assert [module.training for module in task.network.modules()] == modes
    assert all(parameter.grad is None for parameter in task.network.parameters())


def test_other_errors_pass(image_folder: Path, tmp_path: Path) -> None:
    task = build_trainer(image_folder, tmp_path, strategy="full").task
    with mock.patch.object(Gradient, "compute", side_effect=ValueError), pytest.raises(ValueError):
        fit_batch_size(task.network, task.plan, (3, 16, 16), place(), 64)
