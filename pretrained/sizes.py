"""Write ``sizes.csv``: parameters of every architecture, counted on the meta device.

Run ``python -m pretrained.sizes`` after raising the version of timm or torchvision (about ten minutes).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import timm
import torch

from pretrained.catalog import Card, find_card, torchvision_names
from pretrained.network import build_network


def count_parameters(card: Card) -> int:
    """Return the number of parameters of the card's network, built without memory where it can be."""
    try:
        with torch.device("meta"):
            network = build_network(card)
    except (
        RuntimeError,
        NotImplementedError,
    ):  # torchvision's RegNet computes with its tensors while it is built
        network = build_network(card)
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    """Count them all and replace the table beside this file."""
    names = [
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{n}" for n in torchvision_names()),
    ]
    rows = []
    for position, name in enumerate(names, start=1):
        card = find_card(name)
        rows.append((card.library, card.architecture, count_parameters(card)))
        sys.stderr.write(f"\r{position}/{len(names)} {name:<60}")
    with (Path(__file__).parent / "sizes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("library", "architecture", "num_parameters"), *rows])


if __name__ == "__main__":
    main()
