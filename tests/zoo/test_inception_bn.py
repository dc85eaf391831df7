"""BN-Inception: the widths of Figure 5, no biases before the normalisation, and numbers of pytorchcv."""

from __future__ import annotations

import re

import torch
from pytorchcv.models.bninception import BNInception as Theirs
from torch import nn

from pretrained.zoo.inception_bn import MODULES
from tests.zoo.certify import assert_deviation, build, images, num_parameters, on_meta
from tests.zoo.classics import close, fill, reaches_every_parameter, shapes

SIZE = (3, 224, 224)


def test_count() -> None:
    """Computed from Figure 5. The text says 13.6 million; pytorchcv, with other widths, has 11,295,240."""
    network = on_meta("bn_inception")
    assert num_parameters(network) == 11_188_288
    assert reaches_every_parameter(network, SIZE)


def test_the_maps_have_the_sizes_of_figure_5() -> None:
    found = shapes(on_meta("bn_inception"), SIZE)
    names = ("conv1", "pool1", "conv2", "pool2", *(f"inception{name}" for name in MODULES))
    assert [found[name] for name in names] == [
        *((64, 112, 112), (64, 56, 56), (192, 56, 56), (192, 28, 28), (256, 28, 28), (320, 28, 28)),
        *((576, 14, 14), (576, 14, 14), (576, 14, 14), (576, 14, 14), (576, 14, 14), (1024, 7, 7)),
        *((1024, 7, 7), (1024, 7, 7)),
    ]


def test_weights_begin_by_the_rule_of_he_and_no_convolution_has_a_bias() -> None:
    network = build("bn_inception")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert_deviation(layer.weight, (2 / layer.weight[0].numel()) ** 0.5)
            assert layer.bias is None
    assert_deviation(network.head.fc.weight, 0.01)
    assert not network.head.fc.bias.any()


def their_name(name: str) -> str:
    """Our name of a tensor in theirs."""
    name = re.sub(r"^conv2\.(\d)\.", _their_stem, name)
    name = re.sub(r"^inception(\d)([a-e])\.branches\.", _their_unit, name)
    name = re.sub(r"\.(single1|pooled\.1)\.", lambda found: f".{_BRANCHES[found[1]]}.", name)
    name = re.sub(r"\.(single3|double3)\.(\d)\.", _their_layer, name)
    name = re.sub(r"^head\.fc\.", "output.", name)
    name = re.sub(r"\.0\.(\w+)$", r".conv.\1", name)
    return re.sub(r"\.1\.(\w+)$", r".bn.\1", name)


def _their_stem(found: re.Match[str]) -> str:
    return f"features.init_block.conv2.conv{int(found[1]) + 1}."


_BRANCHES = {"single1": "branch1", "pooled.1": "branch4.conv"}


def _their_unit(found: re.Match[str]) -> str:
    """Their stages begin with the module that has stride 2: 3a and 3b, 3c to 4d, 4e to 5b."""
    stages = (("3a", "3b"), ("3c", "4a", "4b", "4c", "4d"), ("4e", "5a", "5b"))
    name = found[1] + found[2]
    stage = next(number for number, names in enumerate(stages, start=1) if name in names)
    return f"features.stage{stage}.unit{stages[stage - 1].index(name) + 1}.branches."


def _their_layer(found: re.Match[str]) -> str:
    is_reduction = any(f"stage{stage}.unit1.branches" in found.string for stage in (2, 3))
    branch = {"single3": 2, "double3": 3}[found[1]] - is_reduction
    return f".branch{branch}.conv{int(found[2]) + 1}."


def test_numbers_agree_with_pytorchcv_of_the_same_widths() -> None:
    """Theirs with the widths of the paper, a dense first convolution equal to ours, and no biases."""
    network, x = on_meta("bn_inception", num_classes=7), images(1, (3, 224, 224))
    fill(network.children())
    stages = (("3a", "3b"), ("3c", "4a", "4b", "4c", "4d"), ("4e", "5a", "5b"))
    rows = [[MODULES[name] for name in names] for names in stages]
    with torch.device("meta"):
        other = Theirs(
            channels=[[256, 320], [576] * 5, [1024] * 3],
            init_block_channels_list=[64, 192],
            mid1_channels_list=[[[row.reduce3, row.reduce_double] for row in some] for some in rows],
            mid2_channels_list=[
                [[row.one, row.three, row.double, row.project] for row in some] for some in rows
            ],
            bias=False,
            num_classes=7,
        )
    fill([other])
    state = network.state_dict()
    depthwise, pointwise = state.pop("conv1.0.weight"), state.pop("conv1.1.weight")
    dense = torch.einsum("ocm,cmij->ocij", pointwise.view(64, 3, 8), depthwise.view(3, 8, 7, 7))
    mapped = {"features.init_block.conv1.conv.weight": dense}
    for name in [name for name in state if name.startswith("conv1.2.")]:
        mapped[name.replace("conv1.2.", "features.init_block.conv1.bn.")] = state.pop(name)
    mapped |= {their_name(name): value for name, value in state.items()}
    # Their first 3 x 3 keeps its biases whatever is asked for; zeros are none.
    missing, unexpected = other.load_state_dict(mapped, strict=False)
    assert not unexpected and all(
        re.fullmatch(r"features\.init_block\.conv2\..*bias", name) for name in missing
    )
    for name in missing:
        other.get_parameter(name).data.zero_()
    with torch.no_grad():
        assert close(network.eval()(x), other.eval()(x))
