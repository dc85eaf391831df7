"""Weights that are not on this machine yet, fetched where one can see how far that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.display import Display
from finetune.errors import FinetuneError, UsageError, sanitize
from pretrained.catalog import Card, find_card
from pretrained.weights import find_cached, find_weights


def fetch(card: Card, offline: bool, display: Display) -> Path:
    """Return the file of a backbone's weights, from this machine or by download.

    A download that goes on is a sign of life, however slow the server is.

    Raises:
        UsageError: it has none.
        EnvironmentFaultError: it is not here and cannot be had.
    """
    if find_cached(card) is not None:
        return find_weights(card)
    with display.fetch(f"fetching {card.name}") as tell:
        return find_weights(card, offline=offline, on_progress=tell)


@dataclass(frozen=True)
class Pulled:
    """A backbone whose weights were asked for.

    Attributes:
        name: its full name, or what was asked for where there is none.
        path: the file on this machine, None where it could not be had.
        was_here: nothing had to be fetched.
        error: why there is no file.
    """

    name: str
    path: Path | None = None
    was_here: bool = False
    error: FinetuneError | None = None


def pull(names: Sequence[str], offline: bool, display: Display) -> list[Pulled]:
    """Fetch the weights of several backbones; one that cannot be had keeps no other from coming.

    Args:
        names: backbones, at least one.
        offline: only say what is here.
        display: shows progress.
    """
    pulled = []
    for name in names:
        try:
            card = find_card(name, offline)
            if card.place == "none":
                raise UsageError(name, "no weights were ever published for it", "Take another backbone.")
            was_here = find_cached(card) is not None
            pulled.append(Pulled(card.name, fetch(card, offline, display), was_here))
        except FinetuneError as error:
            error.asked = sanitize(f"pull {name}")
            pulled.append(Pulled(name, error=error))
    return pulled
