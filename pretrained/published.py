"""Published accuracies of networks, by the images that they were measured on.

``imagenet.csv`` contains the networks with at most 100 million parameters of timm's
``results/results-imagenet.csv`` (Apache-2.0; its commit 0173a139). ``cifar10.csv`` contains the errors that
the papers of :mod:`pretrained.zoo`, or their authors' code, report for CIFAR-10 with moved and mirrored
training images. Papers differ in what they report: one run, the best of five (``cifar_resnet110``), a median
of five or a mean. ``cifar_preresnet1001`` was trained with batches of 64.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

import torchvision.models as tv

from pretrained.catalog import Card


def published_accuracy(card: Card) -> float | None:
    """Return the published top-1 accuracy on ImageNet-1k in percent, None if unknown.

    For timm it is from the table of results, at the input size stated there; for torchvision it is from the
    metadata of the weights.
    """
    if not card.tag:
        return None
    if card.library == "timm":
        return _read("imagenet.csv", "top1").get(f"{card.architecture}.{card.tag}")
    weights = next(one for one in tv.get_model_weights(card.architecture) if one.name.lower() == card.tag)
    found = weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if found is None else float(found)


def published_cifar10_accuracy(card: Card) -> float | None:
    """Return the published accuracy on CIFAR-10 in percent of a network of the zoo, None if unknown."""
    error = _read("cifar10.csv", "error").get(card.architecture) if card.source == "zoo" else None
    return None if error is None else 100 - error


@cache
def _read(file: str, column: str) -> dict[str, float]:
    text = resources.files("pretrained").joinpath(file).read_text(encoding="utf-8")
    return {row["name"]: float(row[column]) for row in csv.DictReader(text.splitlines())}
