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

DEEP = (
    "1001",
    "1202",
    "fractalnet_thin_c6",
    "densenet_bc_250",
    "densenet_bc_190",
    "pyramidnet2",
    "preresnet1",
)
SHALLOW = [name for name in NAMES if not any(part in name for part in DEEP)]
ALL = slow_except(SHALLOW, NAMES)
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


@pytest.mark.parametrize("name", ALL)
def test_stages_head_and_layers_are_found(name: str) -> None:
    card = find_card(name)
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
        network = timm.create_model(name, drop_rate=0.1).eval()
        images = torch.zeros(1, *card.input_size)
        features = network.forward_features(images)
        assert features.shape[1] == network.num_features
        assert network.forward_head(features, pre_logits=True).shape == (1, network.head_hidden_size)
        assert network(images).shape == (1, network.num_classes) == (1, card.num_classes)
        assert network.get_submodule(card.first_conv) is not None
        assert network.get_submodule(card.classifier) is network.get_classifier()
        change_head(network, 7, "replace", 0.0)
        assert network(images).shape == (1, 7)
    assert len(classifier_layers(network)) == 1 and head_parameters(network)
    for coarse in (True, False):
        groups = timm.models.group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
        assert len(set(groups.values())) >= 3


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_learn_at_the_size_of_their_cards(name: str) -> None:
    card = find_card(name)
    torch.manual_seed(0)
    backbone = load_backbone(card, classes=list("abc"), pretrained=False)
    images = torch.randn(2, *card.preprocessing.input_size)
    nn.functional.cross_entropy(backbone.network(images), torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in backbone.network.parameters())
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
