"""Every family of timm and every classifier of torchvision divides into ordered stages (without weights).

The order is checked against a record of its own: hooks that note when each layer is first called. All
families of both libraries together take about a minute on one core.
"""

from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from torch import nn

from pretrained.stages import Stage, find_stages

# The smallest model of every family of timm 1.0.31 (of `eva` one of the smallest that has a classifier).
SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_336",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny_jx",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

ENCODERS = {
    "deepseek_vit": "a vision tower: features only",
    "gemma4_vit": "a vision tower: features only",
    "hieradet_sam2": "published without a classifier",
    "qwen3_vit": "a vision tower: features only",
}

# Torchvision's RegNets must be built with real weights; the five largest of fifteen take most of the time.
HEAVY = {f"regnet_{size}" for size in ("x_16gf", "x_32gf", "y_16gf", "y_32gf", "y_128gf")}

TORCHVISION = sorted(set(torchvision.models.list_models(module=torchvision.models)) - HEAVY)

# LSTMs are slow to trace; this grid is as good.
SMALLER_INPUTS = {"sequencer": (3, 64, 64)}


def build_timm(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.device("meta"):
        network = timm.create_model(name)
    return network, network.pretrained_cfg["input_size"]


def build_torchvision(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    size = 299 if name == "inception_v3" else 224
    slow_start = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # RegNet reads numbers while it is built
    with torch.device(device):
        network = torchvision.models.get_model(name, weights=None, **slow_start)
    return network, (3, size, size)


def first_calls(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """When each leaf module with parameters is first called, by name (tokens of containers have no call)."""
    calls: dict[str, int] = {}
    leaves = {name: module for name, module in network.named_modules() if not list(module.children())}
    names = {module: name for name, module in leaves.items() if list(module.parameters())}

    def note(module: nn.Module, _: object) -> None:
        calls.setdefault(names[module], len(calls))

    handles = [module.register_forward_pre_hook(note) for module in names]
    was_training = network.training
    device = next(network.parameters()).device
    with torch.no_grad():
        network.eval()(torch.zeros(1, *input_size, device=device))
    network.train(was_training)
    for handle in handles:
        handle.remove()
    return calls


def starts(stages: tuple[Stage, ...], calls: dict[str, int]) -> Iterator[int]:
    """The first call of a layer in each stage that has one called."""
    for stage in stages:
        owners = {name.rpartition(".")[0] for name in stage.parameters}
        called = [calls[owner] for owner in owners if owner in calls]
        if called:
            yield min(called)


def check_division(network: nn.Module, stages: tuple[Stage, ...], has_head: bool) -> None:
    parameters = [name for stage in stages for name in stage.parameters]
    assert sorted(parameters) == sorted(name for name, _ in network.named_parameters())
    modules = [name for stage in stages for name in stage.modules]
    assert len(modules) == len(set(modules))
    assert set(modules) < {name for name, _ in network.named_modules()}
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert 3 <= len(stages) <= 11
    roles = [stage.role for stage in stages]
    body = ["body"] * roles.count("body")
    assert body
    assert roles == ["stem", *body, *["neck"] * ("neck" in roles), *["head"] * has_head]


def test_no_family_of_timm_is_missing() -> None:
    assert set(SMALLEST) == set(timm.list_modules())


@pytest.mark.parametrize("family", sorted(SMALLEST))
def test_timm_family(family: str) -> None:
    network, input_size = build_timm(SMALLEST[family])
    input_size = SMALLER_INPUTS.get(family, input_size)
    calls = first_calls(network, input_size)
    stages = find_stages(network, input_size)
    check_division(network, stages, has_head=family not in ENCODERS)
    order = list(starts(stages, calls))
    assert order == sorted(order)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_classifier(name: str) -> None:
    network, input_size = build_torchvision(name)
    stages = find_stages(network, input_size)
    check_division(network, stages, has_head=True)
    order = list(starts(stages, first_calls(network, input_size)))
    assert order == sorted(order)
