from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.data.loader import Batch, Placement
from finetune.evaluation.predictions import predict
from finetune.targets import SINGLE
from tests.pretend_device import PretendTensor, pretended_device
from tests.training.helpers import SmallNet, build_trainer


def test_predictions_are_in_order_and_modes_are_restored(image_folder: Path, tmp_path: Path) -> None:
    network = SmallNet(dropout=0.5).train()
    network.stage1.eval()
    loader = build_trainer(image_folder, tmp_path, network=network, batch_size=4).task.val
    modes = [module.training for module in network.modules()]
    seen: list[int] = []
    predictions = predict(network, loader, "float32", seen.append)
    assert sum(seen) == 18
    assert predictions.logits.shape == (18, 3)
    assert predictions.labels.tolist() == [sample.label for sample in loader.samples]
    assert [module.training for module in network.modules()] == modes
    assert predict(network, loader, "float32").logits.equal(predictions.logits)  # no dropout
    torch.testing.assert_close(predictions.probabilities.sum(1), torch.ones(18))


def test_modes_are_restored_after_an_error(image_folder: Path, tmp_path: Path) -> None:
    class Failing(SmallNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not self.training and images.shape[0] == 4 and torch.is_inference_mode_enabled():
                raise RuntimeError("on purpose")
            return super().forward(images)

    network = Failing().train()
    loader = build_trainer(image_folder, tmp_path, network=network, batch_size=4).task.val
    with pytest.raises(RuntimeError, match="on purpose"):
        predict(network, loader, "float32")
    assert all(module.training for module in network.modules())


class _Feed:
    """Ten batches of four images on a device."""

    input_size = None
    target = SINGLE

    def __init__(self, device: torch.device) -> None:
        self.placement = Placement(torch.device("cpu"), channels_last=False)
        self._batches = [
            Batch(
                torch.full((4, 3), float(n)).to(device), torch.full((4,), n).to(device), torch.arange(4), {}
            )
            for n in range(10)
        ]

    def num_batches(self) -> int:
        return len(self._batches)

    def batches(self) -> Iterator[Batch]:
        return iter(self._batches)


def test_a_gpu_holds_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and once more when they are joined, may be gigabytes."""
    monkeypatch.setattr("finetune.evaluation.predictions.HELD_BYTES", 3 * 4 * 5 * 4)
    alive: list[int] = []

    def forward(images: Tensor) -> Tensor:
        alive.append(sum(type(one) is PretendTensor and one.shape == (4, 5) for one in gc.get_objects()))
        return torch.cat([images, images[:, :2]], 1)

    with pretended_device() as device:
        feed: Any = _Feed(device)
        found = predict(nn.Identity(), feed, "float32", forward=forward)
    assert found.logits.device.type == found.labels.device.type == "cpu"
    assert found.labels.tolist() == [n for n in range(10) for _ in range(4)]
    assert found.logits[:, 4].tolist() == found.labels.tolist()
    assert alive == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
