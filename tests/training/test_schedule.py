from __future__ import annotations

import itertools
import math

import pytest
import torch

from finetune.recipe import load_recipe
from finetune.training.optim import Plateau, Schedule


def schedule(**training: object) -> Schedule:
    return Schedule.from_settings(
        load_recipe(None, {f"training.{k}": v for k, v in training.items()}).training
    )


def test_cosine_follows_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    ours = schedule(schedule="cosine", epochs=3)
    for step in range(30):
        assert ours.factor(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_warmup_grows_from_above_zero_to_one_and_hands_over() -> None:
    ours = schedule(schedule="cosine", epochs=4, warmup_epochs=1.0)
    factors = [ours.factor(step, 5) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[5:]))
    assert 0 < factors[-1] < 0.05


def test_step_decays_at_epoch_borders() -> None:
    ours = schedule(schedule="step", epochs=6, decay_epochs=2, decay_rate=0.5)
    assert [ours.factor(step, 3) for step in range(18)] == [0.5 ** (step // 6) for step in range(18)]


@pytest.mark.parametrize("steps", [1, 3, 391])
@pytest.mark.parametrize(
    ("recipe", "ends"),
    [("cifar-resnet", [100, 150]), ("wide-resnet", [60, 120, 160]), ("densenet", [150, 225])],
)
def test_a_recipe_of_full_length_decays_after_the_published_epochs(
    recipe: str, ends: list[int], steps: int
) -> None:
    settings = load_recipe(recipe).training
    ours = Schedule.from_settings(settings)
    factors = [ours.factor(step, steps) for step in range(settings.epochs * steps)]
    falls = [step / steps for step, (one, two) in enumerate(itertools.pairwise(factors), 1) if two < one]
    assert falls == ends
    assert factors[-1] == pytest.approx(settings.decay_rate ** len(ends))


def test_a_short_run_decays_as_often_as_a_long_one() -> None:
    ours = schedule(schedule="step", epochs=1, milestones=[0.3, 0.55, 0.8], decay_rate=0.5)
    assert [ours.factor(step, 20) for step in range(20)] == [1] * 6 + [0.5] * 5 + [0.25] * 5 + [0.125] * 4


def test_step_decays_at_milestones_instead() -> None:
    ours = schedule(schedule="step", epochs=6, milestones=[1 / 3, 5 / 6], decay_epochs=1, decay_rate=0.1)
    reference_parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([reference_parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5], gamma=0.1)
    for epoch in range(6):
        assert [ours.factor(3 * epoch + step, 3) for step in range(3)] == pytest.approx(
            3 * [optimizer.param_groups[0]["lr"]]
        )
        optimizer.step()
        reference.step()


def test_constant_and_plateau_leave_the_step_alone() -> None:
    for kind in ("constant", "plateau"):
        assert {schedule(schedule=kind, epochs=2).factor(step, 4) for step in range(8)} == {1.0}


def test_warmup_longer_than_the_run_is_cut() -> None:
    assert schedule(schedule="cosine", epochs=2, warmup_epochs=50.0).factor(7, 4) == 1.0


def test_plateau_decays_after_patience_and_starts_counting_again() -> None:
    plateau = Plateau(patience=2, decay_rate=0.1)
    factors = []
    for improved in (True, False, False, False, True, False, False):
        plateau.observe(improved)
        factors.append(plateau.factor)
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01])
    assert math.isclose(plateau.factor, 0.01)
