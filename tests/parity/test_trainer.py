"""Our trainer against a torch loop of a dozen lines: same weights, order and rates, so the same losses."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.data.discover import discover
from finetune.data.loader import ImageLoader
from finetune.data.split import SplitConfig
from finetune.data.transforms import build_eval_transform
from pretrained.preprocessing import Preprocessing
from tests.training.helpers import build_trainer, place

EPOCHS, BATCH, RATE = 3, 5, 0.05


def plain_loop(network: nn.Module, loader: ImageLoader, decay: float) -> list[float]:
    """What a tutorial would write: three groups, momentum, cosine."""
    stages = (network.stage1, network.stage2, network.head)
    groups = [
        {
            "params": [p for p in stage.parameters() if (p.ndim > 1) == heavy],
            "lr": RATE * factor,
            "base": RATE * factor,
        }
        | {"weight_decay": decay if heavy else 0.0}
        for stage, factor in zip(stages, (0.01, 0.1, 1.0), strict=True)
        for heavy in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    total, step, losses = EPOCHS * loader.num_batches(), 0, []
    for epoch in range(EPOCHS):
        network.train()
        for images, labels, *_ in loader.batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * (1 + math.cos(math.pi * step / total)) / 2
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.item() * len(labels))
    return losses


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_losses_equal_those_of_a_plain_loop(image_folder: Path, tmp_path: Path, decay: float) -> None:
    trainer = build_trainer(
        image_folder,
        tmp_path,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=RATE,
        weight_decay=decay,
        strategy="full",
    )
    network = copy.deepcopy(trainer.task.network)
    dataset = discover(image_folder, SplitConfig(0.2, 0))
    loader = ImageLoader(
        dataset,
        dataset.of("train"),
        build_eval_transform(Preprocessing(img_size=16)),
        batch_size=BATCH,
        placement=place(),
        workers=0,
        seed=0,
        shuffle=True,
    )
    expected = plain_loop(network, loader, decay)
    progress = trainer.fit()
    steps = loader.num_batches()
    sums = [sum(expected[epoch * steps : (epoch + 1) * steps]) for epoch in range(EPOCHS)]
    ours = [row["train_loss"] * len(dataset.of("train")) for row in progress.history]
    assert ours == pytest.approx(sums, abs=1e-6)
    assert ours[-1] < ours[0]  # they did learn
