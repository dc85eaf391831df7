"""Trial steps: as those of training, and without a trace."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from finetune.data.loader import Placement
from finetune.recipe import ResolvedTraining
from finetune.training.batch_size import StepTrial, find_batch_size
from finetune.training.step import Gradient
from finetune.training.task import Task
from tests.training.helpers import build_trainer


@pytest.mark.parametrize(
    ("limit", "least", "found"), [(1000, 1, 64), (64, 1, 64), (63, 1, 32), (5, 1, 4), (0, 1, 1), (0, 2, 2)]
)
def test_halves_until_it_fits(limit: int, least: int, found: int) -> None:
    assert find_batch_size(lambda size: size <= limit, 64, least) == found


def open_trial(task: Task, num_ranks: int = 1, channels_last: bool = False, **training: Any) -> StepTrial:
    keys = {"batch_size": 64, "lr": 0.01, "precision": "float32", "channels_last": channels_last} | training
    placement = Placement(torch.device("cpu"), channels_last)
    return StepTrial(
        task.network, task.plan, (3, 16, 16), placement, ResolvedTraining(**keys), num_ranks=num_ranks
    )


@pytest.fixture
def task(image_folder: Path, tmp_path: Path) -> Task:
    return build_trainer(image_folder, tmp_path, strategy="full").task


def fail_beyond(task: Task, most: int) -> list[int]:
    """Let memory run out beyond so many images; return the list that takes the tried numbers of images."""
    tried: list[int] = []

    def run_out(_: nn.Module, inputs: tuple[Tensor]) -> None:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    task.network.get_submodule("stage2").register_forward_pre_hook(run_out)
    return tried


@pytest.mark.sample(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_trial_leaves_no_trace(task: Task, optimizer: str) -> None:
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    modes = [module.training for module in task.network.modules()]
    tried = fail_beyond(task, 20)
    trial = open_trial(task, optimizer=optimizer, ema_decay=0.9, weight_decay=0.1)
    assert trial.find_batch_size() == 16
    assert tried == [71, 36, 18]
    assert all(tensor.equal(before[name]) for name, tensor in task.network.state_dict().items())
    assert [module.training for module in task.network.modules()] == modes
    assert all(parameter.grad is None for parameter in task.network.parameters())


def test_a_rank_tries_its_share_of_the_batch(task: Task) -> None:
    tried = fail_beyond(task, 20)
    assert open_trial(task, num_ranks=4).find_batch_size() == 64
    assert tried == [18]


def test_the_recipes_microbatch_is_tried(task: Task) -> None:
    tried = fail_beyond(task, 20)
    assert open_trial(task, microbatch=8).find_batch_size() == 64
    assert max(tried) == 8


@pytest.mark.sample(1)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_activations_have_the_precision_of_the_run(task: Task, precision: str) -> None:
    seen: set[tuple[torch.dtype, bool]] = set()

    def note(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        seen.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))

    task.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task.network.get_submodule("stage2.0").register_forward_hook(note)
    open_trial(task, precision=precision, channels_last=True).find_batch_size()
    assert seen == {(getattr(torch, precision), True)}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("training", "num_ranks", "number"),
    [
        ({"momentum": 0.0}, 1, 1),  # the weights
        ({}, 1, 2),  # and their momentum
        ({"optimizer": "adamw"}, 1, 3),  # and two moments
        ({"optimizer": "adamw", "ema_decay": 0.9}, 1, 4),  # and the average of the weights
        ({"optimizer": "adamw", "ema_decay": 0.9}, 2, 5),  # and buckets, in which gradients are summed
    ],
    ids=str,
)
def test_what_training_holds_is_in_memory(
    task: Task, training: dict[str, Any], num_ranks: int, number: int
) -> None:
    """Counted at the head: tensors of the shape of one convolution's weights."""
    alive: list[int] = []
    shape = task.network.get_parameter("stage2.0.weight").shape

    def count(*_: object) -> None:
        found = [
            one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and one.shape == shape
        ]
        alive.append(len({one.data_ptr() for one in found}))

    for parameter in task.network.parameters():
        parameter.grad = None
    gc.collect()
    task.network.get_submodule("head").register_forward_pre_hook(count)
    count()
    open_trial(task, num_ranks, **training).find_batch_size()
    assert [after - alive[0] + 1 for after in alive[1:]] == [number]


def test_the_peak_starts_anew_after_a_trial(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run's peak of GPU memory would be that of the trial."""
    order: list[str] = []
    monkeypatch.setattr("finetune.training.batch_size.reset_peak_memory", lambda _: order.append("reset"))
    task.network.register_forward_pre_hook(lambda *_: order.append("step"))
    open_trial(task).find_batch_size()
    assert order == ["step", "reset"]


def test_other_errors_pass(task: Task) -> None:
    with mock.patch.object(Gradient, "compute", side_effect=ValueError), pytest.raises(ValueError):
        open_trial(task).find_batch_size()
