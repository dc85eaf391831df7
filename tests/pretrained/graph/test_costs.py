"""Costs of layers against published tables, counts by hand, and PyTorch's own memory of a real step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.catalog import find_card
from pretrained.graph.costs import NetworkCost, compute_costs
from pretrained.network import build_outline
from tests.contracts.families import DEFAULT, SMALLEST
from tests.sweeps import slow_except

IMAGENET = (3, 224, 224)


def outline(name: str, **settings: object) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **settings)


def costs_of(name: str, size: tuple[int, int, int] = IMAGENET) -> NetworkCost:
    return compute_costs(outline(name), size)


VGG16 = {  # the table of CS231n, which the lectures show: elements of the output, and weights without biases
    "input": (224 * 224 * 3, 0),
    "features.0": (224 * 224 * 64, 1_728),
    "features.2": (224 * 224 * 64, 36_864),
    "features.4": (112 * 112 * 64, 0),
    "features.5": (112 * 112 * 128, 73_728),
    "features.7": (112 * 112 * 128, 147_456),
    "features.9": (56 * 56 * 128, 0),
    "features.10": (56 * 56 * 256, 294_912),
    "features.12": (56 * 56 * 256, 589_824),
    "features.14": (56 * 56 * 256, 589_824),
    "features.16": (28 * 28 * 256, 0),
    "features.17": (28 * 28 * 512, 1_179_648),
    "features.19": (28 * 28 * 512, 2_359_296),
    "features.21": (28 * 28 * 512, 2_359_296),
    "features.23": (14 * 14 * 512, 0),
    "features.24": (14 * 14 * 512, 2_359_296),
    "features.26": (14 * 14 * 512, 2_359_296),
    "features.28": (14 * 14 * 512, 2_359_296),
    "features.30": (7 * 7 * 512, 0),
    "classifier.0": (4_096, 102_760_448),
    "classifier.3": (4_096, 16_777_216),
    "classifier.6": (1_000, 4_096_000),
}


def test_vgg16_is_the_table_of_the_lectures() -> None:
    costs = costs_of("vgg16")
    rows = {row.name: row for row in costs.rows}
    assert {name: (rows[name].activations, rows[name].weights) for name in VGG16} == VGG16
    assert all(row.activations == 0 for row in costs.rows if row.kind in ("ReLU", "Dropout"))
    assert costs.weights == 138_344_128 and costs.parameters == 138_357_544
    assert costs.macs == 15_470_264_320


def test_the_total_of_the_activations_of_vgg16() -> None:
    """The lectures' rows add up to 15.2 M, not to the 24 M (93 MB) that stand under them."""
    assert sum(elements for elements, _ in VGG16.values()) == 15_237_608
    extra = 512 * 7 * 7  # torchvision's pooling to 7 x 7, which copies a map of that size
    costs = costs_of("vgg16")
    assert costs.activations == 15_237_608 + extra
    assert costs.forward_bytes(2) == 2 * 4 * costs.activations


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["alexnet", "resnet18", "squeezenet1_1", "mobilenet_v2", "swin_t"])
def test_the_published_numbers_of_torchvision(name: str) -> None:
    """Its table of weights states the multiply-adds in units of 1e9, with three digits."""
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    costs = costs_of(name)
    assert costs.parameters == published["num_params"] == sum(row.parameters for row in costs.rows)
    assert costs.macs / 1e9 == pytest.approx(published["_ops"], abs=5.1e-4)


def test_a_transformer_counts_its_attention() -> None:
    """ViT-B/16: 12 blocks with two products of 197 x 197 x 768 each, beside the linear layers."""
    costs = costs_of("vit_b_16")
    attention = 12 * 2 * 197 * 197 * 768
    linear = 12 * 197 * 768 * 768 * 12 + 196 * 768 * 768 + 768 * 1000
    assert costs.macs == attention + linear
    assert costs.parameters == 86_567_656
    rows = {row.name: row for row in costs.rows}
    own = rows["encoder.layers.encoder_layer_0.self_attention"]
    assert own.parameters == 4 * 768 * 768 + 4 * 768  # its projection is a module that is never called
    assert rows["encoder"].weights == 197 * 768  # the embedding of positions


class Inception(nn.Module):
    """The module of the lectures on a map of 256 x 28 x 28: with or without bottlenecks of 64 channels."""

    def __init__(self, is_naive: bool) -> None:
        super().__init__()

        def branch(kernel: int, out: int) -> nn.Module:
            if is_naive:
                return nn.Conv2d(256, out, kernel, padding=kernel // 2)
            return nn.Sequential(nn.Conv2d(256, 64, 1), nn.Conv2d(64, out, kernel, padding=kernel // 2))

        pool: list[nn.Module] = [nn.MaxPool2d(3, 1, 1)]
        pool += [] if is_naive else [nn.Conv2d(256, 64, 1)]
        branches = [nn.Conv2d(256, 128, 1), branch(3, 192), branch(5, 96), nn.Sequential(*pool)]
        self.branches = nn.ModuleList(branches)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([branch(images) for branch in self.branches], dim=1)


def test_the_inception_module_of_the_lectures() -> None:
    """854 M operations without bottlenecks, as the lectures say. With them, the products that stand there
    add up to 271 M; the 358 M under them count the 3x3 convolution twice."""
    naive, lean = (compute_costs(Inception(is_naive), (256, 28, 28)) for is_naive in (True, False))
    assert naive.macs == 28 * 28 * 256 * (128 + 9 * 192 + 25 * 96) == 854_196_224
    assert lean.macs == 28 * 28 * (64 * 256 * 3 + 128 * 256 + 192 * 9 * 64 + 96 * 25 * 64) == 271_351_808
    assert round((lean.macs + 28 * 28 * 192 * 9 * 64) / 1e6) == 358
    assert [row.output for row in naive.rows if not row.is_leaf] == [(672, 28, 28)]
    assert [row.activations for row in naive.rows if not row.is_leaf] == [672 * 28 * 28]


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return images + self.relu(self.conv(self.relu(self.conv(images))))


def test_a_module_that_is_called_twice_has_its_weights_once() -> None:
    costs = compute_costs(Reused(), (4, 8, 8))
    calls = [(row.name, row.number, row.weights, row.macs) for row in costs.rows if row.name == "conv"]
    macs = 8 * 8 * 4 * 4 * 9
    assert calls == [("conv", 0, 144, macs), ("conv", 1, 0, macs)]
    assert costs.parameters == 148
    own = costs.rows[-1]
    assert (own.name, own.is_leaf, own.activations, own.macs) == ("", False, 4 * 8 * 8, 0)


def measured_bytes(network: nn.Module, images: Tensor) -> int:
    """What a real training step keeps, by the blocks of memory that autograd's nodes hold."""
    parameters = {value.untyped_storage().data_ptr() for value in network.state_dict().values()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network.train()(images)
    assert output.requires_grad
    return sum(held.values())


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_memory_for_training_is_that_of_a_real_step(name: str, batch_size: int) -> None:
    network = timm.create_model(name, num_classes=10)
    size = (3, 160, 160) if name == "test_vit" else (3, 64, 64)
    expected = measured_bytes(network, torch.randn(batch_size, *size))
    found = compute_costs(network, size).training_bytes(batch_size)
    assert abs(found - expected) <= 0.02 * expected


def test_the_network_and_the_random_state_stay_as_they_are() -> None:
    network = timm.create_model("test_resnet", num_classes=10, drop_rate=0.5).train()
    network.conv1.requires_grad_(False)
    state = torch.get_rng_state()
    compute_costs(network, (3, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and not network.conv1[0].weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.is_grad_enabled()


def test_a_size_that_the_network_does_not_take_is_refused() -> None:
    network = timm.create_model("test_vit", num_classes=10)
    with pytest.raises(UsageError, match="at 63 x 63 pixels"):
        compute_costs(network, (3, 63, 63))
    assert not any(module._forward_hooks for module in network.modules())


NAMES = [f"timm/{name}" for name in SMALLEST.values()]
NAMES += [name for name in DEFAULT if name.startswith("torchvision/")]


@pytest.mark.parametrize("name", slow_except(["timm/test_vit"], NAMES))
def test_every_family_adds_up(name: str) -> None:
    card = find_card(name)
    network = build_outline(replace(card, num_classes=10))
    costs = compute_costs(network, card.preprocessing.input_size)
    assert costs.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert costs.macs > 0 and costs.training_bytes(2) > 0
    assert all(min(row.activations, row.macs, *row.kept[1:]) >= 0 for row in costs.rows)
