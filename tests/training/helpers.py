"""A network small enough to reason about, a trainer around it, trouble for it, and how two compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.data.discover import discover
from finetune.data.loader import Batch, ImageLoader, Placement
from finetune.data.split import SplitConfig
from finetune.data.transforms import build_eval_transform, build_train_transform
from finetune.errors import InterruptedRunError
from finetune.recipe import Augmentation, Recipe, load_recipe
from finetune.runs.folder import RunFolder
from finetune.system.device import Precision
from finetune.system.display import SilentDisplay
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.targets import build_loss
from finetune.training.checkpoint import CheckpointStore
from finetune.training.plan import build_plan
from finetune.training.state import Checkpoint, Progress
from finetune.training.step import Gradient
from finetune.training.task import Task
from finetune.training.trainer import Trainer
from pretrained.graph.stages import find_stages
from pretrained.preprocessing import Preprocessing

EVERYTHING_ON: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.05,
    "augmentation": "light",
    "dropout": 0.2,
    "mixup": 0.3,
    "cutmix": 1.0,
    "ema_decay": 0.9,
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "clip_grad": 1.0,
}
"""Settings that bring every kind of state into a training."""


class SmallNet(nn.Module):
    """Two stages with BatchNorm and dropout, and a linear head: (B, 3, H, W) -> (B, 3).

    The convolutions have no bias: before a BatchNorm its gradient is rounding noise, which differs between
    processors, and AdamW makes steps of full length of it.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout)
        )
        self.stage2 = nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage2(self.stage1(images)).mean((2, 3)))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


class NormFree(SmallNet):
    """SmallNet whose images do not see each other: parts of a batch give the gradient of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1[1], self.stage2[1] = nn.GroupNorm(2, 6), nn.GroupNorm(2, 8)


class Listener(SilentDisplay):
    """A display that shows nothing and remembers every warning."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def place() -> Placement:
    return Placement(torch.device("cpu"), channels_last=False)


def build_trainer(
    image_folder: Path,
    folder: Path,
    *,
    strategy: str = "full",
    augmentation: Augmentation = "none",
    dropout: float = 0.0,
    workers: int = 0,
    network: nn.Module | None = None,
    trainer_type: type[Trainer] = Trainer,
    norm: str = "train",
    top_stages: int = 1,
    precision: Precision = "float32",
    distributed: Distributed = SINGLE_PROCESS,
    placement: Placement | None = None,
    **training: Any,
) -> Trainer:
    """A trainer of SmallNet on images, 16 pixels; ``training`` are keys of that section of the recipe."""
    recipe = load_recipe(
        None,
        {"strategy.name": strategy, "strategy.norm": norm, "strategy.top_stages": top_stages}
        | {f"training.{key}": value for key, value in training.items()},
    )
    if network is None:
        torch.manual_seed(1)
        network = SmallNet(dropout)
    placement = placement or place()
    network.to(placement.device)
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    store, listener = CheckpointStore(run.checkpoints), Listener()
    return trainer_type(
        _task(recipe, image_folder, network, augmentation, workers, placement, distributed),
        recipe.training,
        precision=precision,
        seed=recipe.seed,
        folder=run,
        store=store,
        start=store.load(listener.warn),
        display=listener,
        distributed=distributed,
    )


def _task(
    recipe: Recipe,
    image_folder: Path,
    network: nn.Module,
    augmentation: Augmentation,
    workers: int,
    placement: Placement,
    distributed: Distributed,
) -> Task:
    dataset = discover(image_folder, SplitConfig(0.2, 0))
    preprocessing = Preprocessing(img_size=16)
    views = {
        "train": build_train_transform(preprocessing, augmentation),
        "val": build_eval_transform(preprocessing),
    }
    loaders = {
        split: ImageLoader(
            dataset,
            dataset.of(split),  # type: ignore[arg-type]
            view,
            batch_size=recipe.training.batch_size if isinstance(recipe.training.batch_size, int) else 8,
            placement=placement,
            workers=workers,
            seed=recipe.seed,
            shuffle=split == "train",
            distributed=distributed,
        )
        for split, view in views.items()
    }
    stages = find_stages(network, preprocessing.input_size)
    rate = recipe.training.lr if isinstance(recipe.training.lr, float) else 0.01
    plan = build_plan(network, stages, recipe.strategy, rate, recipe.training.epochs)
    loss = build_loss(dataset.counts("train"), recipe.training.class_weights, recipe.training.label_smoothing)
    return Task(
        network, plan, loss.to(placement.device), loaders["train"], loaders["val"], dataset.num_classes
    )


# --- trouble -------------------------------------------------------------------------------------


def corrupt(when: Callable[[Progress], bool], factor: float = float("nan")) -> type[Trainer]:
    """A trainer whose images are multiplied by a factor in some steps: by NaN, unless told otherwise."""

    class Corrupted(Trainer):
        def _train_step(self, batch: Batch) -> bool:
            if when(self.progress):
                batch = batch._replace(images=batch.images * factor)
            return super()._train_step(batch)

    return Corrupted


def exhaust_memory(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
    """A real allocation fails in the second gradient; the list that is returned gets every microbatch."""
    plain, microbatches = Gradient.compute, []

    def exhaust(self: Gradient, batch: Batch, microbatch: int = 0, *rest: Any) -> Tensor:
        microbatches.append(microbatch)
        if len(microbatches) == 2:
            torch.empty(2**50, device=device)
        return plain(self, batch, microbatch, *rest)

    monkeypatch.setattr(Gradient, "compute", exhaust)
    return microbatches


def stop_after(trainer: Trainer, steps: int) -> None:
    trainer.stop_asked = lambda: trainer.progress.step >= steps


def fit_until(trainer: Trainer, when: Callable[[Progress], bool]) -> None:
    """Train, and be interrupted at a place."""
    trainer.stop_asked = lambda: when(trainer.progress)
    with pytest.raises(InterruptedRunError):
        trainer.fit()


# --- comparing -----------------------------------------------------------------------------------

_CLOCKS = ("epoch_seconds", "wait_seconds", "history")


def warnings(trainer: Trainer) -> list[str]:
    assert isinstance(trainer.display, Listener)
    return trainer.display.warnings


def saved(folder: Path) -> Checkpoint:
    """The newest checkpoint of a run folder."""
    checkpoint = CheckpointStore(folder / "checkpoints").load()
    assert checkpoint is not None
    return checkpoint


def metrics_of(progress: Progress) -> list[dict[str, float]]:
    """The history, without what a clock has measured."""
    timed = ("seconds", "images_per_second", "data_wait_fraction")
    return [{key: value for key, value in row.items() if key not in timed} for row in progress.history]


def assert_same_tensors(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name, tensor in one.items() if not tensor.equal(two[name])] == []


def assert_same_end(one: Path, two: Path, but_for: Collection[str] = ()) -> None:
    """Two finished runs are the same in every bit: weights, averages, optimiser, best epoch, counters."""
    left, right = saved(one), saved(two)
    assert_same_tensors(left.now.tensors, right.now.tensors)
    assert left.best is not None and right.best is not None
    assert_same_tensors(left.best.tensors, right.best.tensors)
    assert metrics_of(left.now.progress) == metrics_of(right.now.progress)
    leave_out = {*_CLOCKS, *but_for}
    counters, others = asdict(left.now.progress), asdict(right.now.progress)
    assert {k: v for k, v in counters.items() if k not in leave_out} == {
        k: v for k, v in others.items() if k not in leave_out
    }
