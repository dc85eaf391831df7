"""LeNet-5: counts and table of the paper, partial connections, and a second pass from its formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrained.zoo.lenet import TABLE_1, CodeDistance
from tests.zoo.certify import assert_gradient_everywhere, build, images, num_parameters


def squash(x: np.ndarray) -> np.ndarray:
    return 1.7159 * np.tanh(2 / 3 * x)


def convolve(x: np.ndarray, kernels: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x (C, H, W), kernels (D, C, 5, 5) -> (D, H - 4, W - 4)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
    return np.einsum("chwij,dcij->dhw", windows, kernels) + bias[:, None, None]


def sum_of_four(x: np.ndarray) -> np.ndarray:
    return x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]


def weights(network: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}


def forward(network: nn.Module, image: np.ndarray, as_printed: bool) -> np.ndarray:
    """The logits of one image (1, 32, 32), in NumPy."""
    own = weights(network)
    x = squash(convolve(image, own["c1.weight"], own["c1.bias"]))
    for pool, name in (("s2", "c3"), ("s4", "c5")):
        if as_printed:
            gain, bias = own[f"{pool}.0.gain"], own[f"{pool}.0.bias"]
            x = squash(sum_of_four(x) * gain[:, None, None] + bias[:, None, None])
        else:
            x = sum_of_four(x) / 4
        kernels = own[f"{name}.weight"]
        if as_printed and name == "c3":
            dense, place = np.zeros((16, 6, 5, 5)), 0
            for output, maps in enumerate(TABLE_1):
                for read in maps:
                    dense[output, read] = kernels[place]
                    place += 1
            kernels = dense
        x = squash(convolve(x, kernels, own[f"{name}.bias"]))
    x = squash(own["f6.weight"] @ x[:, 0, 0] + own["f6.bias"])
    if as_printed:
        return -np.square(x - own["output.weight"]).sum(axis=1)
    return own["output.weight"] @ x + own["output.bias"]


@pytest.mark.parametrize(("name", "number"), [("lenet5", 61_706), ("lenet5_paper", 60_000)])
def test_counts(name: str, number: int) -> None:
    """60,000 is published, 61,706 is computed."""
    assert num_parameters(build(name)) == number


def test_the_layers_have_the_parameters_of_section_2b() -> None:
    """Published: "156", "12", "1,516", "32", "48,120", "10,164"."""
    network = build("lenet5_paper")
    found = [
        num_parameters(network.get_submodule(name)) for name in ("c1", "s2", "c3", "s4", "c5", "f6", "output")
    ]
    assert found == [156, 12, 1516, 32, 48_120, 10_164, 0]


@pytest.mark.parametrize("name", ["lenet5", "lenet5_paper"])
def test_the_maps_have_the_published_sizes(name: str) -> None:
    network, x, sizes = build(name), images(size=(1, 32, 32)), []
    for layer in (network.c1, network.s2, network.c3, network.s4, network.c5):
        x = layer(x)
        sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(6, 28), (6, 14), (16, 10), (16, 5), (120, 1)]


def test_c3_reads_the_maps_of_table_1_only() -> None:
    layer = build("lenet5_paper").c3
    maps = torch.ones(1, 6, 5, 5, requires_grad=True)
    for output, reads in enumerate(TABLE_1):
        (gradient,) = torch.autograd.grad(layer(maps)[0, output].sum(), maps)
        assert tuple(gradient[0].abs().sum((1, 2)).nonzero().flatten().tolist()) == reads
    assert [len(reads) for reads in TABLE_1] == [3] * 6 + [4] * 9 + [6]
    assert all(sum(read in reads for reads in TABLE_1) == 10 for read in range(6)), "each map has ten readers"


@pytest.mark.parametrize("name", ["lenet5", "lenet5_paper"])
def test_numbers_agree_with_the_formulas(name: str) -> None:
    network = build(name).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # else the squashing functions see nothing but their linear middle
    batch = images(size=(1, 32, 32))
    with torch.no_grad():
        logits = network(batch).numpy()
    expected = [forward(network, image, name == "lenet5_paper") for image in batch.double().numpy()]
    assert np.abs(logits - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_the_squashing_function_is_about_one_at_one() -> None:
    assert torch.allclose(
        build("lenet5").squash(torch.tensor([1.0, -1.0])), torch.tensor([1.0, -1.0]), atol=1e-4
    )


@pytest.mark.parametrize("name", ["lenet5", "lenet5_paper"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    assert_gradient_everywhere(build(name), images(8, (1, 32, 32)))


def test_weights_begin_within_2_4_over_fan_in() -> None:
    network = build("lenet5_paper")
    for weight, fan_in in ((network.c1.weight, 25), (network.c5.weight, 400), (network.f6.weight, 120)):
        assert 0.9 * 2.4 / fan_in < weight.abs().max() <= 2.4 / fan_in
    assert network.c3.weight[:3].abs().max() <= 2.4 / 75 < network.c3.weight[:18].abs().max() * 1.1


def test_codes_are_fixed_and_of_one_and_minus_one() -> None:
    codes = build("lenet5_paper").output
    assert isinstance(codes, CodeDistance) and not list(codes.parameters())
    assert set(codes.weight.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(codes.weight, CodeDistance(84, 10).weight)
    assert codes(codes.weight).argmax(1).tolist() == list(range(10))


def test_colour_images_become_grey() -> None:
    network = build("lenet5").eval()
    grey = images(size=(1, 32, 32))
    colours: Tensor = grey.expand(-1, 3, -1, -1)
    assert torch.allclose(network(colours), network(grey), atol=1e-5)
    assert network(images(size=(1, 48, 48))).shape == (2, 10)
