"""Find the classifier of a network from its modules, independent of the names of parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")


def head_parameters(network: nn.Module) -> frozenset[str]:
    """Return the names of the classifier's parameters."""
    classifier = {id(parameter) for layer in _classifiers(network) for parameter in layer.parameters()}
    return frozenset(name for name, parameter in network.named_parameters() if id(parameter) in classifier)


def _classifiers(network: nn.Module) -> list[nn.Module]:
    if hasattr(network, "get_classifier"):
        found = network.get_classifier()  # type: ignore[operator]  # nn.Module types every attribute as a tensor
        layers = list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
        return [_with_norm(network, layer) for layer in layers if isinstance(layer, nn.Module)]
    head = torchvision_head(network)
    return [last_linear_layer(getattr(network, head))] if head else []


def _with_norm(network: nn.Module, layer: nn.Module) -> nn.Module:
    """Include the normalisation that timm replaces together with a linear layer (EfficientViT, SHViT)."""
    around = (module for module in network.modules() if type(module).__name__ == "NormLinear")
    return next((module for module in around if layer in module.children()), layer)


def torchvision_head(network: nn.Module) -> str | None:
    """Return the name of the attribute that holds the head of a torchvision network, None without one."""
    names = (name for name in _TORCHVISION_HEADS if isinstance(getattr(network, name, None), nn.Module))
    return next(names, None)


def last_linear_layer(head: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return the last linear layer or convolution of a head."""
    return list(_linear_layers(head))[-1]


def classifier_layers(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers that compute the logits: one, or several in networks with parallel heads.

    A convolution among them has a 1 x 1 kernel; its input is pooled.
    """
    candidates = [list(_linear_layers(classifier)) for classifier in _classifiers(network)]
    return [layers[-1] for layers in candidates if layers]


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    return (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
