from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from finetune.errors import UsageError
from finetune.recipe import load_recipe
from finetune.training.optim import FusedSGD, build_mixer, build_optimizer, check_optimizer
from tests.training.helpers import build_trainer, fit_until


def settings(**training: object):
    return load_recipe(None, {f"training.{key}": value for key, value in training.items()}).training


def test_optimisers_take_rate_and_decay_from_the_groups() -> None:
    groups = [
        {"name": "head", "params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.3, "weight_decay": 0.2}
    ]
    sgd = build_optimizer([dict(group) for group in groups], settings(momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert (
        sgd.param_groups[0]["lr"],
        sgd.param_groups[0]["weight_decay"],
        sgd.param_groups[0]["momentum"],
    ) == (
        0.3,
        0.2,
        0.7,
    )
    adamw = build_optimizer([dict(group) for group in groups], settings(optimizer="adamw"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.3, 0.2)


def train_three_steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> list[float]:
    """Minimise a square from 1, and return the weight after each step."""
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
        values.append(weight.item())
    return values


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_nesterov_momentum_is_that_of_torch(nesterov: bool, fused: bool) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    group = {"params": [ours], "lr": 0.1, "weight_decay": 0.2}
    optimizer = build_optimizer([group], settings(momentum=0.7, nesterov=nesterov))
    assert optimizer.param_groups[0]["nesterov"] is nesterov
    if fused:  # as on a GPU
        optimizer = FusedSGD([dict(group)], momentum=0.7, nesterov=nesterov, fused=True)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.7, weight_decay=0.2, nesterov=nesterov)
    values = train_three_steps(optimizer, ours)
    assert values == pytest.approx(train_three_steps(reference, theirs))
    first = 1 - 0.1 * 2.2 * (1.7 if nesterov else 1)  # the first velocity is the gradient
    assert values[0] == pytest.approx(first)


@pytest.mark.parametrize(
    ("given", "found"),
    [({"optimizer": "adamw"}, "adamw has no Nesterov momentum"), ({"momentum": 0.0}, "momentum is 0")],
)
def test_nesterov_momentum_belongs_to_sgd_with_momentum(given: dict[str, object], found: str) -> None:
    check_optimizer(settings(**given))
    with pytest.raises(UsageError, match=found) as refusal:
        check_optimizer(settings(nesterov=True, **given))
    assert refusal.value.asked == "training.nesterov=true"
    assert "--set training.nesterov=false" in refusal.value.fix


def test_a_training_goes_on_with_nesterov_momentum(image_folder: Path, tmp_path: Path) -> None:
    """As with another momentum: the velocities are kept, and the new rule holds from the next step."""
    fit_until(build_trainer(image_folder, tmp_path / "plain", batch_size=12), lambda at: at.step >= 2)
    shutil.copytree(tmp_path / "plain", tmp_path / "nesterov")
    trainers = [
        build_trainer(image_folder, tmp_path / name, batch_size=12, nesterov=name == "nesterov")
        for name in ("plain", "nesterov")
    ]
    for trainer in trainers:
        fit_until(trainer, lambda at: at.step >= 3)
    plain, nesterov = (trainer.phase.optimizer for trainer in trainers)
    assert all(group["nesterov"] for group in nesterov.param_groups)
    for one, two in zip(plain.param_groups, nesterov.param_groups, strict=True):
        for before, now in zip(one["params"], two["params"], strict=True):
            assert plain.state[before]["momentum_buffer"].equal(nesterov.state[now]["momentum_buffer"])
            assert not before.equal(now)


def test_mixers_give_soft_labels_that_sum_to_one() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    assert build_mixer(settings(), 3) is None
    for chosen in ({"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}):
        mixer = build_mixer(settings(**chosen), 3)
        assert mixer is not None
        torch.manual_seed(0)
        mixed, soft = mixer(images, labels)
        assert mixed.shape == images.shape
        assert not mixed.equal(images)
        assert soft.shape == (6, 3)
        assert soft.sum(1).tolist() == pytest.approx([1] * 6)
