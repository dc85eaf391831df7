"""Every architecture family of both libraries, for the contracts that all of them keep."""

from __future__ import annotations

import torchvision

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

SHALLOW = {"deepseek_vit_412m": {"depth": 4}}
"""Arguments with which a network runs in seconds that is large and has no smaller one in its family."""

ENCODERS = {
    "deepseek_vit": "a vision tower: features only",
    "gemma4_vit": "a vision tower: features only",
    "hieradet_sam2": "published without a classifier",
    "qwen3_vit": "a vision tower: features only",
}

# Torchvision's RegNets must be built with real weights; the five largest of fifteen take most of the time.
HEAVY = {f"regnet_{size}" for size in ("x_16gf", "x_32gf", "y_16gf", "y_32gf", "y_128gf")}

DEFAULT = (
    "timm/test_resnet",
    "timm/test_vit",
    "timm/test_nfnet",  # no normalisation, weights standardised
    "timm/mobilenetv3_small_050",  # pooling before the last layers of the head
    "timm/efficientvim_m1",  # two tensors at the cut
    "timm/crossvit_tiny_240",  # parallel branches to the end
    "timm/levit_128s",  # two classifiers
    "timm/test_coatnet",  # convolutions, then attention
    "timm/swin_tiny_patch4_window7_224",  # channels last, windows in the batch axis
    "torchvision/squeezenet1_0",  # a convolution as the classifier
    "torchvision/mobilenet_v2",  # pooling in the forward itself
    "torchvision/alexnet",  # dropout between fully connected layers
)
"""Twelve networks chosen for their differences; the others are tested with ``-m slow``."""
DEFAULT_TIMM = [family for family, name in SMALLEST.items() if f"timm/{name}" in DEFAULT]

TORCHVISION = sorted(set(torchvision.models.list_models(module=torchvision.models)) - HEAVY)
DEFAULT_TORCHVISION = [name for name in TORCHVISION if f"torchvision/{name}" in DEFAULT]

ZOO = (
    *(
        "zoo/lenet5_paper",
        "zoo/alexnet_2012",
        "zoo/zfnet",
        "zoo/vgg11_lrn",
        "zoo/nin_cifar",
        "zoo/googlenet_2014",
    ),
    *("zoo/bn_inception", "zoo/plain18", "zoo/resnet18_a", "zoo/cifar_plain20", "zoo/cifar_resnet20"),
    *("zoo/cifar_resnet110_sd", "zoo/cifar_preresnet110", "zoo/cifar_wrn_16_4", "zoo/cifar_resnext29_8x64d"),
    *("zoo/cifar_fractalnet_thin_c3", "zoo/cifar_densenet_40_12", "zoo/cifar_pyramidnet110_a48"),
    *(
        "zoo/cifar_shake_shake_26_2x32d",
        "zoo/cifar_se_wrn_16_8",
        "zoo/alphago_policy_128",
        "zoo/conv_pattern",
    ),
)
"""A small network of each family of the published ones."""
ZOO_DEFAULT = ("zoo/lenet5_paper", "zoo/nin_cifar", "zoo/cifar_resnet20", "zoo/cifar_fractalnet_thin_c3")
"""The quick ones among them."""
