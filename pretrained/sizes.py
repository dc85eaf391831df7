"""Write ``sizes.csv``: the number of parameters of every architecture for each number of classes.

Run ``python -m pretrained.sizes`` after an upgrade of timm or torchvision; it takes about ten minutes.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from pretrained.catalog import Card, find_card, list_names
from pretrained.network import build_outline


def count_parameters(card: Card) -> int:
    """Return the number of parameters of the card's network, built on the meta device if possible."""
    return sum(parameter.numel() for parameter in build_outline(card).parameters())


def main() -> None:
    """Count the parameters of all networks, and replace the table."""
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
