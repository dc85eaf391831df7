"""New classifiers: pooled features, dropout, one linear layer, and alive from the first step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import UsageError
from pretrained.backbone import Backbone, load_backbone
from pretrained.catalog import Card, HeadChoice, find_card
from pretrained.graph.classifier import classifier_layers, head_parameters
from pretrained.heads import HEAD_STD, PooledHead, change_head
from pretrained.network import build_network, with_published_dropout
from pretrained.zoo import NAMES as NAMES_OF_ZOO
from tests.sweeps import slow_except

K = 7
NAMES = [
    "torchvision/squeezenet1_1",
    "torchvision/mobilenet_v3_small",
    "torchvision/resnet18",
    "timm/test_resnet",
    "timm/test_vit",
    "timm/test_convnext",
    "timm/test_efficientnet",
]
DROP_FC = [
    "torchvision/vgg11",
    "torchvision/alexnet",
    "torchvision/mobilenet_v3_small",
    "torchvision/maxvit_t",
    "timm/vgg11",
]


def on_meta(card: Card, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return build_network(card, **kwargs)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def test_squeezenet_becomes_pooled_features_and_a_linear_layer() -> None:
    torch.manual_seed(0)
    network = build_network(find_card("squeezenet1_1"))
    change_head(network, K, "replace")
    assert isinstance(network.classifier, PooledHead)
    images = torch.randn(2, 3, 96, 96)
    network.eval()
    with torch.inference_mode():
        features = network.features(images).mean((2, 3))
        (layer,) = classifier_layers(network)
        expected = F.linear(features, layer.weight, layer.bias)
        torch.testing.assert_close(network(images), expected)
    assert head_parameters(network) == {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize("name", NAMES)
def test_a_new_head_starts_alive(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(find_card(name))
    change_head(network, K, "replace")
    (layer,) = classifier_layers(network)
    assert layer.weight.std().item() == pytest.approx(HEAD_STD, rel=0.15)
    assert layer.bias is not None
    assert not layer.bias.any()
    features = torch.randn(64, layer.weight.shape[1])
    loss = F.cross_entropy(layer(features), torch.arange(64) % K)
    assert loss.item() == pytest.approx(math.log(K), rel=0.05)
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert (layer.weight.grad != 0).all()
    assert (layer.bias.grad != 0).all()


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropout", [0.0, 0.37])
def test_dropout_stands_before_the_classifier(name: str, dropout: float) -> None:
    backbone = load_backbone(find_card(name), classes=list("abcdefg"), dropout=dropout, pretrained=False)
    network = backbone.network
    seen: list[torch.Tensor] = []
    (layer,) = classifier_layers(network)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    network.eval()
    torch.manual_seed(0)
    size = backbone.card.preprocessing.img_size
    images = torch.randn(4, 3, size, size)
    with torch.inference_mode():
        network(images)
        for module in network.modules():  # only dropout trains: features stay what they were
            module.training = isinstance(module, nn.Dropout)
        network.training = True
        network(images)
    dropped = ((seen[1] == 0) & (seen[0] != 0)).sum().item() / max((seen[0] != 0).sum().item(), 1)
    assert dropped == pytest.approx(dropout, abs=0.08)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name", slow_except([NAMES[0], DROP_FC[0]], [name for name in (*NAMES, *DROP_FC) if "maxvit" not in name])
)
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.5), (0.3, 0.0)])
def test_a_second_generation_is_built_like_a_first(name: str, first: float, second: float) -> None:
    choice: HeadChoice = "drop_fc" if name in DROP_FC else "replace"
    card = find_card(name)
    with torch.device("meta"):
        one = load_backbone(card, classes=list("abc"), head=choice, dropout=first, pretrained=False)
        two = load_backbone(one.card, classes=list("abcd"), head="replace", dropout=second, pretrained=False)
        again = load_backbone(one.card, classes=list("abcd"), head=choice, dropout=second, pretrained=False)
        kept = load_backbone(one.card, classes=list("abc"), head="keep", dropout=0.9, pretrained=False)
    for backbone in (one, two, again, kept):
        rebuilt = on_meta(backbone.card)
        assert str(rebuilt) == str(backbone.network)
        assert shapes(rebuilt) == shapes(backbone.network)
        assert backbone.card.head == choice
    assert (two.card.dropout, kept.card.dropout) == (second, first)
    assert shapes(two.network) == shapes(again.network)


# --- the rate of a published network -------------------------------------------------------------


def rates(network: nn.Module) -> set[float]:
    return {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)}


def load_on_meta(card: Card, head: HeadChoice = "replace", dropout: float | None = None) -> Backbone:
    classes = list("abc") if head == "replace" else [str(number) for number in range(card.num_classes)]
    with torch.device("meta"):
        return load_backbone(card, classes=classes, head=head, dropout=dropout, pretrained=False)


PUBLISHED: dict[str, tuple[float, set[float]]] = {
    "alexnet_2012": (0.5, {0.5}),
    "alexnet_2012_without_67": (0.0, set()),  # fc6 and fc7 are not there
    "zfnet": (0.5, {0.5}),
    "vgg11_lrn": (0.5, {0.5}),
    "nin_cifar": (0.5, {0.5}),
    "nin_imagenet": (0.5, {0.5}),
    "googlenet_2014": (0.4, {0.4, 0.7}),  # its auxiliary classifiers
    "cifar_fractalnet20": (0.4, {0.0, 0.1, 0.2, 0.3, 0.4}),
    "cifar_wrn_16_4": (0.0, {0.0}),
    "cifar_wrn_28_10_dropout": (0.3, {0.0, 0.3}),  # none before the classifier
    "cifar_wrn_16_8_dropout_svhn": (0.4, {0.0, 0.4}),
    "cifar_resnet20": (0.0, {0.0}),
    "alphago_policy_128": (0.0, {0.0}),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("head", ["replace", "keep"])
def test_a_published_network_is_built_with_its_dropout(name: str, head: HeadChoice) -> None:
    rate, layers = PUBLISHED[name]
    backbone = load_on_meta(find_card(name), head)
    assert backbone.card.dropout == pytest.approx(rate)
    assert sorted(rates(backbone.network)) == pytest.approx(sorted(layers))
    assert str(on_meta(backbone.card)) == str(backbone.network)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["alexnet_2012", "cifar_wrn_16_4", "cifar_wrn_28_10_dropout", "nin_cifar"])
@pytest.mark.parametrize("asked", [0.0, 0.2])
def test_another_rate_may_be_asked_of_a_published_network(name: str, asked: float) -> None:
    backbone = load_on_meta(find_card(name), dropout=asked)
    assert max(rates(backbone.network)) == backbone.card.dropout == asked
    assert str(on_meta(backbone.card)) == str(backbone.network)
    second = load_on_meta(backbone.card)  # the next run has the rate of the one it comes from
    assert second.card.dropout == asked and rates(second.network) == rates(backbone.network)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["resnet18", "timm/efficientnet_b0", "torchvision/resnet18"])
def test_every_other_network_has_no_dropout_unless_it_is_asked_for(name: str) -> None:
    first = load_on_meta(find_card(name))
    assert first.card.dropout == getattr(first.network, "drop_rate", 0.0) == 0.0
    assert not any(rates(first.network))
    asked = load_on_meta(find_card(name), dropout=0.3)
    assert load_on_meta(asked.card).card.dropout == 0.0


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", slow_except(PUBLISHED, NAMES_OF_ZOO))
def test_the_published_rate_builds_the_published_network(name: str) -> None:
    card = find_card(name)
    assert str(on_meta(card, dropout=with_published_dropout(card).dropout)) == str(on_meta(card))


def test_finding_the_published_rate_draws_no_random_number() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert with_published_dropout(find_card("nin_cifar")).dropout == 0.5
    assert torch.get_rng_state().equal(before)


# --- fully connected layers ----------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", DROP_FC)
def test_fully_connected_layers_are_dropped(name: str) -> None:
    card = find_card(name)
    network = on_meta(card)
    before = sum(parameter.numel() for parameter in network.parameters())
    with torch.device("meta"):
        change_head(network, K, "drop_fc", 0.25)
    (layer,) = classifier_layers(network)
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)][-1] == 0.25
    if "vgg" in name:
        assert layer.weight.shape[:2] == (K, 512)
        assert sum(parameter.numel() for parameter in network.parameters()) == 9_220_480 + 513 * K
    size = card.preprocessing.img_size
    assert network.eval()(torch.zeros(2, 3, size, size, device="meta")).shape == (2, K)


@pytest.mark.parametrize(
    "name",
    ["torchvision/resnet18", "torchvision/efficientnet_b0", "torchvision/vit_b_16", "timm/test_resnet"],
)
def test_nothing_to_drop_elsewhere(name: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match="no fully connected layers"):
        change_head(build_network(find_card(name)), K, "drop_fc")


@pytest.mark.parametrize("name", NAMES)
def test_keep_leaves_everything(name: str) -> None:
    network = build_network(find_card(name))
    before = {key: (id(value), value.clone()) for key, value in network.named_parameters()}
    text = str(network)
    change_head(network, K, "keep")
    assert str(network) == text
    assert all(id(value) == before[key][0] for key, value in network.named_parameters())
    assert all(value.equal(before[key][1]) for key, value in network.named_parameters())


def test_keep_leaves_a_metaformers_two_layers_and_replace_does_not() -> None:
    card = find_card("caformer_s18")
    network = on_meta(card)
    assert "head.fc.fc2.weight" in network.state_dict()
    with torch.device("meta"):
        change_head(network, K, "replace")
    assert {key for key in network.state_dict() if key.startswith("head.fc")} == {
        "head.fc.weight",
        "head.fc.bias",
    }


def test_an_input_size_follows_the_card_and_not_an_earlier_run() -> None:
    card = find_card("test_vit")
    at_96 = replace(
        card, preprocessing=replace(card.preprocessing, img_size=96), model_args=(("img_size", 96),)
    )
    assert on_meta(at_96).patch_embed.img_size == (96, 96)  # type: ignore[union-attr]
    back = at_96.with_input(card.preprocessing)
    assert on_meta(back).patch_embed.img_size == (160, 160)  # type: ignore[union-attr]


def test_a_size_that_fits_no_patch_is_refused() -> None:
    card = find_card("timm/swin_tiny_patch4_window7_224")
    card = card.with_input(replace(card.preprocessing, img_size=1))
    with torch.device("meta"), pytest.raises(UsageError):
        load_backbone(card, classes=["a", "b"], pretrained=False)


def test_a_kept_classifier_must_have_the_same_labels() -> None:
    card = find_card("test_resnet")
    with pytest.raises(UsageError, match="1,000 outputs, the data 2 classes"):
        load_backbone(card, classes=["a", "b"], head="keep", pretrained=False)
    ours = replace(card, place="folder", num_classes=2, label_names=("b", "a"))
    with pytest.raises(UsageError, match="other labels or another order"):
        load_backbone(ours, classes=["a", "b"], head="keep", pretrained=False)
