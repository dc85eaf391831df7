"""One step: how few images it takes, what is given back of it, and what is not meant to be finite."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.data.loader import Batch
from finetune.training import trainer as trainer_module
from finetune.training.step import BufferBackup, Gradient, halve, has_enough_images
from finetune.training.task import choose_microbatch
from pretrained.zoo.base import AuxiliaryLogits
from tests.training.helpers import NormFree, SmallNet, build_trainer


def batch_of(number: int, lost: int = 0) -> Batch:
    """A batch of so many images, out of more that are gone."""
    labels = torch.arange(number) % 3
    return Batch(torch.randn(number, 3, 16, 16), labels, labels, {f"{n}.jpg": "gone" for n in range(lost)})


@pytest.mark.parametrize(
    ("network", "number", "lost", "learnable"),
    [
        (SmallNet, 2, 6, True),
        (SmallNet, 1, 7, False),  # BatchNorm cannot train on a single value
        (SmallNet, 1, 0, True),  # the user asked for batches of one
        (NormFree, 1, 7, True),
        (NormFree, 0, 8, False),
    ],
)
def test_a_batch_of_which_too_much_was_lost_is_left_out(
    network: type[SmallNet], number: int, lost: int, learnable: bool
) -> None:
    assert has_enough_images(network().train(), number, bool(lost)) == learnable


def test_a_step_without_images_counts_and_learns_nothing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "refuse_many_lost", lambda *_: None)
    trainer = build_trainer(image_folder, tmp_path, epochs=1, batch_size=8)
    before = {name: tensor.clone() for name, tensor in trainer.task.network.state_dict().items()}
    assert trainer._train_step(batch_of(1, lost=7))
    after = trainer.task.network.state_dict()
    assert [name for name in before if not before[name].equal(after[name])] == []
    assert (trainer.progress.batch, trainer.progress.step, trainer.progress.num_seen) == (1, 1, 0)
    assert len(trainer.progress.lost) == 7


@pytest.mark.parametrize(("network", "sizes"), [(SmallNet, [9, 5, 3, 2, 2]), (NormFree, [9, 5, 3, 2, 1, 1])])
def test_halves_end_at_what_a_network_needs(network: type[SmallNet], sizes: list[int]) -> None:
    found = [9]
    while len(found) < len(sizes):
        found.append(halve(network().train(), found[-1]))
    assert found == sizes


@pytest.mark.parametrize(("number", "microbatch"), [(5, 2), (3, 2), (7, 3), (9, 4), (8, 8), (1, 1)])
def test_no_part_is_a_single_image_where_batchnorm_learns(number: int, microbatch: int) -> None:
    network, sizes = SmallNet().train(), []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Gradient(network, nn.CrossEntropyLoss(), None, scaler, "float32").compute(batch_of(number), microbatch)
    assert sum(sizes) == number
    assert min(sizes) >= min(2, number)
    assert max(sizes) <= microbatch + 1


class WithAuxiliary(NormFree):
    """A network with a second classifier on its first stage, as GoogLeNet has two."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(6, 3)
        self.auxiliary_logits: list[AuxiliaryLogits] | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.stage1(images)
        if self.auxiliary_logits is not None and self.auxiliary.training:
            self.auxiliary_logits.append(AuxiliaryLogits(self.auxiliary(first.mean((2, 3))), 0.3))
        logits: torch.Tensor = self.head(self.stage2(first).mean((2, 3)))
        return logits


@pytest.mark.parametrize("microbatch", [0, 3])
def test_the_loss_of_auxiliary_classifiers_is_added_with_their_weight(microbatch: int) -> None:
    torch.manual_seed(0)
    network, batch = WithAuxiliary().train(), batch_of(7)
    network(batch.images)  # nobody collects: no graph stays in the network
    own = copy.deepcopy(network)
    first = own.stage1(batch.images)
    expected = F.cross_entropy(own.head(own.stage2(first).mean((2, 3))), batch.labels)
    expected = expected + 0.3 * F.cross_entropy(own.auxiliary(first.mean((2, 3))), batch.labels)
    expected.backward()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = Gradient(network, nn.CrossEntropyLoss(), None, scaler, "float32").compute(batch, microbatch)
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(network.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    copy.deepcopy(network)


def test_auxiliary_classifiers_in_evaluation_mode_add_nothing() -> None:
    torch.manual_seed(0)
    network, batch = WithAuxiliary().train(), batch_of(7)
    network.auxiliary.eval()  # as a frozen stage is
    expected = F.cross_entropy(network(batch.images), batch.labels)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = Gradient(network, nn.CrossEntropyLoss(), None, scaler, "float32").compute(batch)
    torch.testing.assert_close(loss, expected.detach())


def test_buffers_are_given_back_and_only_those_that_may_change() -> None:
    network = SmallNet().train()
    network.stage1.eval()
    kept = BufferBackup(network)
    kept.keep()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for _, buffer in network.named_buffers():
        buffer.add_(1)
    kept.restore()
    same = {name: buffer.equal(before[name]) for name, buffer in network.named_buffers()}
    assert same == {name: name.startswith("stage2") for name in same}
    assert sum(same.values()) == 3


def test_a_mask_of_infinities_is_no_running_statistic() -> None:
    class Masked(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((2, 2), -float("inf")))

    network = Masked().train()
    sums = BufferBackup(network).add_up()
    assert [value.item() for value in sums] == [14.0]  # 6 + 8 variances of 1
    network.get_buffer("stage1.1.running_var")[0] = float("nan")
    assert BufferBackup(network.eval()).add_up() == []


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_running_statistic_that_is_no_number_is_found(value: float) -> None:
    network = SmallNet().train()
    kept = BufferBackup(network)
    network.get_buffer("stage2.1.running_mean")[3] = value
    assert not kept.add_up()[0].isfinite()


class Calls(TorchDispatchMode):
    """Operations and the types of the tensors in each of their lists."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[set[torch.dtype]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keys: Any = None) -> Any:
        lists = [{one.dtype for one in part} for part in arguments if isinstance(part, (list, tuple))]
        self.seen.append((function.__name__.partition(".")[0], lists))
        return function(*arguments, **keys or {})


@pytest.mark.parametrize("number", [1, 30])
def test_the_guards_of_a_step_are_a_few_operations_however_many_layers(number: int) -> None:
    """A GPU copies a list of one type with one kernel, and a mixed one with a kernel for each tensor."""
    buffers = BufferBackup(nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(number)]).train())
    with Calls() as calls:
        buffers.keep()
        buffers.restore()
        buffers.add_up()
    names = [name for name, _ in calls.seen]
    assert names == 4 * ["_foreach_copy_"] + ["_foreach_norm", "stack", "sum"]
    assert all(len(types) == 1 for _, lists in calls.seen for types in lists)


def test_a_recipe_can_ask_for_parts(image_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, sizes = NormFree(), list[int]()
    one = copy.deepcopy(network)
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = build_trainer(image_folder, tmp_path / "whole", network=one, epochs=1, batch_size=12)
    parts = build_trainer(
        image_folder, tmp_path / "parts", network=network, epochs=1, batch_size=12, microbatch=4
    )
    assert parts.fit().microbatch == 4
    assert sizes[:9] == [4] * 9
    whole.fit()
    for left, right in zip(whole.eval_network.parameters(), parts.eval_network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "batch_size", "size"),
    [(NormFree(), 100, 64), (NormFree(), 64, 0), (SmallNet(), 100, 0), (NormFree(), 8, 0)],
)
def test_a_cpu_takes_parts_that_fit_where_that_is_exact(
    image_folder: Path, tmp_path: Path, network: SmallNet, batch_size: int, size: int
) -> None:
    task = build_trainer(image_folder, tmp_path, network=network, batch_size=batch_size).task
    assert choose_microbatch(task) == size


def test_dropout_keeps_batches_whole(image_folder: Path, tmp_path: Path) -> None:
    network = NormFree()
    network.stage2[3].p = 0.1
    task = build_trainer(image_folder, tmp_path, network=network, batch_size=100).task
    assert choose_microbatch(task) == 0
    frozen = build_trainer(
        image_folder, tmp_path / "f", network=network, batch_size=100, strategy="freeze"
    ).task
    assert choose_microbatch(frozen) == 64
