"""What the published networks share: timm's interface, registration, and the head most of them have.

A family's file defines its network (a subclass of :class:`PooledNetwork`, or of :class:`ZooNetwork` where the
head is not "pool, then one linear layer") and registers every variant::

    register("cifar_resnet20", CifarResNet, make_card((3, 32, 32), paper="arXiv:1512.03385", ...), depth=20)

Every constructor takes ``num_classes``, ``in_chans``, ``global_pool`` and ``drop_rate``; a run gives all
networks a ``drop_rate``, which is 0 for none. ``forward`` gives logits (B, K), in training and in evaluation;
with 0 classes it gives the features (B, D) that the classifier would read.

A network with auxiliary classifiers (GoogLeNet) is a :class:`ZooNetwork` too. Whoever computes the loss runs
``forward`` inside :func:`collect_auxiliary_logits` and adds each classifier's loss times its weight. So no
other part of the program meets a tuple instead of logits, and a loop that does not collect them trains the
trunk alone.

Shape legend: B batch, C channels, H W rows and columns, D features, K classes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.models import build_model_with_cfg, is_model, register_model
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXEL_STD = (1 / 255,) * 3
"""Networks of 2012 to 2014 subtract the mean only; their initial weights fit values up to 255."""
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
"""Mean and standard deviation of each channel over the 50,000 training images of CIFAR-10."""

default_cfgs: dict[str, DefaultCfg] = {}
"""The card of every network by name, where timm's ``register_model`` looks for it."""
NAMES: list[str] = []
"""Every name of the zoo, in the order of registration."""


# --- the interface ---------------------------------------------------------------------------------


class ZooNetwork(nn.Module, ABC):
    """A network with timm's interface: (B, C, H, W) -> (B, K).

    Attributes:
        num_classes: K; 0 for a network without classifier.
        num_features: channels of the map, or width of the vector, that ``forward_features`` returns.
        head_hidden_size: width D of the features before the classifier (``pre_logits``).
        classifier_name: attribute path of the layer that computes the logits, ``fc8`` or ``head.fc``.
    """

    classifier_name: ClassVar[str]
    num_classes: int
    num_features: int
    head_hidden_size: int

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features before the head, for images (B, C, H, W)."""

    @abstractmethod
    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` what the classifier reads (B, D)."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of stem and blocks; ``coarse`` has one group a stage."""

    def _set_global_pool(self, global_pool: str) -> None:
        """Choose how the last map is pooled; a subclass whose pooling can be chosen overrides this.

        Raises:
            ValueError: it is not ``avg``, timm's default.
        """
        if global_pool != "avg":
            name = type(self).__name__
            fault = f"{name} takes 'avg' only, since its fully connected layers read the whole map"
            raise ValueError(f"global_pool={global_pool!r}: {fault}")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a linear layer, and the pooling if one is named; 0 classes remove it."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        self.add_module(self.classifier_name, make_classifier(self.head_hidden_size, num_classes))

    def get_classifier(self) -> nn.Module:
        """Return the layer that computes the logits."""
        return self.get_submodule(self.classifier_name)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W)."""
        return self.forward_head(self.forward_features(images))


class PooledNetwork(ZooNetwork):
    """A network whose head pools the last map and has one linear layer; a subclass has the features.

    A subclass calls :meth:`add_head` at the end of its constructor.
    """

    classifier_name = "head.fc"
    head: ClassifierHead

    def add_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Add global pooling, dropout and the linear layer ``head.fc``.

        Args:
            num_features: channels of the last map.
            num_classes: K.
            global_pool: ``avg``, ``max``, ``avgmax`` or ``catavgmax``; ``""`` does not pool.
            drop_rate: probability that a pooled feature is zero in training.
        """
        self.num_classes, self.num_features = num_classes, num_features
        self.head = ClassifierHead(num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` the pooled features (B, D)."""
        output: Tensor = self.head(features, pre_logits=pre_logits)
        return output

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer, and the pooling if one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features


def make_classifier(num_features: int, num_classes: int) -> nn.Module:
    """Return a linear layer (B, D) -> (B, K), or for 0 classes the identity: then the features come out."""
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def make_pool(global_pool: str) -> SelectAdaptivePool2d:
    """Return timm's global pooling: (B, C, H, W) -> (B, D), or the map as it is for ``""``."""
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))


def init_layers(network: nn.Module, draw: Callable[[Tensor], object], bias: float = 0.0) -> None:
    """Draw the weights of all convolutions and linear layers, and set their biases.

    Args:
        network: with the layers.
        draw: fills a weight in place, as the functions of :mod:`torch.nn.init` do.
        bias: of every layer that has biases.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)


def to_grey(images: Tensor) -> Tensor:
    """Return images (B, 1, H, W) of colour ones (B, 3, H, W), normalised or not; grey ones as they are.

    The weights are those of ITU-R 601 and of Pillow's mode ``L``. So a network of one channel takes what all
    others take, and a grey photograph as it is.
    """
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


# --- auxiliary classifiers -------------------------------------------------------------------------


class AuxiliaryLogits(NamedTuple):
    """Logits (B, K) of a classifier in the middle of a network, and the weight of their loss."""

    logits: Tensor
    weight: float


@contextmanager
def collect_auxiliary_logits(network: nn.Module) -> Iterator[list[AuxiliaryLogits]]:
    """Yield a list that forward passes of the block fill with the logits of auxiliary classifiers.

    It stays empty for a network without them, and for classifiers in evaluation mode.

    Args:
        network: any network, without a wrapper of :mod:`torch.nn.parallel`.
    """
    collected: list[AuxiliaryLogits] = []
    holder: Any = network  # torch types attributes of a module as tensors
    if not hasattr(network, "auxiliary_logits"):
        yield collected
        return
    holder.auxiliary_logits = collected
    try:
        yield collected
    finally:
        holder.auxiliary_logits = None  # a graph that is kept could not be copied with the network


# --- registration ----------------------------------------------------------------------------------


def make_card(
    input_size: tuple[int, int, int],
    *,
    paper: str,
    classifier: str,
    first_conv: str,
    num_classes: int = 1000,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    **others: Any,
) -> PretrainedCfg:
    """Return the card of a network: what timm calls its ``pretrained_cfg``. There are no weights.

    Args:
        input_size: (C, H, W) of the published network.
        paper: ``arXiv:...``, or author, title and year.
        classifier: path of the layer that computes the logits.
        first_conv: path of the first convolution.
        num_classes: K of the published network.
        mean: subtracted from the channels of an image in [0, 1].
        std: divisor of the channels.
        **others: further fields of timm's ``PretrainedCfg``: ``crop_pct``, ``interpolation``, ``pool_size``.
    """
    fields = {"license": "apache-2.0", "interpolation": "bilinear", "paper_ids": paper} | others
    return PretrainedCfg(
        input_size=input_size,
        num_classes=num_classes,
        mean=mean,
        std=std,
        classifier=classifier,
        first_conv=first_conv,
        **fields,
    )


def register(name: str, network: Callable[..., ZooNetwork], card: PretrainedCfg, **published: Any) -> None:
    """Register a network with timm under a name.

    Args:
        name: unique in timm.
        network: class or function that builds it.
        card: from :func:`make_card`; its number of classes and channels are the defaults.
        **published: arguments of the published network; ``timm.create_model`` may give others.

    Raises:
        ValueError: timm or the zoo has the name already.
    """
    if is_model(name):
        raise ValueError(f"{name} is registered already")
    defaults = {"num_classes": card.num_classes, "in_chans": card.input_size[0]} | published

    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        built: nn.Module = build_model_with_cfg(network, name, pretrained, **(defaults | arguments))
        return built

    create.__name__ = create.__qualname__ = name
    create.__doc__ = network.__doc__
    # timm takes the family of a network, and its card, from the module of its factory: the whole zoo is one.
    package = sys.modules[__package__ or ""]
    create.__module__ = package.__name__
    vars(package).setdefault("default_cfgs", default_cfgs)
    default_cfgs[name] = DefaultCfg()
    default_cfgs[name].tags.append("")
    default_cfgs[name].cfgs[""] = card
    NAMES.append(name)
    register_model(create)
