"""Exchange the classifier of a network for a new one.

A new head is what the lectures call the linear classifier: pooled features, optional dropout, one
linear layer, whatever the network's own head looked like. It starts with small weights and no bias,
so that the first loss is ln(num_classes) and every gradient is alive. (SqueezeNet's own head ends in
a ReLU: swapping only its last convolution, as tutorials do, leaves it half dead at birth.)

Shape legend: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from finetune.errors import UsageError
from pretrained.catalog import HeadChoice
from pretrained.graph.classifier import classifier_layers, last_linear_layer, torchvision_head

HEAD_STD = 0.01
"""Standard deviation of a new classifier's weights, as in VGG (arXiv:1409.1556)."""

HEAD_PARTS = ("use_mlp_head", "use_aux_head")
"""Arguments of timm networks whose own head is more than a linear layer: MetaFormers have two layers, VOLO
classifies every patch as well (and returns a tuple while it trains). A new head has none of it."""


class PooledHead(nn.Sequential):
    """Global average pooling, dropout, one linear layer: (B, C, H, W) -> (B, K)."""

    def __init__(self, num_features: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(dropout), nn.Linear(num_features, num_classes)
        )


class DropoutLinear(nn.Sequential):
    """Dropout, then one linear layer: (B, C) -> (B, K). Stands where a bare linear classifier was."""

    def __init__(self, num_features: int, num_classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(num_features, num_classes))

    @property
    def in_features(self) -> int:
        """Features that enter, C."""
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        return layer.in_features


def change_head(network: nn.Module, num_classes: int, choice: HeadChoice, dropout: float = 0.0) -> None:
    """Give a network a classifier for ``num_classes``, in place.

    Args:
        network: a network of :func:`build_network`.
        num_classes: outputs of the new classifier.
        choice: ``replace`` or ``drop_fc``; ``keep`` leaves the network alone.
        dropout: rate before the new linear layer.

    Raises:
        UsageError: ``drop_fc`` on a network without fully connected layers under its classifier, or a
            network that gives features only.
    """
    if choice == "keep":
        return
    if hasattr(network, "reset_classifier"):
        _change_timm_head(network, num_classes, choice, dropout)
    elif torchvision_head(network):
        _change_torchvision_head(network, num_classes, choice, dropout)
    layers = classifier_layers(network)
    if not layers:
        found = f"{type(network).__name__} gives features only and cannot hold a classifier"
        raise UsageError(
            f"strategy.head={choice}", found, "Take another backbone (see `finetune backbones`)."
        )
    for layer in layers:
        init_classifier(layer)


def init_classifier(layer: nn.Linear | nn.Conv2d) -> None:
    """Start a linear classifier small and unbiased."""
    nn.init.trunc_normal_(layer.weight, std=HEAD_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _change_timm_head(network: Any, num_classes: int, choice: HeadChoice, dropout: float) -> None:
    if choice == "drop_fc":
        if not isinstance(getattr(network, "pre_logits", None), timm.models.vgg.ConvMlp):
            raise _nothing_to_drop(type(network).__name__)
        network.pre_logits = nn.Identity()
        network.head_hidden_size = network.num_features
        network.head = timm.layers.ClassifierHead(network.num_features, 1, "avg", drop_rate=dropout)
    parts = [part for part in HEAD_PARTS if getattr(network, part, False)]
    for part in parts:
        setattr(network, part, False)
    network.left_out = [*getattr(network, "left_out", ()), *parts]  # for the export: timm does not notice
    network.reset_classifier(num_classes)


def _change_torchvision_head(
    network: nn.Module, num_classes: int, choice: HeadChoice, dropout: float
) -> None:
    name = torchvision_head(network)
    assert name is not None
    head = getattr(network, name)
    layers = list(head) if type(head) is nn.Sequential else [head]
    if choice == "drop_fc":
        setattr(network, name, _dropped(network, layers, num_classes, dropout))
    elif isinstance(layers[-1], (nn.Linear, DropoutLinear)):
        new = _linear(layers[-1].in_features, num_classes, dropout, after=layers[:-1])
        if type(head) is nn.Sequential:
            head[-1] = new
        else:
            setattr(network, name, new)
    else:  # SqueezeNet: convolution, ReLU, pooling
        setattr(network, name, PooledHead(_last_in_features(head), num_classes, dropout))


def _linear(num_features: int, num_classes: int, dropout: float, after: list[nn.Module]) -> nn.Module:
    """A linear layer whose dropout is either the network's own layer before it, or a new one."""
    if after and isinstance(after[-1], nn.Dropout):
        after[-1].p = dropout
    elif dropout:
        return DropoutLinear(num_features, num_classes, dropout)
    return nn.Linear(num_features, num_classes)


def _last_in_features(head: nn.Module) -> int:
    layer = last_linear_layer(head)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _dropped(network: nn.Module, layers: list[nn.Module], num_classes: int, dropout: float) -> nn.Module:
    """The head without any of its fully connected layers: what stood before them, dropout, linear."""
    linear = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if len(linear) < 2:
        raise _nothing_to_drop(type(network).__name__)
    first = layers[linear[0]]
    assert isinstance(first, nn.Linear)
    kept = [layer for layer in layers[: linear[0]] if not isinstance(layer, nn.Dropout)]
    num_features = first.in_features // _flattened_positions(network)
    return nn.Sequential(*kept, nn.Dropout(dropout), nn.Linear(num_features, num_classes))


def _flattened_positions(network: nn.Module) -> int:
    """VGG and AlexNet flatten a grid of features for fc6: pool it to one position; return how many it had."""
    pool = getattr(network, "avgpool", None)
    if not isinstance(pool, nn.AdaptiveAvgPool2d):
        return 1
    size: Any = pool.output_size
    height, width = size if isinstance(size, tuple) else (size, size)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    return int(height * width)


def _nothing_to_drop(name: str) -> UsageError:
    found = f"{name} has no fully connected layers under its classifier"
    return UsageError("strategy.head=drop_fc", found, "Take head=replace; drop_fc is for VGG and AlexNet.")
