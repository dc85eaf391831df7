"""Standardised features: one rate for every scale, and nothing of it in the network that is handed over."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.training.standardize import attach, fold, measure_features
from tests.training.helpers import SmallNet, build_trainer


def moments(channels: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "head.mean": 50 * torch.randn(channels, generator=generator),
        "head.std": 30 * torch.rand(channels, generator=generator) + 0.1,
    }


def test_folding_changes_no_output() -> None:
    network = SmallNet().eval()
    attach(network, moments())
    images = torch.rand(4, 3, 16, 16)
    before = network(images)
    fold(network)
    assert not network.head._forward_pre_hooks
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)


def test_folding_works_on_convolutions_and_copies() -> None:
    network = nn.Sequential(nn.Conv2d(8, 3, 1))
    network.get_classifier = lambda: network[0]
    attach(network, {"0.mean": torch.full((8,), 3.0), "0.std": torch.full((8,), 2.0)})
    images = torch.rand(2, 8, 1, 1)
    expected = network(images)
    twin = copy.deepcopy(network)
    fold(twin)
    torch.testing.assert_close(twin(images), expected)
    torch.testing.assert_close(network(images), expected)  # the original still has its hook


def test_measured_moments_are_those_of_the_features(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, batch_size=10)
    network = trainer.task.network.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = measure_features(network, trainer.task.train, "float32", 0, lambda *_: None)
    features = []
    handle = network.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        for batch in trainer.task.train.batches():
            network(batch.images)
    handle.remove()
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
    stacked = torch.cat(features)
    torch.testing.assert_close(found["head.mean"], stacked.mean(0))
    floor = 0.1 * stacked.std(0, correction=0).mean()
    torch.testing.assert_close(found["head.std"], stacked.std(0, correction=0).clamp_min(floor))
    assert not network.head._forward_pre_hooks


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_one_rate_serves_features_of_any_scale(image_folder: Path, tmp_path: Path, scale: float) -> None:
    torch.manual_seed(1)
    network = SmallNet()
    norm = network.stage2[1]
    nn.init.constant_(norm.weight, scale)
    trainer = build_trainer(
        image_folder,
        tmp_path,
        network=network,
        strategy="freeze",
        epochs=5,
        batch_size=8,
        lr=0.01,
        schedule="constant",
    )
    trainer.standardize_head()
    losses = [row["train_loss"] for row in trainer.fit().history]
    assert losses[0] < 1.5  # ln 3 is 1.1: no explosion
    assert losses[-1] < 0.8 * losses[0]


def test_the_judged_network_is_plain(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=2, batch_size=8, ema_decay=0.5)
    trainer.standardize_head()
    best = trainer.fit().best
    assert all(not layer._forward_pre_hooks for layer in trainer.eval_network.modules())
    assert trainer._validate().loss == pytest.approx(best["loss"], abs=1e-5)


def test_measuring_in_train_mode_leaves_the_statistics(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, strategy="full", batch_size=9)
    before = {name: tensor.clone() for name, tensor in trainer.task.network.state_dict().items()}
    trainer.standardize_head()
    assert trainer.task.network.stage2[1].training
    assert all(tensor.equal(before[name]) for name, tensor in trainer.task.network.state_dict().items())


def test_a_kept_classifier_computes_what_it_did() -> None:
    network = SmallNet().eval()
    images = torch.rand(4, 3, 16, 16)
    before = network(images)
    attach(network, moments(), keep=True)
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)
    fold(network)
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)


def test_a_microbatch_that_leaves_a_rest_of_one_image_can_be_measured(
    image_folder: Path, tmp_path: Path
) -> None:
    """A BatchNorm on pooled features cannot normalise a single image."""
    trainer = build_trainer(image_folder, tmp_path, batch_size=9)
    network = trainer.task.network
    network.head = nn.Sequential(nn.BatchNorm1d(8), network.head)
    network.get_classifier = lambda: network.head[1]
    network.train()
    found = [
        measure_features(network, trainer.task.train, "float32", 0, lambda *_: None, microbatch=size)
        for size in (4, 0)
    ]
    assert found[0].keys() == {"head.1.mean", "head.1.std"}
    # Each chunk has a mean of 0 and a deviation of 1, so only the trial of one image could spoil them.
    for moments in found:
        torch.testing.assert_close(moments["head.1.mean"], torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(moments["head.1.std"], torch.ones(8), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("num_features", "squared_length"), [(64, 64), (512, 512), (1280, 512), (4096, 512)])
def test_features_have_one_length_whatever_their_number(
    image_folder: Path, tmp_path: Path, num_features: int, squared_length: int
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_features), nn.Linear(num_features, 3))
    network(torch.zeros(1, 3, 16, 16))
    network.get_classifier = lambda: network[2]
    trainer = build_trainer(image_folder, tmp_path, batch_size=10)
    found = measure_features(network.eval(), trainer.task.train, "float32", 0, lambda *_: None)
    features = network[:2](torch.cat([batch.images for batch in trainer.task.train.batches()]))
    lengths = ((features - found["2.mean"]) / found["2.std"]).square().sum(dim=1)
    assert lengths.mean().item() == pytest.approx(squared_length, rel=0.05)
