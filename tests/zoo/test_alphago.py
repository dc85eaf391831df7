"""AlphaGo's policy network: counts, a bias for each point, and a second forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.certify import assert_deviation, assert_gradient_everywhere, build, num_parameters, on_meta
from tests.zoo.classics import close, reaches_every_parameter

SIZE = (48, 19, 19)


def boards(count: int) -> torch.Tensor:
    return torch.randint(0, 2, (count, *SIZE), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize(
    ("name", "width", "number"),  # computed; not published
    [
        ("alphago_policy", 192, 3_882_793),
        ("alphago_policy_128", 128, 1_777_641),
        ("alphago_policy_256", 256, 6_798_953),
        ("alphago_policy_384", 384, 15_064_297),
    ],
)
def test_counts(name: str, width: int, number: int) -> None:
    layers = 25 * 48 * width + 11 * 9 * width**2 + 12 * width
    network = on_meta(name)
    assert num_parameters(network) == number == layers + width + 361
    assert reaches_every_parameter(network, SIZE)


def test_numbers_agree_with_the_description() -> None:
    network, x = build("alphago_policy_128").eval(), boards(2)
    own = dict(network.named_parameters())
    with torch.no_grad():
        own["head.bias"].normal_()
        y = F.pad(x, (2, 2, 2, 2))  # "zero pads the input into a 23 x 23 image"
        y = F.conv2d(y, own["layers.conv1.weight"], own["layers.conv1.bias"]).relu()
        for number in range(2, 13):  # "each of the subsequent hidden layers 2 to 12 zero pads ... 21 x 21"
            weight, bias = own[f"layers.conv{number}.weight"], own[f"layers.conv{number}.bias"]
            y = F.conv2d(F.pad(y, (1, 1, 1, 1)), weight, bias).relu()
        y = torch.einsum("bcij,c->bij", y, own["head.conv.weight"][0, :, 0, 0]) + own["head.bias"].view(
            19, 19
        )
        assert close(network(x), y.flatten(1))


def test_every_point_has_its_own_bias() -> None:
    network = on_meta("alphago_policy")
    assert network.head.bias.shape == (361,) and network.head.conv.bias is None


def test_gradient_reaches_every_parameter() -> None:
    assert_gradient_everywhere(build("alphago_policy_128"), boards(2))


@pytest.mark.parametrize("num_classes", [361, 2])
def test_weights_begin_by_the_rule_of_he_and_moves_are_about_equally_likely(num_classes: int) -> None:
    network = build("alphago_policy_128", num_classes=num_classes)
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d):
            assert_deviation(layer.weight, (2 / layer.weight[0].numel()) ** 0.5)
            assert not layer.bias.any()
    assert_deviation(network.head.conv.weight if num_classes == 361 else network.head.weight, 0.01)
    assert not network.head.bias.any()


def test_other_classes_are_read_from_pooled_features() -> None:
    network = on_meta("alphago_policy")
    with torch.device("meta"):
        network.reset_classifier(2)
        assert network(torch.zeros(1, *SIZE)).shape == (1, 2)


def test_kept_its_head_gives_one_output_for_each_point_and_replaced_it_pools() -> None:
    from pretrained.backbone import load_backbone
    from pretrained.catalog import find_card
    from pretrained.zoo.alphago import MoveHead

    points = [f"{index:03}" for index in range(361)]  # in the order of rows, as the classes are sorted
    kept = load_backbone(find_card("alphago_policy_128"), classes=points, head="keep", pretrained=False)
    assert isinstance(kept.network.head, MoveHead) and kept.network(boards(1)).shape == (1, 361)
    replaced = load_backbone(find_card("alphago_policy_128"), classes=["a", "b"], pretrained=False)
    assert isinstance(replaced.network.head, nn.Linear) and replaced.network(boards(1)).shape == (1, 2)
