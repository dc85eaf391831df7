"""The number of parameters of every architecture for each number of classes, in ``sizes.csv``.

Run ``python -m pretrained.sizes`` after an upgrade of timm or torchvision; it takes about ten minutes.
"""

from __future__ import annotations

import csv
import sys
from functools import cache
from importlib import resources
from pathlib import Path

from pretrained.catalog import Card, find_card, list_names
from pretrained.network import build_outline


@cache
def parameter_counts() -> dict[tuple[str, str, int], int]:
    """Return the table of parameters by library, architecture and number of classes."""
    text = resources.files("pretrained").joinpath("sizes.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {
        (row["library"], row["architecture"], int(row["num_classes"])): int(row["num_parameters"])
        for row in rows
    }


def num_parameters(card: Card) -> int | None:
    """Return the number of parameters with the network's own classifier, None if it is not in the table.

    There is a table, because building 1,400 networks takes minutes.
    """
    return parameter_counts().get((card.library, card.architecture, card.num_classes))


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
