"""A strategy of several phases that a test defines trains through the public way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetune.errors import InterruptedRunError, UsageError
from finetune.pipeline.run import run
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.training.trainer import Trainer
from finetune.training.trunk import FeatureLoader
from pretrained.state_dict import digest_tensors
from tests.strategies.gradual import gradual_unfreezing
from tests.sweeps import slow_except
from tests.training.helpers import assert_same_end

EPOCHS = 4


@pytest.fixture(autouse=True)
def gradual() -> Iterator[None]:
    with gradual_unfreezing():
        yield


Train = Callable[..., RunFolder]


@pytest.fixture
def train(image_folder: Path, tiny: Path, tmp_path: Path) -> Train:
    """``train("run", **keys)`` is a run of gradual unfreezing on the tiny network, in two phases."""

    def build(output: str, **keys: Any) -> RunFolder:
        settings = {
            "backbone.name": str(tiny),
            "data.path": str(image_folder),
            "data.workers": 0,
            "strategy.name": "gradual",
            "training.epochs": EPOCHS,
            "training.batch_size": 8,
            "training.lr": 0.05,
            "input.augmentation": "none",
        }
        return run(load_recipe(None, settings | keys), tmp_path / output).folder

    return build


def stages_of(trainer: Trainer) -> dict[str, str]:
    """One sha256 of each stage."""
    every = {name for row in trainer.task.plan.rows for name in row.stage.parameters}
    modules = {name for row in trainer.task.plan.rows for name in row.stage.modules}
    return {
        row.stage.name: digest_tensors(
            trainer.task.network, every - {*row.stage.parameters}, modules - {*row.stage.modules}
        )
        for row in trainer.task.plan.rows
    }


def test_what_is_frozen_in_a_phase_keeps_every_bit(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three phases over five epochs: the head; with it layer4; with them layer3."""
    seen: list[dict[str, str]] = []
    finish = Trainer._train_epoch

    def train_epoch(self: Trainer) -> bool:
        seen.append(stages_of(self))
        return finish(self)

    monkeypatch.setattr(Trainer, "_train_epoch", train_epoch)
    keys = {"strategy.top_stages": 2, "cache.trunk": False, "training.epochs": 5}
    folder = train("run", **keys)
    *_, third, fourth, head = seen[0]
    moved = [{name for name in before if before[name] != after[name]} for before, after in pairwise(seen)]
    assert moved == [{head}, {head}, {head, fourth}, {head, fourth, third}]
    plan = pd.read_csv(folder.plan)
    assert list(plan.columns) == ["group", "stage", "parameters", "trained", "rate", "norm"]
    assert list(plan.stage[plan.trained]) == [third, fourth, head]
    assert list(plan.rate[plan.trained]) == [0.05] * 3
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["strategy"] == "gradual"
    assert metrics["accuracy"] > 0.6
    assert "phase 3, from epoch 4" in folder.log.read_text()


@pytest.mark.parametrize(
    "step", slow_except([13], [3, 10, 13])
)  # 5 steps an epoch; the second phase begins after 10
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    train: Train, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    keys = {"training.ema_decay": 0.9, "training.optimizer": "adamw", "training.lr": 0.01}
    whole = train("whole", **keys)
    made = Trainer._train_step

    def train_step(self: Trainer, *arguments: Any) -> bool:
        self.stop_asked = lambda: self.progress.step == step
        return made(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        with pytest.raises(InterruptedRunError):
            train("parts", **keys)
    parts = train("parts", **keys)
    assert_same_end(whole.path, parts.path)
    for name in ("model/model.safetensors", "predictions.csv", "plan.csv"):
        assert (whole.path / name).read_bytes() == (parts.path / name).read_bytes(), name


@pytest.mark.slow
def test_the_trunk_is_what_every_phase_freezes(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once, and the rest learns in two phases what the whole network would have learnt."""
    fed: list[Any] = []
    fit = Trainer.fit

    def keep_feed(self: Trainer) -> Any:
        fed.append(self.task.train)
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", keep_feed)
    cut, whole = train("cut"), train("whole", **{"cache.trunk": False})
    assert [isinstance(feed, FeatureLoader) for feed in fed] == [True, False]
    assert str(RunReader(cut).trunk["cut"]).startswith("input of layer3")
    one, two = pd.read_csv(cut.history), pd.read_csv(whole.history)
    assert len(one) == EPOCHS
    for column in ("train_loss", "eval_loss"):
        assert one[column].to_numpy() == pytest.approx(two[column].to_numpy(), abs=1e-3)


def test_fewer_epochs_than_phases_are_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 phases"):
        train("run", **{"training.epochs": 1})
    assert not (tmp_path / "run").exists()
