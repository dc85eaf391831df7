"""Shake-Shake of CIFAR, arXiv:1705.07485."""

import pytest
import torch
from pytorchcv.models.shakeshakeresnet_cifar import ShakeShakeShortcut
from torch import Tensor, nn

from pretrained.zoo.shake_shake import (
    BackwardMode,
    ForwardMode,
    Level,
    Shake,
    TwoPathShortcut,
    cifar_shake_shake,
)
from tests.sweeps import slow_except
from tests.zoo.certify import (
    State,
    assert_gradient_everywhere,
    assert_same_output,
    blocks_of,
    classify,
    conv,
    copy_weights,
    count,
    excite,
    images,
    map_sizes,
    norm,
    on_meta,
    randomise,
)

DRAWS = 10_000

# Published in millions; exact counts computed.
PUBLISHED = {"26_2x32d": (2_923_162, 2.9), "26_2x64d": (11_653_978, 11.7), "26_2x96d": (26_192_922, 26.2)}


@pytest.mark.parametrize("shape", slow_except(["26_2x32d"], PUBLISHED))
def test_parameters(shape: str) -> None:
    exact, published = PUBLISHED[shape]
    assert count(f"cifar_shake_shake_{shape}") == exact == count(f"cifar_shake_shake_{shape}_batch")
    assert round(exact / 1e6, 1) == published


def test_parameters_of_the_network_for_100_classes() -> None:
    assert count("cifar_shake_shake_29_2x4x64d") == 34_491_444  # published: 34.4 M


def test_table_of_layers() -> None:
    """The stem has 16 channels and no ReLU; the wrong port has the width of the first stage."""
    network = on_meta("cifar_shake_shake_26_2x96d")
    assert map_sizes(network) == [(16, 32, 32), (96, 32, 32), (192, 16, 16), (384, 8, 8)]
    assert [len(stage) for stage in network.stages] == [4, 4, 4]
    assert [type(layer) for layer in network.stem] == [nn.Conv2d, nn.BatchNorm2d]


# --- the random mean -------------------------------------------------------------------------------


class Times(nn.Module):
    """A branch that multiplies by a parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.factor


def shake(
    forward_mode: ForwardMode = "shake", backward_mode: BackwardMode = "shake", level: Level = "image"
) -> Shake:
    return Shake(Times(1.0), Times(0.0), forward_mode, backward_mode, level)


def test_alpha_is_uniform_for_each_image() -> None:
    torch.manual_seed(0)
    alphas = shake()(torch.ones(DRAWS, 1, 1, 1)).flatten().detach()
    assert float(alphas.mean()) == pytest.approx(0.5, abs=4 / (12 * DRAWS) ** 0.5)
    assert float(alphas.var()) == pytest.approx(1 / 12, rel=0.05)
    assert 0 <= alphas.min() < 0.01
    assert 0.99 < alphas.max() <= 1


def test_alpha_is_one_for_the_batch_at_batch_level() -> None:
    torch.manual_seed(0)
    module = shake(level="batch")
    draws = [module(torch.ones(4, 1, 1, 1)).flatten().detach() for _ in range(20)]
    assert all(len(draw.unique()) == 1 for draw in draws)
    assert len(torch.cat(draws).unique()) == 20


@pytest.mark.parametrize("level", ["image", "batch"])
def test_evaluation_is_even(level: Level) -> None:
    """The wrong port shakes in evaluation and is even in training."""
    features = images(4, (1, 2, 2))
    module = shake(level=level).eval()
    assert torch.equal(module(features), features / 2)
    assert not torch.equal(module.train()(features), features / 2)


def factors(forward_mode: ForwardMode, backward_mode: BackwardMode) -> tuple[Tensor, Tensor]:
    """Alpha and beta of 200 steps: for an image of 1, the gradient of the first branch's factor is beta."""
    module = shake(forward_mode, backward_mode)
    alphas, betas = [], []
    for _ in range(200):
        output = module(torch.ones(1, 1, 1, 1)).sum()
        (beta,) = torch.autograd.grad(output, module.first.factor)
        alphas.append(float(output.detach()))
        betas.append(float(beta))
    return torch.tensor(alphas), torch.tensor(betas)


def test_backward_draws_again_keeps_or_is_even() -> None:
    torch.manual_seed(0)
    alphas, betas = factors("shake", "shake")
    assert abs(float(torch.corrcoef(torch.stack((alphas, betas)))[0, 1])) < 0.25  # independent
    assert len(betas.unique()) > 190
    alphas, betas = factors("shake", "keep")
    assert torch.allclose(alphas, betas, atol=1e-6)
    assert len(alphas.unique()) > 190
    alphas, betas = factors("even", "shake")
    assert torch.allclose(alphas, torch.full_like(alphas, 0.5), atol=1e-6)
    assert len(betas.unique()) > 190
    alphas, betas = factors("even", "even")
    assert torch.equal(alphas, torch.full_like(alphas, 0.5))
    assert torch.equal(betas, torch.full_like(betas, 0.5))
    alphas, betas = factors("shake", "even")
    assert len(alphas.unique()) > 190
    assert torch.equal(betas, torch.full_like(betas, 0.5))


def test_the_names_have_the_modes_of_the_paper() -> None:
    for name, modes in (
        ("", ("shake", "shake", "image")),
        ("_batch", ("shake", "shake", "batch")),
        ("_shake_keep", ("shake", "keep", "image")),
        ("_shake_even", ("shake", "even", "image")),
        ("_even_shake", ("even", "shake", "image")),
        ("_even_even", ("even", "even", "image")),
    ):
        branch = on_meta(f"cifar_shake_shake_26_2x32d{name}", depth=8).stages[0][0].branch
        assert (branch.forward_mode, branch.backward_mode, branch.level) == modes


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_is_that_of_pytorchcv_behind_relu(stride: int) -> None:
    torch.manual_seed(0)
    ours, theirs = randomise(TwoPathShortcut(6, 8, stride)), ShakeShakeShortcut(6, 8, stride)
    copy_weights(ours, theirs, lambda name: name)
    assert_same_output(ours, lambda batch: theirs(batch.relu()), images(2, (6, 8, 8)))


def branch_forward(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """ReLU conv BN, as often as there are convolutions; a 3x3 has the stride."""
    convolutions = sum(f"{name}.conv{number}.weight" in state for number in (1, 2, 3))
    for number in range(1, convolutions + 1):
        own = stride if number == convolutions - 1 else 1
        x = norm(state, f"{name}.bn{number}", conv(state, f"{name}.conv{number}", torch.relu(x), own))
    return x


def second_forward(state: State, batch: Tensor) -> Tensor:
    """x + (F(x, W1) + F(x, W2)) / 2; the shortcut's shift as an index."""
    x = norm(state, "stem.bn1", conv(state, "stem.conv1", batch))
    for name, stride in blocks_of(state):
        first, second = (
            branch_forward(state, f"{name}.branch.{one}", x, stride) for one in ("first", "second")
        )
        if f"{name}.shortcut.conv1.weight" in state:
            positive = torch.relu(x)
            before = torch.zeros_like(positive)
            before[:, :, 1:, 1:] = positive[:, :, :-1, :-1]
            halves = [
                conv(state, f"{name}.shortcut.conv{index}", part[:, :, ::stride, ::stride])
                for index, part in ((1, positive), (2, before))
            ]
            x = norm(state, f"{name}.shortcut.bn", torch.cat(halves, 1))
        x = x + excite(state, name, (first + second) / 2)
    return classify(state, torch.relu(x))


@pytest.mark.parametrize("se_reduction", [0, 4])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_numbers_of_a_second_forward(bottleneck: bool, se_reduction: int) -> None:
    """Not of pytorchcv, which has ReLU behind each sum: there the identity reads rectified values."""
    torch.manual_seed(0)
    depth = 20 if bottleneck else 14
    network = randomise(cifar_shake_shake(depth, 8, bottleneck=bottleneck, se_reduction=se_reduction))
    state = network.state_dict()
    assert any(".se." in name for name in state) == bool(se_reduction)
    assert_same_output(network, lambda batch: second_forward(state, batch), images())


def test_the_identity_reads_the_raw_sum() -> None:
    block = cifar_shake_shake(14, 8).stages[0][1].eval()
    for branch in (block.branch.first, block.branch.second):
        branch.bn2.weight.data.zero_()
    features = torch.full((1, 8, 4, 4), -2.0)
    with torch.no_grad():
        assert torch.equal(block(features), features)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    assert_gradient_everywhere(cifar_shake_shake(14, 16), images(8))
