"""Replace the classifier of a network.

A new head is a linear classifier for any network: pooled features, optional dropout, one linear layer. Its
weights are small and its bias is zero at first, so that the first loss is about ln(num_classes) and no
gradient vanishes. (SqueezeNet's own head ends in a ReLU. If only its last convolution is replaced, as some
tutorials do, about half of its activations have no gradient at first.)

Shape legend: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.catalog import HeadChoice
from pretrained.graph.classifier import classifier_layers, last_linear_layer, torchvision_head

HEAD_STD = 0.01
"""Standard deviation of a new classifier's weights, as in VGG (arXiv:1409.1556)."""

HEAD_PARTS = ("use_mlp_head", "use_aux_head")
"""Arguments of timm networks whose own head is more than a linear layer; a new head is built without them.
MetaFormers have two layers. VOLO also classifies every patch, and returns a tuple in training mode."""


class PooledHead(nn.Sequential):
    """Global average pooling, dropout, one linear layer: (B, C, H, W) -> (B, K)."""

    def __init__(self, num_features: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(dropout), nn.Linear(num_features, num_classes)
        )


class DropoutLinear(nn.Sequential):
    """Dropout, then one linear layer: (B, C) -> (B, K). It replaces a linear classifier without dropout."""

    def __init__(self, num_features: int, num_classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(num_features, num_classes))

    @property
    def in_features(self) -> int:
        """Number of input features, C."""
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        return layer.in_features


def change_head(network: nn.Module, num_classes: int, choice: HeadChoice, dropout: float = 0.0) -> None:
    """Replace the classifier of a network in place.

    Args:
        network: a network of :func:`build_network`.
        num_classes: number of outputs of the new classifier.
        choice: ``replace`` or ``drop_fc``; ``keep`` changes nothing.
        dropout: dropout rate before the new linear layer.

    Raises:
        UsageError: ``drop_fc`` for a network without fully connected layers before its classifier, or a
            network that cannot have a classifier.
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
    """Initialise a linear classifier with small weights and zero bias."""
    nn.init.trunc_normal_(layer.weight, std=HEAD_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


Row = tuple[Tensor, Tensor | None]
"""Weights (K, ...) of a layer that gives the logits of K classes, and its bias (K,)."""


def read_rows(network: nn.Module) -> list[Row]:
    """Return copies of the weights and biases of a network's classifier, one layer after the other."""
    return [
        (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
        for layer in classifier_layers(network)
    ]


def write_rows(network: nn.Module, rows: Sequence[Row], old: Sequence[str], new: Sequence[str]) -> None:
    """Give the classes of a new classifier that an old one had the same weights.

    Args:
        network: with the new classifier; it is changed.
        rows: of the old classifier (:func:`read_rows`).
        old: its classes in index order.
        new: the classes of the new one.

    Raises:
        UsageError: the classifiers have no class in common, or other layers.
    """
    known = {name: index for index, name in enumerate(old)}
    pairs = [(index, known[name]) for index, name in enumerate(new) if name in known]
    layers = classifier_layers(network)
    if not pairs:
        found = f"the network knows none of the classes (it knows {', '.join(old[:3]) or 'no names'})"
        raise UsageError("strategy.head=extend", found, "Take head=replace.")
    if [layer.weight.shape[1:] for layer in layers] != [weight.shape[1:] for weight, _ in rows]:
        found = "the network's classifier has other layers than a new one"
        raise UsageError("strategy.head=extend", found, "Take head=replace.")
    into, out_of = map(list, zip(*pairs, strict=True))
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, rows, strict=True):
            layer.weight[into] = weight[out_of]
            if bias is not None and layer.bias is not None:
                layer.bias[into] = bias[out_of]


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
    network.left_out = [
        *getattr(network, "left_out", ()),
        *parts,
    ]  # for the export; timm keeps no record
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
    """Return a linear layer; its dropout is the network's own layer before it if there is one."""
    if after and isinstance(after[-1], nn.Dropout):
        after[-1].p = dropout
    elif dropout:
        return DropoutLinear(num_features, num_classes, dropout)
    return nn.Linear(num_features, num_classes)


def _last_in_features(head: nn.Module) -> int:
    layer = last_linear_layer(head)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _dropped(network: nn.Module, layers: list[nn.Module], num_classes: int, dropout: float) -> nn.Module:
    """Return a head without the fully connected layers: the layers before them, dropout, linear."""
    linear = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if len(linear) < 2:
        raise _nothing_to_drop(type(network).__name__)
    first = layers[linear[0]]
    assert isinstance(first, nn.Linear)
    kept = [layer for layer in layers[: linear[0]] if not isinstance(layer, nn.Dropout)]
    num_features = first.in_features // _flattened_positions(network)
    return nn.Sequential(*kept, nn.Dropout(dropout), nn.Linear(num_features, num_classes))


def _flattened_positions(network: nn.Module) -> int:
    """Pool the grid that VGG and AlexNet flatten for fc6 to one position; return its number of positions."""
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
