"""Squeeze-and-excitation (arXiv:1709.01507) and stochastic depth (arXiv:1603.09382) on residual blocks."""

import pytest
import torch
from pytorchcv.models.common.att import SEBlock
from pytorchcv.models.seresnet_cifar import CIFARSEResNet
from torch import Tensor, nn

from pretrained.zoo.cifar_resnet import cifar_resnet
from pretrained.zoo.gates import SqueezeExcitation, StochasticDepth
from pretrained.zoo.residual import BlockShape, ResidualBlock
from tests.zoo.certify import (
    assert_same_output,
    build,
    copy_weights,
    count,
    images,
    pytorchcv_name,
    randomise,
)

DRAWS = 4_000


def test_squeeze_and_excitation_is_that_of_pytorchcv() -> None:
    ours, theirs = SqueezeExcitation(32, 16), SEBlock(32)
    copy_weights(ours, theirs, lambda name: name.replace("fc", "conv"))
    assert_same_output(ours, theirs, images(3, (32, 5, 5)))


def test_it_scales_the_branch_before_the_sum() -> None:
    """A whole network against pytorchcv's SE-ResNet, which has projections (option B)."""
    ours = randomise(cifar_resnet(20, "B", se_reduction=16))
    theirs = CIFARSEResNet([[16] * 3, [32] * 3, [64] * 3], 16, bottleneck=False)
    copy_weights(ours, theirs, pytorchcv_name)
    assert_same_output(ours, theirs, images())


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("cifar_se_preresnet110", 1_727_962),
        ("cifar_se_preresnet164", 1_703_258),
        ("cifar_se_wrn_16_8", 10_961_370),
        ("cifar_se_shake_shake_26_2x96d", 26_192_922),
    ],
)
def test_what_it_adds(name: str, without: int) -> None:
    """Computed: two layers with biases in each block, of C and max(1, C / 16) units."""
    blocks = {
        "cifar_se_preresnet110": (18, (16, 32, 64)),
        "cifar_se_preresnet164": (18, (64, 128, 256)),
        "cifar_se_wrn_16_8": (2, (128, 256, 512)),
        "cifar_se_shake_shake_26_2x96d": (4, (96, 192, 384)),
    }
    each, widths = blocks[name]
    assert count(name) - without == each * sum(2 * c * (c // 16) + c + c // 16 for c in widths)


# --- stochastic depth ------------------------------------------------------------------------------


def survivals(network: nn.Module) -> list[float]:
    return [module.survival for module in network.modules() if isinstance(module, StochasticDepth)]


def test_survival_falls_linearly_to_a_half() -> None:
    found = survivals(build("cifar_resnet110_sd"))
    assert found == pytest.approx([1 - number / 54 / 2 for number in range(1, 55)])
    assert found[-1] == 0.5


@pytest.mark.parametrize("name", ["plain18", "cifar_plain20"])
def test_a_network_without_shortcuts_does_not_take_it(name: str) -> None:
    """A dropped block would give zeros, and so would the network."""
    with torch.device("meta"), pytest.raises(ValueError, match="takes no drop_path_rate"):
        build(name, drop_path_rate=0.5)


def test_any_residual_network_takes_it() -> None:
    for name, blocks in (
        ("cifar_resnet20", 9),
        ("cifar_wrn_16_4", 6),
        ("cifar_resnext29_8x64d", 9),
        ("resnet18_a", 8),
        ("cifar_shake_shake_26_2x32d", 12),
    ):
        with torch.device("meta"):
            assert len(survivals(build(name, drop_path_rate=0.5))) == blocks
    assert survivals(build("cifar_resnet20")) == []


def test_a_branch_is_kept_as_often_as_stated() -> None:
    torch.manual_seed(0)
    gate = StochasticDepth(0.7)
    ones = torch.ones(1, 1, 1, 1)
    kept = sum(float(gate(ones)) for _ in range(DRAWS)) / DRAWS
    assert kept == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / DRAWS) ** 0.5)


def test_the_draw_is_one_for_the_batch_and_is_not_scaled_up() -> None:
    """The wrong port: one draw for each image, divided by p (timm's ``DropPath``)."""
    torch.manual_seed(0)
    gate = StochasticDepth(0.5)
    batches = [gate(torch.ones(8, 2, 1, 1)) for _ in range(50)]
    assert {float(value) for batch in batches for value in batch.unique()} == {0.0, 1.0}
    assert all(len(batch.unique()) == 1 for batch in batches)


def test_in_evaluation_the_branch_counts_p_times() -> None:
    gate = StochasticDepth(0.7).eval()
    assert torch.equal(gate(torch.ones(2, 1, 1, 1)), torch.full((2, 1, 1, 1), 0.7))


class Constant(nn.Module):
    """A branch that is -3 everywhere."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.full_like(features, -3.0)


def test_relu_follows_the_sum() -> None:
    """The wrong port: no ReLU behind the sum, or behind the kept branch alone."""
    block = ResidualBlock(BlockShape(4, 4, 1, survival=0.5), Constant(), nn.Identity())
    features = torch.full((1, 4, 2, 2), 1.0)
    assert torch.equal(block.eval()(features), torch.zeros(1, 4, 2, 2))  # relu(1 - 3 / 2)
    torch.manual_seed(0)
    block.train()
    assert {float(block(features).max()) for _ in range(20)} == {0.0, 1.0}  # relu(1 - 3), relu(1)


def test_its_shortcuts_average_before_the_padding() -> None:
    block = build("cifar_resnet110_sd").stages[1][0]
    features = images(1, (16, 4, 4))
    pooled = features.reshape(1, 16, 2, 2, 2, 2).mean((3, 5))
    output = block.shortcut(features)
    assert torch.allclose(output[:, :16], pooled, atol=1e-6)
    assert not output[:, 16:].any()
