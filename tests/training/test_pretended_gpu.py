"""A pretended GPU: no tensor of the CPU meets one of the device, and the numbers are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.data.dataset import Sample
from finetune.data.loader import Placement
from finetune.explain.attribution.cam import GradCam
from finetune.features.rows import MemoryRows
from finetune.recipe import StrategySettings
from finetune.targets import SINGLE
from finetune.training.freeze import freeze
from finetune.training.plan import build_plan
from finetune.training.trainer import Trainer
from finetune.training.trunk import FeatureLoader, choose_cut
from pretrained.graph.stages import find_stages
from tests.pretend_device import pretended_device
from tests.training.helpers import EVERYTHING_ON, SmallNet, assert_same_end, build_trainer, fit_until, saved

CPU = torch.device("cpu")
SIZE = (3, 16, 16)
UNEVEN = EVERYTHING_ON | {"batch_size": 7}


def build(image_folder: Path, folder: Path, device: torch.device, **words: Any) -> Trainer:
    trainer = build_trainer(image_folder, folder, placement=Placement(device, channels_last=False), **words)
    trainer.standardize_head()
    return trainer


def train(image_folder: Path, folder: Path, device: torch.device, **words: Any) -> Trainer:
    """Measure features, train and validate: every part that a trainer has."""
    trainer = build(image_folder, folder, device, **words)
    trainer.fit()
    assert {weight.device for weight in trainer.eval_network.parameters()} == {device}
    return trainer


def assert_near(one: Tensor, other: Tensor, name: str = "") -> None:
    """Fused optimisers round in other places."""
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda found: f"{name}: {found}")


@pytest.mark.sample(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("settings", [{"epochs": 2}, UNEVEN], ids=["plain", "everything"])
def test_training_stays_on_the_device(
    image_folder: Path, tmp_path: Path, optimizer: str, settings: dict[str, Any]
) -> None:
    words = settings | {"optimizer": optimizer}
    here = train(image_folder, tmp_path / "cpu", CPU, **words)
    with pretended_device() as device:
        there = train(image_folder, tmp_path / "gpu", device, **words)
        assert there.phase.optimizer.defaults["fused"]
    one, other = (saved(tmp_path / name).now for name in ("cpu", "gpu"))
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert_near(other.tensors[name], tensor, name)
    assert_near(there.predictions.logits, here.predictions.logits)


@pytest.mark.slow
def test_training_goes_on_on_the_device(image_folder: Path, tmp_path: Path) -> None:
    """A checkpoint's tensors, which are the CPU's, go back to the device."""
    words = UNEVEN | {"optimizer": "adamw"}
    with pretended_device() as device:
        train(image_folder, tmp_path / "whole", device, **words)
        fit_until(build(image_folder, tmp_path / "parts", device, **words), lambda now: now.step == 3)
        train(image_folder, tmp_path / "parts", device, **words)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def build_parts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the logits of a trunk and the rest of its network, and the gradient of the head."""
    torch.manual_seed(0)
    network = SmallNet().to(device)
    plan = build_plan(network, find_stages(network, SIZE), StrategySettings(name="freeze"), 0.1, 1)
    freeze(network, plan)
    placement = Placement(device, channels_last=True)
    choice = choose_cut(network, plan, SIZE, placement, "float32", lambda _: "")
    assert choice.cut_network is not None, choice.reason
    images = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        rows = choice.cut_network.trunk(images).cpu()
    samples = [Sample(f"{number}.png", number % 3, "train") for number in range(4)]
    labels = torch.tensor([sample.label for sample in samples])
    loader = FeatureLoader(
        [MemoryRows(rows)], samples, labels, SINGLE, batch_size=4, placement=placement, seed=0, shuffle=True
    )
    (batch,) = loader.batches()
    logits = choice.cut_network.rest(network)(batch.images)
    nn.functional.cross_entropy(logits, batch.labels).backward()
    assert network.head.weight.grad is not None and network.head.weight.grad.device == device
    return logits.detach().cpu(), network.head.weight.grad.cpu()


def test_trunk_and_rest_stay_on_the_device() -> None:
    here = build_parts(CPU)
    with pretended_device() as device:
        there = build_parts(device)
    for one, other in zip(here, there, strict=True):
        assert_near(other, one)


def explain(device: torch.device) -> Tensor:
    torch.manual_seed(0)
    network = SmallNet().eval().to(device)
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    (maps,) = GradCam(network, SIZE)(images, [0, 1])
    values = [one.values for one in maps if one.values is not None]
    assert len(values) == 2 and values[0].device == CPU
    return torch.stack(values)


def test_heat_maps_stay_on_the_device() -> None:
    here = explain(CPU)
    with pretended_device() as device:
        assert_near(explain(device), here)


class KeepsLabels(nn.Module):
    """A mixer that forgets to move the labels back to the device."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels.cpu()


def test_a_tensor_that_stayed_behind_is_noticed(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.training.trainer.build_mixer", lambda *_: KeepsLabels())
    train(image_folder, tmp_path / "cpu", CPU, epochs=1)
    with pretended_device() as device, pytest.raises(AssertionError, match="mixes devices"):
        train(image_folder, tmp_path / "gpu", device, epochs=1)
