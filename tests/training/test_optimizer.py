from __future__ import annotations

import pytest
import torch

from finetune.recipe import load_recipe
from finetune.training.optim import build_mixer, build_optimizer


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
