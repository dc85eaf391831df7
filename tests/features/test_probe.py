"""Probes of layers: the draws, the mean over classes, and a table that knows a good layer from a bad one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from finetune.errors import DataError
from finetune.features import probe
from finetune.features.probe import Classifier, ProbeResult, ProbeSplit, draw_probe_split, probe_layer
from finetune.features.rows import MemoryRows
from finetune.features.solvers import fit
from finetune.features.transferability import classify

CPU = torch.device("cpu")

CLASSES = ("cat", "dog", "owl")
SINGLE_CLASSIFIERS: tuple[Classifier, ...] = ("svm", "softmax", "logreg", "knn")


def draw_layer(labels: Tensor, width: int, noise: float, seed: int = 0) -> MemoryRows:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(CLASSES), width, generator=generator)
    return MemoryRows(centres[labels] + noise * torch.randn(len(labels), width, generator=generator))


def draw_split(labels: Tensor, classes: Sequence[str], per_class: int, seed: int, repeat: int) -> ProbeSplit:
    strata = {name: (labels == number).nonzero().flatten().tolist() for number, name in enumerate(classes)}
    return draw_probe_split(strata, len(labels), per_class, seed, repeat)


def draw_all(labels: Tensor, per_class: int, repeats: int) -> list[ProbeSplit]:
    return [draw_split(labels, CLASSES, per_class, 0, repeat) for repeat in range(repeats)]


def run(rows: MemoryRows, labels: Tensor, draws: Sequence[ProbeSplit]) -> list[ProbeResult]:
    return probe_layer(rows, labels, len(CLASSES), draws, SINGLE_CLASSIFIERS, lambda: None, CPU)


# --- draws ---------------------------------------------------------------------------------------


def test_a_draw_takes_so_many_of_each_class_and_leaves_the_rest() -> None:
    labels = torch.tensor([0] * 20 + [1] * 8 + [2] * 6)
    draw = draw_split(labels, CLASSES, 5, 0, 0)
    assert labels[draw.train].bincount().tolist() == [5, 5, 5]
    assert sorted([*draw.train.tolist(), *draw.test.tolist()]) == list(range(34))


def test_draws_differ_by_seed_and_repeat_alone() -> None:
    labels = torch.arange(3).repeat(20)
    state = torch.random.get_rng_state()
    one = draw_split(labels, CLASSES, 5, 0, 0)
    same = draw_split(labels, CLASSES, 5, 0, 0)
    assert one.train.equal(same.train)
    assert one.test.equal(same.test)
    others = [draw_split(labels, CLASSES, 5, 0, 1), draw_split(labels, CLASSES, 5, 1, 0)]
    assert all(not other.train.equal(one.train) for other in others)
    assert torch.random.get_rng_state().equal(state)


def test_more_than_a_class_has_is_refused() -> None:
    labels = torch.tensor([0] * 20 + [1] * 8 + [2] * 6)
    with pytest.raises(DataError, match=r"--per-class 6: class 'owl' has 6") as refusal:
        draw_split(labels, CLASSES, 6, 0, 0)
    assert "--per-class 5 or fewer" in refusal.value.fix
    assert len(draw_split(labels, CLASSES, 5, 0, 0).test) == 19


def test_a_class_of_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="class 'dog' has 1") as refusal:
        draw_split(torch.tensor([0, 0, 0, 1, 2, 2]), CLASSES, 1, 0, 0)
    assert "Add images of this class" in refusal.value.fix


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="only one class"):
        draw_split(torch.zeros(9, dtype=torch.int64), ["cat"], 2, 0, 0)


# --- results -------------------------------------------------------------------------------------


def test_mean_and_deviation_over_draws() -> None:
    result = ProbeResult("svm", (0.5, 0.7, 0.9), (1.0, 1.0, 1.0))
    assert result.mean == pytest.approx(np.mean(result.scores))
    assert result.std == pytest.approx(np.std(result.scores, ddof=1))
    assert ProbeResult("knn", (0.5,), ()).std == 0


def test_each_classifier_is_judged_by_the_mean_over_classes() -> None:
    labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 12)
    rows = draw_layer(labels, 8, 2.0)
    draws = draw_all(labels, 6, 2)
    results = run(rows, labels, draws)
    assert [result.classifier for result in results] == list(SINGLE_CLASSIFIERS)
    for result in results:
        for repeat, draw in enumerate(draws):
            own = labels[draw.train]
            if result.classifier == "knn":
                predicted = classify(rows, draw.train, own, draw.test, 3)
                assert result.strengths == ()
            else:
                classifier = fit(rows, draw.train, own, 3, result.classifier, draw.seed)
                predicted = classifier.scores(rows[draw.test]).argmax(dim=1)
                assert result.strengths[repeat] == classifier.strength
            expected = balanced_accuracy_score(labels[draw.test], predicted)
            assert result.scores[repeat] == pytest.approx(expected)


def test_a_class_without_test_images_is_left_out() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 0, 0, 1, 1])
    rows = MemoryRows(torch.eye(3)[labels])
    draw = ProbeSplit(torch.arange(5), torch.arange(5, 9), 0)
    assert [result.mean for result in run(rows, labels, [draw])] == [1.0] * 4


def test_a_better_layer_is_better_by_every_classifier() -> None:
    labels = torch.arange(3).repeat(30)
    draws = draw_all(labels, 10, 2)
    poor, good = (run(draw_layer(labels, 10, noise), labels, draws) for noise in (6.0, 0.8))
    for one, other in zip(poor, good, strict=True):
        assert other.mean > 0.8 > one.mean + 0.1


def test_progress_is_told_of_each_classifier_of_each_draw() -> None:
    labels = torch.arange(3).repeat(8)
    done: list[int] = []
    draws = draw_all(labels, 4, 3)
    probe_layer(
        draw_layer(labels, 5, 1.0), labels, 3, draws, ["knn", "svm"], lambda: done.append(len(done)), CPU
    )
    assert len(done) == 6


def test_blocks_of_test_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(3).repeat(12)
    rows, draws = draw_layer(labels, 40, 1.5), draw_all(labels, 4, 1)
    whole = run(rows, labels, draws)
    monkeypatch.setattr(probe, "_BLOCK_BYTES", 4 * 40 * 5)
    assert run(rows, labels, draws) == whole


def test_labels_of_test_images_are_for_judging_only() -> None:
    """Turned labels of test images turn what is right, and nothing else."""
    labels = torch.arange(2).repeat(20)
    rows, draws = draw_layer(labels, 6, 1.0), [draw_split(labels, CLASSES[:2], 6, 0, 0)]
    turned = labels.clone()
    turned[draws[0].test] = 1 - turned[draws[0].test]
    ours = probe_layer(rows, labels, 2, draws, SINGLE_CLASSIFIERS, lambda: None, CPU)
    other = probe_layer(rows, turned, 2, draws, SINGLE_CLASSIFIERS, lambda: None, CPU)
    for one, two in zip(ours, other, strict=True):
        assert one.strengths == two.strengths
        assert one.mean == pytest.approx(1 - two.mean)
