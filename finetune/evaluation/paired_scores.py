"""Whether one run's score is better than another's, where it is no share of right images: a paired bootstrap.

The images that both predicted are drawn again, the same ones for both runs, and the difference of the scores
is computed for each draw. The interval is the middle 95 % of these differences. The two-sided p-value is
twice the share of draws on the other side of 0, with one draw more than there were, so that it is never 0
(Davison and Hinkley, Bootstrap Methods and their Application, 1997). Several pairs are corrected by Holm's
method.

Shape legend: N images, K columns, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from finetune.evaluation.paired_tests import correct_holm, describe_difference, describe_p, may_claim
from finetune.evaluation.resampling import Floats, Weights, draw_values, find_middle
from finetune.evaluation.summary import Judge
from finetune.targets import METRIC_NAMES


@dataclass(frozen=True)
class PairedScores:
    """How the scores of two runs differ on the same images.

    Attributes:
        first: name of the first run.
        second: name of the second run.
        num_images: number of images that both predicted.
        metric: name of the score, of which higher is better.
        first_score: score of the first on these images.
        second_score: score of the second on these images.
        interval: 95 % interval of the difference, of this pair alone.
        p_value: two-sided p-value of this pair alone.
        p_corrected: p-value corrected for the number of compared pairs (Holm).
        num_pairs: number of compared pairs.
    """

    first: str
    second: str
    num_images: int
    metric: str
    first_score: float
    second_score: float
    interval: tuple[float, float]
    p_value: float
    p_corrected: float
    num_pairs: int = 1

    @property
    def difference(self) -> float:
        """Score of the second minus that of the first."""
        return self.second_score - self.first_score

    @property
    def is_claimed(self) -> bool:
        """Whether a difference may be claimed: the corrected p-value is small, the interval excludes 0."""
        return may_claim(self.p_corrected, self.interval)

    @property
    def sentence(self) -> str:
        """The result as a sentence."""
        said = describe_p("bootstrap", self.p_value, self.p_corrected, self.num_pairs)
        names, unit = (self.first, self.second), f" of {METRIC_NAMES[self.metric]}"
        return describe_difference(names, self.difference, self.interval, self.is_claimed, said, unit)


class ScoredRun(NamedTuple):
    """What a run predicted for some images.

    Attributes:
        name: of the run.
        values: probabilities of classes, or numbers, (N, K).
    """

    name: str
    values: Floats


def compare_scores(
    pairs: Sequence[tuple[ScoredRun, ScoredRun, Tensor]], judge: Judge, metric: str
) -> list[PairedScores]:
    """Compare pairs of runs by a score, with p-values corrected for the number of pairs.

    Args:
        pairs: two runs, and the labels (N, ...) of the same images in the same order; N is at least 1.
        judge: computes the score.
        metric: name of the score.
    """
    alone = [_compare(*pair, judge, metric) for pair in pairs]
    corrected = correct_holm([pair.p_value for pair in alone])
    return [
        replace(pair, p_corrected=p_value, num_pairs=len(alone))
        for pair, p_value in zip(alone, corrected, strict=True)
    ]


def _compare(first: ScoredRun, second: ScoredRun, labels: Tensor, judge: Judge, metric: str) -> PairedScores:
    number = len(labels)
    one, other = (judge.weigh_score(run.values, labels) for run in (first, second))

    def subtract(weights: Weights) -> Floats:
        difference: Floats = other(weights) - one(weights)
        return difference

    drawn = draw_values(number, {metric: subtract})[metric]
    first_score, second_score = (float(score(np.ones((1, number)))[0]) for score in (one, other))
    difference = second_score - first_score
    interval = find_middle(drawn) or (difference, difference)
    fewer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (fewer + 1) / (len(drawn) + 1))
    scores = first_score, second_score
    return PairedScores(first.name, second.name, number, metric, *scores, interval, p_value, p_value)
