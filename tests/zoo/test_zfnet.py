"""ZFNet: counts, the sizes of its figure, pools before the normalisation, and numbers of pytorchcv."""

from __future__ import annotations

import pytest
import torch
from pytorchcv.models.zfnet import zfnet as theirs

from tests.zoo.certify import images, num_parameters, on_meta
from tests.zoo.classics import close, fill, reaches_every_parameter, shapes

SIZE = (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "number"),  # all computed; the paper gives none
    [
        ("zfnet", 62_357_608),
        ("zfnet_512", 107_627_624),
        ("zfnet_without_7", 62_357_608 - 4096 * 4097),
        ("zfnet_without_67", 12_943_464),
        ("zfnet_without_34", 59_850_088),
        ("zfnet_without_3467", 10_435_944),
    ],
)
def test_counts(name: str, number: int) -> None:
    network = on_meta(name)
    assert num_parameters(network) == number
    assert reaches_every_parameter(network, SIZE)


def test_the_maps_have_the_sizes_of_figure_3() -> None:
    found = shapes(on_meta("zfnet"), SIZE)
    names = ("conv1", "norm1", "conv2", "norm2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7")
    assert [found[name] for name in names] == [
        *((96, 110, 110), (96, 55, 55), (256, 26, 26), (256, 13, 13), (384, 13, 13), (384, 13, 13)),
        *((256, 13, 13), (256, 6, 6), (4096,), (4096,)),
    ]


def test_numbers_agree_with_pytorchcv_but_for_the_order_of_the_paper() -> None:
    """Theirs normalises before it pools, with a fifth of alpha. The paper pools, then normalises."""
    network, x = on_meta("zfnet_without_67", num_classes=7).eval(), 30 * images(1, SIZE)
    fill(network.children(), gain=0.7)
    with torch.device("meta"):
        features = theirs().features.eval()
    fill([features])
    ours = {name: value for name, value in network.state_dict().items() if name.startswith("conv")}
    features.load_state_dict(dict(zip(features.state_dict(), ours.values(), strict=True)))
    network.norm1.alpha = network.norm2.alpha = 1e-4
    with torch.no_grad():
        expected = features(x)
        assert not close(network.forward_features(x), expected)
        swap = {"pool1": "norm1", "norm1": "pool1", "pool2": "norm2", "norm2": "pool2"}
        network.feature_layers = [swap.get(name, name) for name in network.feature_layers]
        assert close(network.forward_features(x), expected)
