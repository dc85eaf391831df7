"""The stages of residual, dense and fractal networks, and the parts that they are built of."""

import pytest
import timm
import torch
from timm.models import group_parameters

from pretrained.graph.stages import find_stages
from pretrained.zoo.residual import PadShortcut, block_shapes, chain, cifar_depth, conv
from tests.sweeps import slow_except
from tests.zoo.certify import CIFAR, images

SMALL = (
    "cifar_resnet20",
    "cifar_plain20",
    "cifar_wrn_16_4",
    "cifar_densenet_40_12",
    "cifar_fractalnet_thin_c3",
    "cifar_shake_shake_26_2x32d",
)


@pytest.mark.parametrize("name", slow_except(["cifar_resnet20", "cifar_fractalnet_thin_c3"], SMALL))
def test_stages_are_those_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name).eval()
    names = [stage.name for stage in find_stages(network, CIFAR)]
    blocks = [f"stages.{index}" for index in range(3)]
    if "fractal" in name:
        assert names == [
            "stages.0.layers.0",
            "stages.0.layers.1-3",
            *(f"stages.{n}" for n in range(1, 5)),
            "head",
        ]
    else:
        assert names == ["stem", *blocks, "head"]


def test_groups_of_timm_follow_the_depth() -> None:
    with torch.device("meta"):
        network = timm.create_model("cifar_preresnet110")
    for coarse, count in ((True, 3), (False, 54)):
        groups = group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
        assert groups["stem.conv1.weight"] == 0
        assert max(group for name, group in groups.items() if name.startswith("stages.")) == count
        assert groups["stages.0.0.before.bn1.weight"] == 1
        assert groups["last.bn1.weight"] >= count


# --- the parts -------------------------------------------------------------------------------------


def test_a_chain_is_its_letters() -> None:
    layers = chain("brcdb", 4, [conv(4, 6, 3)], drop_rate=0.5)
    assert [name for name, _ in layers.named_children()] == ["bn1", "relu1", "conv1", "drop1", "bn2"]
    assert (layers.bn1.num_features, layers.bn2.num_features, layers.drop1.p) == (4, 6, 0.5)


def test_shapes_halve_the_grid_and_count_from_one() -> None:
    shapes = block_shapes(3, [[4, 4], [8, 8]], drop_path_rate=0.5)
    flat = [shape for stage in shapes for shape in stage]
    assert [(p.inputs, p.outputs, p.stride) for p in flat] == [(3, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1)]
    assert [p.survival for p in flat] == [0.875, 0.75, 0.625, 0.5]
    assert [p.is_first for p in flat] == [True, False, False, False]
    assert [p.changes_shape for p in flat] == [True, False, True, False]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("size", [7, 8])
def test_a_padded_shortcut_fits_a_convolution_of_its_stride(size: int, average: bool) -> None:
    features = images(1, (3, size, size))
    output = PadShortcut(3, 5, 2, average=average)(features)
    assert output.shape == conv(3, 5, 3, 2)(features).shape
    assert not output[:, 3:].any()


@pytest.mark.parametrize(
    ("depth", "per_block", "others", "blocks"), [(110, 2, 2, 18), (164, 3, 2, 18), (28, 2, 4, 4)]
)
def test_blocks_of_a_depth(depth: int, per_block: int, others: int, blocks: int) -> None:
    assert cifar_depth(depth, per_block, others) == blocks
    with pytest.raises(ValueError, match=f"depth {depth + 1} is not {3 * per_block}n"):
        cifar_depth(depth + 1, per_block, others)
