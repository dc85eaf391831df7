"""The best backbone whose weights are on this machine, for whoever names none.

Better means a higher top-1 accuracy on ImageNet's validation part, as published: it goes with the accuracy
after transfer (Kornblith et al., "Do better ImageNet models transfer better?", arXiv:1805.08974). Networks
that would keep a machine waiting are not taken by default, however good.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torchvision.models as tv

from finetune.errors import EnvironmentFaultError
from pretrained.bundle import LIBRARY, list_bundled
from pretrained.catalog import Card, find_card, list_names, num_parameters
from pretrained.weights import find_cached


@dataclass(frozen=True)
class Limit:
    """What a machine is asked to train when nobody names a backbone.

    Attributes:
        parameters: at most.
        img_size: in pixels, at most.
    """

    parameters: int
    img_size: int


LIMITS = {False: Limit(30_000_000, 288), True: Limit(100_000_000, 384)}
"""Without and with a GPU: ResNet-50 and ConvNeXt-Tiny, or ConvNeXt-Base, are inside."""


@dataclass(frozen=True)
class Present:
    """A backbone whose weights are on this machine.

    Attributes:
        card: its passport.
        accuracy: published top-1 on ImageNet-1k in percent; None where it was trained on something else.
    """

    card: Card
    accuracy: float | None

    @property
    def is_bundled(self) -> bool:
        """Whether it came with the installation."""
        return self.card.place == "bundled"


def choose_best(on_gpu: bool) -> Present:
    """Return the best backbone whose weights are on this machine: downloaded, else bundled.

    Args:
        on_gpu: what there is to train it.

    Raises:
        EnvironmentFaultError: the installation lacks the bundled one.
    """
    limit = LIMITS[on_gpu]
    downloaded = [one for one in find_present() if one.accuracy is not None and _is_inside(one.card, limit)]
    if downloaded:
        return max(downloaded, key=lambda one: (one.accuracy, one.card.name))
    for name in list_bundled():
        return Present(find_card(f"{LIBRARY}/{name}"), None)
    fix = "Install the package again, or add --backbone NAME."
    raise EnvironmentFaultError("finetune", "the bundled backbone is missing from the installation", fix)


def find_present() -> list[Present]:
    """Return every backbone of the catalogue whose weights are on this machine."""
    cards = map(find_card, list_names())
    return [Present(card, published_accuracy(card)) for card in cards if find_cached(card)]


def _is_inside(card: Card, limit: Limit) -> bool:
    size = num_parameters(card)
    return size is not None and size <= limit.parameters and card.preprocessing.img_size <= limit.img_size


def published_accuracy(card: Card) -> float | None:
    """Return the published top-1 accuracy on ImageNet-1k in percent, None where none is known.

    timm's are from its table of results (each at the size it was tested at there), torchvision's from its
    weights' own metadata.
    """
    if card.library == "timm":
        return _timm_accuracies().get(f"{card.architecture}.{card.tag}") if card.tag else None
    if not card.tag:
        return None
    weights = next(one for one in tv.get_model_weights(card.architecture) if one.name.lower() == card.tag)
    found = weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if found is None else float(found)


@cache
def _timm_accuracies() -> dict[str, float]:
    text = resources.files("pretrained").joinpath("imagenet.csv").read_text(encoding="utf-8")
    return {row["name"]: float(row["top1"]) for row in csv.DictReader(text.splitlines())}
