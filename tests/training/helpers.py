"""A network small enough to reason about, and a trainer around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.discover import discover
from finetune.data.loader import Loader, Placement
from finetune.data.transforms import Augmentation, build_eval_transform, build_train_transform
from finetune.display import SilentDisplay
from finetune.recipe import Recipe, load_recipe
from finetune.runs.folder import RunFolder
from finetune.strategy.matrix import build_plan
from finetune.training.checkpoint import CheckpointStore
from finetune.training.optimizer import build_loss
from finetune.training.task import Task
from finetune.training.trainer import Trainer
from pretrained.catalog import Preprocessing
from pretrained.stages import find_stages


class SmallNet(nn.Module):
    """Two stages with BatchNorm and dropout, and a linear head: (B, 3, H, W) -> (B, 3)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout)
        )
        self.stage2 = nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage2(self.stage1(images)).mean((2, 3)))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def place() -> Placement:
    return Placement(torch.device("cpu"), channels_last=False)


def build_trainer(
    pictures: Path,
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
    **training: Any,
) -> Trainer:
    """A trainer of SmallNet on pictures, 16 pixels; ``training`` are keys of that section of the recipe."""
    recipe = load_recipe(
        None,
        {"strategy.name": strategy, "strategy.norm": norm, "strategy.top_stages": top_stages}
        | {f"training.{key}": value for key, value in training.items()},
    )
    if network is None:
        torch.manual_seed(1)
        network = SmallNet(dropout)
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    store = CheckpointStore(run.checkpoints)
    return trainer_type(
        _task(recipe, pictures, network, augmentation, workers),
        recipe.training,
        precision="float32",
        seed=recipe.seed,
        folder=run,
        store=store,
        start=store.load(),
        display=SilentDisplay(),
    )


def _task(
    recipe: Recipe, pictures: Path, network: nn.Module, augmentation: Augmentation, workers: int
) -> Task:
    dataset = discover(pictures, 0.2, 0)
    preprocessing = Preprocessing(img_size=16)
    views = {
        "train": build_train_transform(preprocessing, augmentation),
        "val": build_eval_transform(preprocessing),
    }
    loaders = {
        split: Loader(
            dataset,
            dataset.of(split),  # type: ignore[arg-type]
            view,
            batch_size=recipe.training.batch_size if isinstance(recipe.training.batch_size, int) else 8,
            placement=place(),
            workers=workers,
            seed=recipe.seed,
            shuffle=split == "train",
        )
        for split, view in views.items()
    }
    stages = find_stages(network, preprocessing.input_size)
    rate = recipe.training.lr if isinstance(recipe.training.lr, float) else 0.01
    plan = build_plan(network, stages, recipe.strategy, rate)
    loss = build_loss(recipe.training, dataset.counts("train"))
    return Task(network, plan, loss, loaders["train"], loaders["val"], dataset.num_classes)
