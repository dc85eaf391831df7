"""Write ``sizes.csv``: parameters of every architecture at each of its numbers of classes.

Run ``python -m pretrained.sizes`` after raising the version of timm or torchvision (about ten minutes).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from pretrained.catalog import Card, find_card, list_names
from pretrained.network import build_outline


def count_parameters(card: Card) -> int:
    """Return the number of parameters of the card's network, built without memory where it can be."""
    return sum(parameter.numel() for parameter in build_outline(card).parameters())


def main() -> None:
    """Count them all and replace the table beside this file."""
    cards = {
        (card.library, card.architecture, card.num_classes): card for card in map(find_card, list_names())
    }
    rows = []
    for position, (key, card) in enumerate(sorted(cards.items()), start=1):
        rows.append((*key, count_parameters(card)))
        sys.stderr.write(f"\r{position}/{len(cards)} {card.name:<60}")
    with (Path(__file__).parent / "sizes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("library", "architecture", "num_classes", "num_parameters"), *rows])


if __name__ == "__main__":
    main()
