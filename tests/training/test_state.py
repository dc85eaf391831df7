"""What a training keeps, and gives back in the layout that the optimizer's kernels need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.training.optim import FusedSGD
from finetune.training.state import State, optimizer_tensors, restore_optimizer
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
