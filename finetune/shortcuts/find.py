"""Test all shortcuts of one data set, and correct for their number.

Shape legend: N images, K classes, P labellings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.evaluation.intervals import compute_wilson
from finetune.shortcuts.meaning import MEANINGS
from finetune.shortcuts.permutation import (
    LEVEL,
    Ints,
    LabelPermuter,
    adjust_holm,
    permutation_test,
)
from finetune.shortcuts.predictors import Bools, FindHits
from finetune.system.device import derive_seed

_COLUMNS = 1000
"""Labellings times classes that are solved at a time."""


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What one test found.

    Attributes:
        name: a key of :data:`finetune.shortcuts.meaning.MEANINGS`.
        p: p value of the test alone.
        p_holm: corrected for the number of tests; an alarm under :data:`LEVEL`.
        accuracy: of the shortcut on images left out; for ``background`` the share of images whose answer
            changes without the surroundings.
        interval: its 95 % interval, which counts a group of images as one.
        chance: mean accuracy with permuted labels, or the share of the largest class if that is more; for
            ``background`` the share of images whose answer changes without the middle.
        share: part of the way from chance to the accuracy of whole images, 1 for as good; None where whole
            images are no better than chance.
        number: permutations drawn; 0 for another kind of test.
        hits: the images that were predicted right, (N,).
    """

    name: str
    p: float
    p_holm: float
    accuracy: float
    interval: tuple[float, float]
    chance: float
    share: float | None
    number: int
    hits: Bools

    @property
    def is_alarm(self) -> bool:
        """Whether the test is significant among all tests."""
        return self.p_holm < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        meaning = MEANINGS[self.name]
        return {
            "name": self.name,
            "title": meaning.title,
            "alarm": self.is_alarm,
            "p": self.p,
            "p_holm": self.p_holm,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "chance": self.chance,
            "share_of_whole_image": self.share,
            "permutations": self.number,
            "means": meaning.means if self.is_alarm else None,
            "fix": meaning.fix if self.is_alarm else None,
        }


def find_shortcuts(
    predictors: Mapping[str, FindHits],
    labels: Ints,
    groups: Ints,
    whole: float,
    seed: int,
    advance: Callable[[int, str], None] = lambda *_: None,
) -> list[Shortcut]:
    """Test each shortcut against permuted labels.

    Args:
        predictors: what predicts from one shortcut, by name.
        labels: (N,), from 0 to K - 1.
        groups: (N,), equal for images of one group.
        whole: accuracy of whole images, left out in the same folds.
        seed: of the permutations.
        advance: called with 0 and the title before each test, and with 1 after it.

    Returns:
        The tests in the order of the predictors, corrected for their number.
    """
    permuter, num_groups = LabelPermuter(labels, groups), len(np.unique(groups))
    largest = float(np.bincount(labels).max() / len(labels))
    batch = max(1, min(100, _COLUMNS // (int(labels.max()) + 1)))
    found = []
    for name, find_hits in predictors.items():
        advance(0, MEANINGS[name].title)
        rng = np.random.default_rng(derive_seed(seed, "audit", name))
        hits = find_hits(labels[None])[0]
        accuracy = float(hits.mean())
        test = permutation_test(accuracy, _score(find_hits), permuter, rng, batch)
        found.append(
            Shortcut(
                name,
                test.p,
                1.0,
                accuracy,
                compute_wilson(round(accuracy * num_groups), num_groups),
                chance := max(test.chance, largest),
                _compute_share(accuracy, chance, whole),
                test.number,
                hits,
            )
        )
        advance(1, MEANINGS[name].title)
    return correct(found)


def _score(find_hits: FindHits) -> Callable[[Ints], Any]:
    return lambda labellings: find_hits(labellings).mean(axis=1)


def _compute_share(accuracy: float, chance: float, whole: float) -> float | None:
    return max(0.0, (accuracy - chance) / (whole - chance)) if whole > chance else None


def correct(found: list[Shortcut]) -> list[Shortcut]:
    """Return tests with p values that are corrected for their number."""
    adjusted = adjust_holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, adjusted, strict=True)]


def sort_alarms(found: list[Shortcut]) -> list[Shortcut]:
    """Return tests with alarms first, those first that reach most of the accuracy of whole images."""
    return sorted(found, key=lambda one: (not one.is_alarm, -(one.share or 0.0)))
