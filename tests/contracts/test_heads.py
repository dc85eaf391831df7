"""Every family takes a new classifier that gives logits and is found again (without weights)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from finetune.errors import UsageError
from pretrained.backbone import load_backbone
from pretrained.catalog import Card, find_card, torchvision_names
from pretrained.graph.classifier import classifier_layers, head_parameters
from pretrained.heads import change_head
from pretrained.loading import _find_timm_filter
from pretrained.network import build_network
from tests.contracts.families import (
    DEFAULT_TIMM,
    DEFAULT_TORCHVISION,
    ENCODERS,
    HEAVY,
    SMALLEST,
    TORCHVISION,
)
from tests.sweeps import slow_except

NUM_CLASSES = 7
PURE_ENCODERS = {
    "deepseek_vit_412m_enc",
    "gemma4_vit_167m_enc",
    "gemma4_vit_570m_enc",
    "mobilenetv5_300m_enc",
    "qwen3_vit_88m_enc",
    "qwen3_vit_306m_enc",
    "qwen3_vit_416m_enc",
}
"""Vision towers that cannot hold a classifier."""
SMALLER_INPUTS = {"mobilenetv5": 256, "sequencer": 64}


def build(card: Card) -> nn.Module:
    """On the meta device; torchvision's RegNet computes with its tensors while it is built."""
    device = "cpu" if card.architecture.startswith("regnet") and card.library == "torchvision" else "meta"
    with torch.device(device):
        return build_network(card)


def check_new_head(network: nn.Module, img_size: int, dropout: float = 0.0) -> None:
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    old = classifier_layers(network)
    with torch.device(next(network.parameters()).device):
        change_head(network, NUM_CLASSES, "replace", dropout)
    after = dict(network.named_parameters())
    head = head_parameters(network)
    layers = classifier_layers(network)
    assert layers
    for layer in layers:
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert outputs == NUM_CLASSES
        assert layer.bias is not None
    assert head
    assert all(before.get(name) == id(after[name]) for name in after.keys() - head)  # the rest is untouched
    modules = set(network.modules())
    assert not modules & set(old)
    assert {id(parameter) for layer in layers for parameter in layer.parameters()} <= {
        id(after[name]) for name in head
    }
    assert not any(parameter.shape[:1] == (1000,) for parameter in network.parameters())
    check_logits(network.eval(), img_size)
    if hasattr(network, "reset_classifier"):  # VOLO used to give a tuple here
        check_logits(network.train(), img_size)


def check_logits(network: nn.Module, img_size: int) -> None:
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits = network(torch.zeros(2, 3, img_size, img_size, device=device))
    assert logits.shape == (2, NUM_CLASSES)


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", slow_except(DEFAULT_TIMM, sorted(set(SMALLEST) - set(ENCODERS))))
def test_timm_family(family: str) -> None:
    card = find_card(f"timm/{SMALLEST[family]}")
    size = SMALLER_INPUTS.get(family, card.preprocessing.img_size)
    network = build(card)
    check_new_head(network, size)


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", slow_except(DEFAULT_TIMM, sorted(SMALLEST)))
def test_the_converter_of_every_timm_family_is_found_without_weights(family: str) -> None:
    assert callable(_find_timm_filter(find_card(f"timm/{SMALLEST[family]}")))


@pytest.mark.parametrize("name", slow_except(DEFAULT_TORCHVISION, TORCHVISION))
def test_torchvision_classifier(name: str) -> None:
    card = find_card(f"torchvision/{name}")
    check_new_head(build(card), card.preprocessing.img_size)


def test_every_classifier_of_torchvision_is_here() -> None:
    assert set(TORCHVISION) | HEAVY == set(torchvision_names())


@pytest.mark.parametrize("name", slow_except(["gemma4_vit_167m_enc"], sorted(PURE_ENCODERS)))
def test_an_encoder_is_refused_before_anything_is_loaded(name: str) -> None:
    card = find_card(f"timm/{name}")
    with torch.device("meta"), pytest.raises(UsageError, match=r"cannot (hold|build it with) a classifier"):
        load_backbone(card, classes=["a", "b"], offline=True)
    with torch.device("meta"):
        network = build_network(card)
        with pytest.raises(UsageError, match="features only"):
            change_head(network, 7, "replace")


@pytest.mark.parametrize("family", slow_except(["hieradet_sam2"], sorted(ENCODERS)))
def test_a_network_without_a_classifier_is_built_with_one(family: str) -> None:
    card = find_card(f"timm/{SMALLEST[family]}")
    assert card.num_classes == 0
    network = build(replace(card, num_classes=NUM_CLASSES))
    check_new_head(network, card.preprocessing.img_size)


def test_no_encoder_is_missing() -> None:
    """Every one is of a family that is tried above without its suffix."""
    assert set(timm.list_models("*_enc")) == PURE_ENCODERS


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch16_siglip_224", "caformer_s18"])
def test_networks_with_heads_of_other_kinds(name: str) -> None:
    """Published without a classifier (DINOv2, SigLIP), or with one of two layers (CAFormer)."""
    card = find_card(f"timm/{name}")
    with torch.device("meta"):
        backbone = load_backbone(card, classes=list("abcdefg"), pretrained=False)
    assert [type(layer) for layer in classifier_layers(backbone.network)] == [nn.Linear]
    assert backbone.stages[-1].role == "head"
    assert backbone.stages[-1].parameters == ("head.fc.weight", "head.fc.bias") or name != "caformer_s18"
    check_logits(backbone.network.eval(), card.preprocessing.img_size)


def test_timm_takes_a_dropout_rate_everywhere() -> None:
    """It is given to the constructor, which must know the word; the default of some families is not 0."""
    for family in ("ghostnet", "rexnet", "senet", "resnet", "vision_transformer"):
        with torch.device("meta"):
            network = build_network(find_card(f"timm/{SMALLEST[family]}"), dropout=0.0)
        rates = [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)]
        assert not any(rates)
        assert not getattr(network, "drop_rate", 0)
    assert timm.create_model("ghostnet_050").drop_rate == 0.2
