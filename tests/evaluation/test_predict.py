from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.evaluation.predictions import predict
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
