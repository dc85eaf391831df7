"""Every network of the zoo is a backbone like any other: found, divided, cut, given a new head, exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from finetune.errors import UsageError
from finetune.exporters.config import build_config, loads_in_timm
from pretrained.backbone import _stages_of, load_backbone
from pretrained.catalog import Card, _card_from_values, find_card, list_names
from pretrained.graph.classifier import classifier_layers, head_parameters
from pretrained.graph.layers import Layers
from pretrained.heads import change_head
from pretrained.network import build_network, build_outline
from pretrained.zoo import NAMES, default_cfgs
from tests.sweeps import slow_except

FAMILIES = (
    *("lenet5", "lenet5_paper", "alexnet_2012", "alexnet_2012_without_3467", "zfnet_without_67", "vgg11_lrn"),
    *("vgg16_c", "nin_cifar", "nin_imagenet", "googlenet_2014", "bn_inception", "resnet18_a"),
    *("cifar_resnet20", "cifar_preresnet110_bn_after", "cifar_wrn_16_4", "cifar_resnext29_8x64d"),
    *("cifar_fractalnet_thin_c2", "cifar_densenet_40_12", "cifar_pyramidnet110_a48"),
    *("cifar_shake_shake_26_2x32d", "alphago_policy_128", "conv_pattern"),
)
"""The small ones of each family, which run by default."""
SHALLOWER = {
    "cifar_resnet20": 8,
    "cifar_preresnet110_bn_after": 8,
    "cifar_wrn_16_4": 10,
    "cifar_resnext29_8x64d": 11,
    "cifar_densenet_40_12": 10,
    "cifar_pyramidnet110_a48": 8,
    "cifar_shake_shake_26_2x32d": 8,
}
"""Depths with fewer blocks, of which these are built; the slow part builds their families as published."""
ALL = slow_except(FAMILIES, NAMES)
READ_THE_WHOLE_MAP = ("alexnet", "zfnet", "vgg", "lenet", "conv_pattern")
"""Beginnings of the names of networks without a global pooling to choose."""
SMALL = (
    "lenet5",
    "lenet5_paper",
    "conv_pattern",
    "nin_cifar",
    "cifar_resnet20",
    "cifar_plain20",
    "cifar_wrn_16_4",
)
"""These run with numbers, at the size of their cards."""


def depth_of(name: str) -> dict[str, int]:
    return {"depth": SHALLOWER[name]} if name in SHALLOWER else {}


def outline_of(name: str, **arguments: object) -> nn.Module:
    return timm.create_model(name, **depth_of(name), **arguments).eval()


def names_of(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def test_every_name_is_in_the_list_and_new() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert [name for name in list_names() if name.startswith("zoo/")] == [f"zoo/{name}" for name in NAMES]
    assert set(timm.list_models(module="zoo")) == set(NAMES) == set(default_cfgs)
    assert not [name for name in list_names("lenet5") if name.startswith("timm/")]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_card_that_finds_itself_again(name: str) -> None:
    card = find_card(name)
    assert card.name == f"zoo/{name}" and card.source == "zoo" and card.place == "none"
    assert find_card(f"zoo/{name}") == find_card(f"timm/{name}") == card
    assert card.num_classes == default_cfgs[name].default.num_classes
    assert card.preprocessing.input_size[1:] == default_cfgs[name].default.input_size[1:]


def test_a_name_of_another_library_is_not_one_of_the_zoo() -> None:
    with pytest.raises(UsageError, match="no network of that name"):
        find_card("zoo/resnet18")


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", ALL)
def test_stages_head_and_layers_are_found(name: str) -> None:
    card = replace(find_card(name), model_args=tuple(depth_of(name).items()))
    network = build_outline(card)
    stages = _stages_of(network, card.preprocessing)
    assert sorted(parameter for stage in stages for parameter in stage.parameters) == sorted(
        names_of(network)
    )
    assert 3 <= len(stages) <= 11
    assert stages[0].role == "stem" and [stage.role for stage in stages].count("body") >= 1
    head = head_parameters(network)
    assert bool(head) == (stages[-1].role == "head") and head <= names_of(network)
    layers = Layers(network, stages, card.preprocessing.input_size)
    assert [layer.name for layer in layers.all if layer.name != "pre_logits"] == [
        stage.name for stage in stages if stage.role != "head"
    ]
    assert layers.pre_logits is not None


@pytest.mark.parametrize("name", ALL)
def test_the_interface_of_timm_is_kept(name: str) -> None:
    card = default_cfgs[name].default
    with torch.device("meta"):
        network = outline_of(name, drop_rate=0.1)
        images = torch.zeros(1, *card.input_size)
        features = network.forward_features(images)
        assert features.shape[1] == network.num_features
        assert network.forward_head(features, pre_logits=True).shape == (1, network.head_hidden_size)
        assert network(images).shape == (1, network.num_classes) == (1, card.num_classes)
        assert network.get_submodule(card.classifier) is network.get_classifier()
        change_head(network, 7, "replace", 0.0)
        assert network.forward_head(features).shape == (1, 7)
    assert len(classifier_layers(network)) == 1 and head_parameters(network)
    for coarse in (True, False):
        groups = timm.models.group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
        assert len(set(groups.values())) >= 3


@pytest.mark.parametrize("name", ALL)
def test_without_classes_the_features_come_out(name: str) -> None:
    """Built so, or after a reset, for images of other channels than the card's."""
    card = default_cfgs[name].default
    with torch.device("meta"):
        network = outline_of(name, num_classes=0, in_chans=2, global_pool="avg")
        images = torch.zeros(1, 2, *card.input_size[1:])
        assert isinstance(network.get_classifier(), nn.Identity)
        features = network.forward_features(images)
        assert features.shape[:2] == (1, network.num_features)
        for num_classes, width in ((None, network.head_hidden_size), (5, 5), (0, network.head_hidden_size)):
            if num_classes is not None:
                network.reset_classifier(num_classes)
                assert network.num_classes == num_classes
            assert network.forward_head(features).shape == (1, width)
        assert network.get_submodule(card.first_conv).in_channels == 2


@pytest.mark.parametrize("name", ALL)
def test_the_pooling_is_the_one_asked_for_or_refused(name: str) -> None:
    card = default_cfgs[name].default
    if name.startswith(READ_THE_WHOLE_MAP):
        with torch.device("meta"), pytest.raises(ValueError, match=r"'max': .* takes 'avg' only"):
            timm.create_model(name, global_pool="max")
        with torch.device("meta"), pytest.raises(ValueError, match="takes 'avg' only"):
            timm.create_model(name).reset_classifier(3, "")
        return
    with torch.device("meta"):
        network = outline_of(name, num_classes=0, global_pool="")
        features = network.forward_features(torch.zeros(1, *card.input_size))
        assert network.forward_head(features).shape == features.shape
        for pool, width in (("max", features.shape[1]), ("catavgmax", 2 * features.shape[1])):
            network.reset_classifier(0, pool)
            assert network.forward_head(features).shape == (1, width) == (1, network.head_hidden_size)
            network.reset_classifier(3)
            assert network.forward_head(features).shape == (1, 3)


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_learn_at_the_size_of_their_cards(name: str) -> None:
    card = find_card(name)
    torch.manual_seed(0)
    backbone = load_backbone(card, classes=list("abc"), pretrained=False)
    images = torch.randn(2, *card.preprocessing.input_size)
    nn.functional.cross_entropy(backbone.network(images), torch.tensor([0, 2])).backward()
    lost = [
        name for name, one in backbone.network.named_parameters() if one.grad is None or not one.grad.any()
    ]
    assert lost == []
    assert backbone.card.name == card.name and backbone.stages[-1].role == "head"


@pytest.mark.parametrize(
    "name", ["lenet5", "lenet5_paper", "nin_cifar", "conv_pattern", "cifar_resnet20", "alphago_policy_128"]
)
def test_an_export_says_that_plain_timm_cannot_build_it_and_is_found_again(name: str) -> None:
    backbone = load_backbone(find_card(name), classes=list("abc"), pretrained=False)
    assert not loads_in_timm(backbone.card)
    config = build_config(backbone.card, backbone.network)
    assert config["architecture"] == f"{name} of the published networks, which only finetune loads"
    assert config["architecture"].partition(".")[0] not in timm.list_models()
    card: Card = _card_from_values("local-dir:x", config, "folder", "x")
    again = build_network(replace(card, place="none"))
    assert names_of(again) == names_of(backbone.network)
    again.load_state_dict(backbone.network.state_dict())
    images = torch.randn(2, *card.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), backbone.network.eval()(images))
