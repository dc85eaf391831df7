"""What a training keeps, and gives back in the layout that the optimizer's kernels need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.training.optim import FusedSGD, find_odd_state, has_other_optimizer
from finetune.training.standardize import are_moments
from finetune.training.state import (
    HISTORY_COLUMNS,
    Checkpoint,
    Progress,
    Snapshot,
    State,
    find_misfit,
    optimizer_tensors,
    restore_optimizer,
)
from finetune.training.trainer import Trainer
from tests.training.helpers import SmallNet, assert_same_end, build_trainer, fit_until

OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.0},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "precision": "bfloat16"},
]


def build(image_folder: Path, folder: Path, **training: Any) -> Trainer:
    """A trainer of a channels-last network, with a moving average."""
    torch.manual_seed(1)
    network = SmallNet().to(memory_format=torch.channels_last)
    words = {"epochs": 2, "batch_size": 8, "lr": 0.01, "ema_decay": 0.9} | training
    return build_trainer(image_folder, folder, network=network, **words)


def strides(tensor: Tensor) -> list[int]:
    """The strides that matter: not those of dimensions of size 1."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def pairs_of_state(state: State) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every kept tensor with the weight whose layout it must have, by name."""
    names = {id(weight): name for name, weight in state.network.named_parameters()}
    for weight, kept in state.optimizer.state.items():
        for key, tensor in kept.items():
            if tensor.shape == weight.shape:
                yield f"{names[id(weight)]}:{key}", tensor, weight
    weights = dict(state.network.named_parameters())
    assert state.average is not None
    for name, tensor in state.average.named_parameters():
        yield f"ema.{name}", tensor, weights[name]


def assert_layouts(state: State, num_moments: int) -> None:
    pairs = list(pairs_of_state(state))
    assert len(pairs) == (1 + num_moments) * len(list(state.network.parameters()))
    assert [name for name, tensor, weight in pairs if strides(tensor) != strides(weight)] == []
    convolution = state.network.get_submodule("stage2.0")
    assert isinstance(convolution, nn.Conv2d)
    assert not convolution.weight.is_contiguous()


@pytest.mark.parametrize("training", OPTIMIZERS, ids=str)
def test_kept_tensors_have_the_layout_of_their_weights(
    image_folder: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    """After training, after a return to a snapshot, and after loading a checkpoint file."""
    moments = {"sgd": int(training.get("momentum", 0.9) > 0), "adamw": 2}[training["optimizer"]]
    one = build(image_folder, tmp_path / "parts", **training)
    fit_until(one, lambda at: at.step >= 3)
    assert_layouts(one.state, moments)
    one.state.restore(one.state.take())
    assert_layouts(one.state, moments)
    two = build(image_folder, tmp_path / "parts", **training)
    two._begin()
    assert two.progress.step == 3
    assert_layouts(two.state, moments)


def test_a_channels_last_training_resumes_to_the_same_bits(image_folder: Path, tmp_path: Path) -> None:
    build(image_folder, tmp_path / "whole").fit()
    fit_until(build(image_folder, tmp_path / "parts"), lambda at: at.step >= 3)
    build(image_folder, tmp_path / "parts").fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


# --- fused kernels, which torch has for a CPU too ---


def channels_last(fused: bool, kind: str) -> tuple[nn.Conv2d, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind == "sgd":
        return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=fused)
    return network, torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)


def step(network: nn.Conv2d, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    optimizer.zero_grad()
    network(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_fused_step_after_a_return_is_that_of_a_plain_one(kind: str) -> None:
    weights = []
    for fused in (False, True):
        network, optimizer = channels_last(fused, kind)
        step(network, optimizer, seed=1)
        kept = {name: tensor.contiguous() for name, tensor in optimizer_tensors(network, optimizer).items()}
        restore_optimizer(network, optimizer, kept)
        step(network, optimizer, seed=2)
        weights.append(network.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_a_fused_first_step_that_overflows_leaves_no_momentum() -> None:
    """float16 finds its scale by overflows, so the first step is often skipped."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        weights = [train_after_overflow(fused) for fused in (False, True)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights[0].equal(weights[1])
    assert weights[1].unique().tolist() == pytest.approx([1 - 0.1 - 0.19])


def train_after_overflow(fused: bool) -> Tensor:
    """The weights after a first step that a real loss scaler skips, and two more."""
    weight = nn.Parameter(torch.ones(64))
    kind = FusedSGD if fused else torch.optim.SGD
    optimizer = kind([weight], lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (float("inf"), 1.0, 1.0):
        optimizer.zero_grad(set_to_none=True)
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return weight.detach()


# --- what a checkpoint may say ---

ROW = dict.fromkeys(HISTORY_COLUMNS, 1.0)
SOUND = {
    "epoch": 1,
    "best": {"accuracy": 0.5, "loss": 1.0},
    "best_epoch": 0,
    "history": [ROW],
    "lost": {"a.jpg": "gone"},
}
ODD: list[dict[str, Any]] = [
    *({key: value} for key in ("epoch", "step", "batch", "num_seen") for value in (-1, True, 1.0, "1", None)),
    *(
        {key: value}
        for key in ("lr", "loss_sum", "rate_factor")
        for value in (-1, float("nan"), "1", 10**400)
    ),
    {"best": {}},
    {"best": {"accuracy": 1.0}},
    {"best": {"accuracy": 1.0, "loss": "low"}},
    {"best_epoch": -1},
    {"best_epoch": -2},
    {"best_epoch": 2},
    {"history": {}},
    {"history": [{}]},
    {"history": [ROW | {"epoch": float("inf")}]},
    {"scaler": {"scale": 1.0}},
    {"scaler": 5},
    {"lost": {"a.jpg": 5}},
    {"lost": []},
    {"unknown": 1},
]


def test_the_progress_of_a_checkpoint_is_read_only_if_a_training_can_have_it() -> None:
    assert Progress.from_json(json.dumps(SOUND)) == Progress(**SOUND)  # type: ignore[arg-type]
    assert Progress.from_json("{}") == Progress()
    for text in ("[]", "null", "5", "{", *(json.dumps(SOUND | odd) for odd in ODD)):
        with pytest.raises(ValueError, match=r"progress|value|unknown|Expecting"):
            Progress.from_json(text)


def forged(trainer: Trainer, change: Callable[[dict[str, Tensor]], object]) -> Checkpoint:
    """The state of a trainer as a checkpoint, with other tensors."""
    now = trainer._take()
    tensors = dict(now.tensors)
    change(tensors)
    other = Snapshot(tensors, now.progress)
    return Checkpoint(other, other, None)


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    """A change of the first tensor whose name begins and ends so."""
    start, _, end = name.partition("...")

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.startswith(start) and key.endswith(end))
        tensors[key] = make(tensors[key])

    return change


MISFITS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "another shape": replaced("model.", lambda _: torch.zeros(2)),
    "int8 (": replaced("model.", lambda tensor: tensor.to(torch.int8)),
    "hold nan": replaced("model.", lambda tensor: tensor * float("nan")),
    "hold infinity": replaced("ema.", lambda tensor: tensor + float("inf")),
    "no moving average": replaced("ema.", lambda _: torch.zeros(2)),
    "such as head.bias": lambda tensors: tensors.pop("model.head.bias"),
    "such as more": lambda tensors: tensors.update({"model.more": torch.zeros(2)}),
}


@pytest.mark.parametrize("said", MISFITS)
def test_a_checkpoint_of_other_tensors_does_not_fit(image_folder: Path, tmp_path: Path, said: str) -> None:
    trainer = build(image_folder, tmp_path)
    frozen = trainer.state.frozen
    assert find_misfit(forged(trainer, lambda _: None), trainer.task.network, frozen, has_average=True) == ""
    found = find_misfit(forged(trainer, MISFITS[said]), trainer.task.network, frozen, has_average=True)
    assert said.replace("infinity", "nan or infinity") in found or said in found


ODD_STATE: tuple[Callable[[dict[str, Tensor]], object], ...] = (
    replaced("optimizer...:exp_avg", lambda _: torch.zeros(2)),
    replaced("optimizer...:exp_avg", lambda tensor: tensor.long()),
    replaced("optimizer...:step", lambda _: torch.tensor(-5.0)),
    replaced("optimizer...:step", lambda _: torch.tensor(float("nan"))),
    lambda tensors: tensors.pop("optimizer.head.bias:exp_avg_sq"),
    lambda tensors: tensors.update({"optimizer.more:exp_avg": torch.zeros(2)}),
)


@pytest.mark.parametrize("number", range(len(ODD_STATE)))
def test_a_state_of_another_optimizer_is_found(image_folder: Path, tmp_path: Path, number: int) -> None:
    trainer = build(image_folder, tmp_path, optimizer="adamw")
    fit_until(trainer, lambda at: at.step >= 1)
    assert find_odd_state(forged(trainer, lambda _: None), trainer.task.network) == ""
    assert find_odd_state(forged(trainer, ODD_STATE[number]), trainer.task.network).startswith(
        ("head", "stage", "more")
    )


def test_an_optimizer_without_one_of_its_tensors_starts_afresh(image_folder: Path, tmp_path: Path) -> None:
    trainer = build(image_folder, tmp_path, optimizer="adamw")
    fit_until(trainer, lambda at: at.step >= 1)

    def leave_out(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(":exp_avg_sq")]:
            del tensors[key]

    assert not has_other_optimizer(forged(trainer, lambda _: None), trainer.settings)
    assert has_other_optimizer(forged(trainer, leave_out), trainer.settings)


def test_moments_of_another_classifier_are_found(image_folder: Path, tmp_path: Path) -> None:
    network = SmallNet()
    moments = {"head.mean": torch.zeros(8), "head.std": torch.ones(8)}
    assert are_moments(network, {}) and are_moments(network, moments)
    for odd in (
        {"head.std": torch.zeros(8)},
        {"head.std": torch.ones(3)},
        {"head.std": torch.ones(8).double()},
        {"head.mean": torch.full((8,), float("nan"))},
        {"tail.mean": torch.zeros(8)},
        {"stage1.1.mean": torch.zeros(6), "stage1.1.std": torch.ones(6)},
    ):
        assert not are_moments(network, moments | odd), odd
    assert not are_moments(network, {"head.mean": torch.zeros(8)})
