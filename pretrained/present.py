"""The best backbone whose weights are on this machine, for whoever names none.

Better means a higher top-1 accuracy on ImageNet's validation part, as published: it goes with the accuracy
after transfer (Kornblith et al., "Do better ImageNet models transfer better?", arXiv:1805.08974), and less so
for features that stay frozen, which the same paper found to suffer from some of what raises that figure.
``finetune advise --backbones`` measures instead. Networks that are large for the machine are not taken
unasked; parameters and pixels are a rough measure of that.

``imagenet.csv`` holds the weights of up to 100 million parameters of timm's ``results/results-imagenet.csv``
(Apache-2.0; its commit 0173a139).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

import timm
import torchvision.models as tv

from finetune.errors import EnvironmentFaultError
from pretrained.bundle import LIBRARY, list_bundled
from pretrained.catalog import Card, find_card, num_parameters, torchvision_names
from pretrained.weights import find_cached


@dataclass(frozen=True)
class Limit:
    """What a machine is asked to train when nobody names a backbone.

    Attributes:
        parameters: at most.
        img_size: in pixels, at most.
        machine: in words.
    """

    parameters: int
    img_size: int
    machine: str


LIMITS = {
    False: Limit(30_000_000, 288, "large for a machine without a GPU"),
    True: Limit(100_000_000, 384, "large to take unasked"),
}
"""Without and with a GPU: ResNet-50 and ConvNeXt-Tiny, or ConvNeXt-Base, are inside."""


@dataclass(frozen=True)
class Present:
    """A backbone whose weights are on this machine.

    Attributes:
        card: its passport.
        accuracy: published top-1 on ImageNet-1k in percent; None where none is known.
    """

    card: Card
    accuracy: float | None


@dataclass(frozen=True)
class Choice:
    """What is taken, and what is not.

    Attributes:
        best: downloaded, else bundled.
        passed_over: others that were downloaded and cannot be ranked or are too large, and why.
    """

    best: Present
    passed_over: tuple[tuple[Card, str], ...] = ()


def choose_best(on_gpu: bool) -> Choice:
    """Return the best backbone whose weights are on this machine: downloaded, else bundled.

    Args:
        on_gpu: what there is to train it.

    Raises:
        EnvironmentFaultError: the installation lacks the bundled one.
    """
    ranked: list[Present] = []
    passed_over: list[tuple[Card, str]] = []
    for card in find_downloaded():
        accuracy = published_accuracy(card)
        why = "no published accuracy on ImageNet" if accuracy is None else _find_excess(card, LIMITS[on_gpu])
        if why:
            passed_over.append((card, why))
        else:
            ranked.append(Present(card, accuracy))
    best = max(ranked, key=lambda one: (one.accuracy, one.card.name)) if ranked else _bundled()
    return Choice(best, tuple(passed_over))


def _bundled() -> Present:
    for name in list_bundled():
        return Present(find_card(f"{LIBRARY}/{name}"), None)
    fix = "Install the package again, or add --backbone NAME."
    raise EnvironmentFaultError("finetune", "the bundled backbone is missing from the installation", fix)


def find_downloaded() -> Iterator[Card]:
    """Yield every published backbone whose weights are on this machine."""
    yield from filter(find_cached, (find_card(f"timm/{name}") for name in timm.list_pretrained()))
    for name in torchvision_names():
        tags = (weights.name.lower() for weights in tv.get_model_weights(name))
        yield from filter(find_cached, (find_card(f"torchvision/{name}.{tag}") for tag in tags))


def _find_excess(card: Card, limit: Limit) -> str:
    """Say in what a network is over a limit, ``""`` where it is not."""
    size = num_parameters(card)
    if size is not None and size <= limit.parameters and card.preprocessing.img_size <= limit.img_size:
        return ""
    numbers = f"{size / 1e6:.0f} million parameters, " if size is not None else ""
    return f"{numbers}{card.preprocessing.img_size} pixels: {limit.machine}"


def published_accuracy(card: Card) -> float | None:
    """Return the published top-1 accuracy on ImageNet-1k in percent, None where none is known.

    timm's are from its table of results (each at the size it was tested at there), torchvision's from its
    weights' own metadata.
    """
    if not card.tag:
        return None
    if card.library == "timm":
        return _timm_accuracies().get(f"{card.architecture}.{card.tag}")
    weights = next(one for one in tv.get_model_weights(card.architecture) if one.name.lower() == card.tag)
    found = weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if found is None else float(found)


@cache
def _timm_accuracies() -> dict[str, float]:
    text = resources.files("pretrained").joinpath("imagenet.csv").read_text(encoding="utf-8")
    return {row["name"]: float(row["top1"]) for row in csv.DictReader(text.splitlines())}
