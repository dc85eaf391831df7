"""Scores of two runs on the same images: the interval holds the true difference, and noise is not claimed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import average_precision_score, r2_score
from torch import Tensor

from finetune.evaluation.paired_scores import PairedScores, ScoredRun, compare_scores
from finetune.evaluation.resampling import Floats
from finetune.evaluation.summary import JUDGES
from finetune.targets import TargetKind

SCORES: dict[TargetKind, str] = {"number": "r2", "multi": "map", "single": "accuracy"}


def draw(number: int, noises: tuple[float, ...], seed: int, kind: TargetKind) -> tuple[Tensor, list[Floats]]:
    """Labels, and what runs with so much noise say of them."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(number, 1 if kind == "number" else 3))
    values = [truth + noise * generator.normal(size=truth.shape) for noise in noises]
    if kind == "single":
        return torch.from_numpy(truth.argmax(axis=1)), values
    return torch.from_numpy(truth if kind == "number" else (truth > 0.5).astype(float)), values


def compare(labels: Tensor, values: list[Floats], kind: TargetKind) -> list[PairedScores]:
    runs = [ScoredRun(f"run{place}", value) for place, value in enumerate(values)]
    pairs = [(runs[0], other, labels) for other in runs[1:]]
    return compare_scores(pairs, JUDGES[kind], SCORES[kind])


@pytest.mark.parametrize("kind", SCORES)
def test_scores_and_interval_are_those_of_other_libraries(kind: TargetKind) -> None:
    labels, values = draw(150, (0.4, 0.9), 0, kind)

    def score(value: Floats, truth: Floats) -> float:
        if kind == "number":
            return float(r2_score(truth, value))
        if kind == "multi":
            return float(average_precision_score(truth, value, average="macro"))
        return float((value.argmax(axis=1) == truth).mean())

    (pair,) = compare(labels, values, kind)
    truth = labels.numpy()
    assert pair.first_score == pytest.approx(score(values[0], truth))
    assert pair.second_score == pytest.approx(score(values[1], truth))
    drawn = bootstrap(
        (np.arange(150),),
        lambda places: score(values[1][places], truth[places]) - score(values[0][places], truth[places]),
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = drawn.high - drawn.low
    assert pair.interval == pytest.approx((drawn.low, drawn.high), abs=0.15 * width)
    assert pair.is_claimed and pair.difference < 0
    assert pair.sentence.startswith("run0 is better than run1 by ")


@pytest.mark.parametrize("kind", SCORES)
def test_noise_is_seldom_claimed(kind: TargetKind) -> None:
    claims = sum(compare(*draw(80, (0.7, 0.7), seed, kind), kind)[0].is_claimed for seed in range(60))
    assert claims <= 9  # of 60 at 5 %: more than 9 have a chance of 0.1 %


def test_a_run_does_not_differ_from_itself() -> None:
    labels, (values,) = draw(50, (0.5,), 0, "number")
    (pair,) = compare(labels, [values, values], "number")
    assert (pair.difference, pair.p_value, pair.is_claimed) == (0.0, 1.0, False)
    assert "(they are equal;" in pair.sentence


def test_several_pairs_are_corrected() -> None:
    labels, values = draw(200, (0.5, 0.8, 0.5), 3, "number")
    pairs = compare(labels, values, "number")
    assert [pair.num_pairs for pair in pairs] == [2, 2]
    assert all(pair.p_corrected >= pair.p_value for pair in pairs)
    assert min(pair.p_corrected for pair in pairs) == pytest.approx(2 * min(pair.p_value for pair in pairs))
    assert "corrected for 2 comparisons" in pairs[0].sentence
