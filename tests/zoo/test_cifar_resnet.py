"""Residual and plain networks of CIFAR, arXiv:1512.03385, section 4.2 and table 6."""

import pytest
import torch
from pytorchcv.models.resnet_cifar import CIFARResNet
from torch import Tensor, nn

from pretrained.zoo.cifar_resnet import cifar_resnet
from tests.sweeps import slow_except
from tests.zoo.certify import (
    State,
    assert_deviation,
    assert_gradient_everywhere,
    assert_same_output,
    blocks_of,
    build,
    classify,
    conv,
    copy_weights,
    count,
    excite,
    images,
    map_sizes,
    norm,
    num_parameters,
    on_meta,
    pad_shortcut,
    pytorchcv_name,
    randomise,
)

# Published in millions (table 6); exact counts computed.
PUBLISHED = {
    20: (269_722, 0.27),
    32: (464_154, 0.46),
    44: (658_586, 0.66),
    56: (853_018, 0.85),
    110: (1_727_962, 1.7),
}


@pytest.mark.parametrize("depth", slow_except([20, 56], PUBLISHED))
def test_parameters(depth: int) -> None:
    exact, published = PUBLISHED[depth]
    assert count(f"cifar_resnet{depth}") == exact == count(f"cifar_plain{depth}")
    assert exact / 1e6 == pytest.approx(published, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet1202", "cifar_resnet1202_sd"])
def test_parameters_of_1202_layers(name: str) -> None:
    assert count(name) == 19_421_274  # published: 19.4 M


def test_projections_have_the_parameters_by_which_other_networks_of_the_name_are_known() -> None:
    with torch.device("meta"):
        assert num_parameters(cifar_resnet(20, "B")) == 272_474


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain56"])
def test_table_of_layers(name: str) -> None:
    """1 + 2n layers of 16 filters on 32 x 32, 2n of 32 on 16 x 16, 2n of 64 on 8 x 8."""
    network = on_meta(name)
    assert map_sizes(network) == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    blocks = (int(name[-2:]) - 2) // 6
    for stage, (inputs, width) in zip(network.stages, ((16, 16), (16, 32), (32, 64)), strict=True):
        convolutions = [module for module in stage.modules() if isinstance(module, nn.Conv2d)]
        assert len(convolutions) == 2 * blocks
        weights = 9 * inputs * width + 9 * width * width * (2 * blocks - 1)
        assert num_parameters(stage) == weights + 2 * width * 2 * blocks


def test_a_depth_between_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth 21 is not 6n \+ 2"):
        cifar_resnet(21)


# --- numbers ---------------------------------------------------------------------------------------


def branch(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """F of equation 1."""
    y = torch.relu(norm(state, f"{name}.branch.bn1", conv(state, f"{name}.branch.conv1", x, stride)))
    return norm(state, f"{name}.branch.bn2", conv(state, f"{name}.branch.conv2", y))


def second_forward(state: State, batch: Tensor, *, residual: bool) -> Tensor:
    """Equations 1 and 2 of the paper, with option A."""
    x = torch.relu(norm(state, "stem.bn1", conv(state, "stem.conv1", batch)))
    for name, stride in blocks_of(state):
        y = branch(state, name, x, stride)
        x = torch.relu(y + pad_shortcut(x, y.shape[1], stride)) if residual else torch.relu(y)
    return classify(state, x)


def stochastic_depth_forward(state: State, batch: Tensor) -> Tensor:
    """Equation 5 of arXiv:1603.09382: in evaluation branch l of L counts p_l = 1 - l / L * (1 - 0.5) times.

    Shortcuts average 2 x 2 positions before the zero padding.
    """
    x = torch.relu(norm(state, "stem.bn1", conv(state, "stem.conv1", batch)))
    blocks = list(blocks_of(state))
    for number, (name, stride) in enumerate(blocks, start=1):
        y = excite(state, name, branch(state, name, x, stride))
        if stride == 2:
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        x = torch.relu(pad_shortcut(x, y.shape[1], 1) + (1 - number / len(blocks) / 2) * y)
    return classify(state, x)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20", "cifar_resnet32"])
def test_numbers_of_a_second_forward(name: str) -> None:
    network = randomise(build(name))
    state = network.state_dict()
    residual = "plain" not in name
    assert_same_output(network, lambda batch: second_forward(state, batch, residual=residual), images())


@pytest.mark.parametrize("se_reduction", [0, 4])
def test_numbers_of_a_second_forward_with_stochastic_depth(se_reduction: int) -> None:
    """A shallower ``cifar_resnet110_sd``."""
    network = randomise(build("cifar_resnet110_sd", depth=20, se_reduction=se_reduction))
    state = network.state_dict()
    assert_same_output(network, lambda batch: stochastic_depth_forward(state, batch), images())


def test_numbers_of_pytorchcv_with_its_projections() -> None:
    """pytorchcv has option B in CIFAR, where the paper has A; with B both agree."""
    ours = randomise(cifar_resnet(20, "B"))
    theirs = CIFARResNet([[16] * 3, [32] * 3, [64] * 3], 16, bottleneck=False)
    copy_weights(ours, theirs, pytorchcv_name)
    assert_same_output(ours, theirs, images())


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    assert_gradient_everywhere(build(name), images(8))


def test_weights_begin_as_in_resnets_code_for_torch() -> None:
    network = build("cifar_resnet20")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            outputs, _, rows, columns = module.weight.shape
            assert_deviation(module.weight, (2 / (rows * columns * outputs)) ** 0.5)
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and not module.bias.any()
    assert_deviation(network.head.fc.weight, (1 / 3 / 64) ** 0.5)  # uniform within 1 / sqrt(64)
    assert not network.head.fc.bias.any()


@pytest.mark.parametrize(("residual", "grows"), [(True, True), (False, False)])
def test_only_shortcuts_carry_the_signal(residual: bool, grows: bool) -> None:
    """Without its branches a residual network still sees the image; a plain one sees nothing."""
    network = build("cifar_resnet20" if residual else "cifar_plain20").eval()
    for module in network.stages.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.zero_()
    with torch.no_grad():
        assert bool(network.forward_features(images()).any()) is grows
