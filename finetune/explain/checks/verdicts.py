"""What the checks of a method on the network at hand say: whether its maps may be shown, and why not.

A map is shown if it depends on what the network has learned (:mod:`finetune.explain.checks.randomisation`),
and if deleting what it marks lowers the class score faster than deleting random places
(:mod:`finetune.explain.checks.deletion`). The second is judged over all images; the map of one image is left
out if it has no advantage over any of the random places, since a few places say little of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from finetune.errors import count
from finetune.explain.attribution.heat_map import HeatMap
from finetune.explain.checks.deletion import Advantages
from finetune.explain.checks.randomisation import MOST_SIMILAR

LEVEL = 0.95
NOT_BETTER = "deleting what the map marks lowers the score no faster than deleting any of the random places"


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: of the check.
        passed: False if the maps must not be shown; None if the images are too few to tell.
        said: what was found, as a sentence for a reader.
        facts: the numbers behind it.
    """

    name: str
    passed: bool | None
    said: str
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"passed": self.passed, "said": self.said, **self.facts}


def judge_randomisation(similar: Mapping[str, float], num_images: int) -> Check:
    """Judge how similar maps stay when the weights become random.

    Args:
        similar: mean rank correlations, as ``measure_randomisation`` returns them.
        num_images: number of images that they are the mean of.
    """
    facts = {"rank_correlation": dict(similar), "most": MOST_SIMILAR, "num_images": num_images}
    if not similar:
        return Check("randomisation", None, "Randomised weights: no image has a map.", facts)
    stage = max(similar, key=lambda name: similar[name])
    passed = similar[stage] <= MOST_SIMILAR
    images = count(num_images, "image")
    found = (
        f"with random weights from {stage} up, the maps correlate by {similar[stage]:.2f} with those of the "
    )
    limit = f"network (over {images}; maps that depend on the weights have {MOST_SIMILAR} at most)"
    return Check("randomisation", passed, f"Randomised weights: {_word(passed)}: {found}{limit}.", facts)


def judge_deletion(advantages: Sequence[Advantages | None]) -> Check:
    """Judge the advantage of deleting marked places first, over the images that have a map.

    Args:
        advantages: of each image (:func:`finetune.explain.checks.deletion.measure_advantage`).
    """
    values = np.array([np.mean(places) for places in advantages if places is not None])
    if not len(values):
        return Check("deletion", None, "Deletion: no image has a map.", {"num_images": 0})
    mean, interval = float(values.mean()), _compute_interval(values)
    failed = mean <= 0 if interval else all(map(_has_no_advantage, advantages))
    passed = False if failed else None if interval is None or interval[0] <= 0 else True
    facts = {"advantage": mean, "interval": interval, "num_images": len(values)}
    spread = f", 95 % interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
    found = f"after deleting marked places first, the evidence is lower by {mean:.2f} "
    found += f"than after random ones (mean of {count(len(values), 'image')}{spread})"
    return Check("deletion", passed, f"Deletion: {_word(passed)}: {found}.", facts)


def withhold(heat: HeatMap, advantages: Advantages | None, checks: Sequence[Check]) -> HeatMap:
    """Return a map if nothing speaks against it, and otherwise the reason in its place.

    Args:
        heat: the map of one image.
        advantages: those of the same image; None if they were not measured.
        checks: what was found over all images.
    """
    failed = " ".join(check.said for check in checks if check.passed is False)
    reason = heat.reason or failed or (NOT_BETTER if _has_no_advantage(advantages) else "")
    return HeatMap(None, reason) if reason else heat


def _has_no_advantage(advantages: Advantages | None) -> bool:
    """Return whether deleting the marked places was no better than deleting any of the random ones."""
    return advantages is not None and max(advantages) <= 0


def _word(passed: bool | None) -> str:
    return {True: "passed", False: "failed", None: "not certain"}[passed]


def _compute_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float] | None:
    """Return Student's interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)
