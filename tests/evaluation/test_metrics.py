"""Metrics against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics as reference

from finetune.evaluation.metrics import (
    compute_confusion,
    compute_metrics,
    compute_roc_auc,
    find_most_confused,
    list_by_class,
)
from finetune.evaluation.predictions import Predictions


def draw_predictions(num_images: int, num_classes: int, seed: int, present: int | None = None) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(present or num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 1
    return Predictions(logits, labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("present", [None, 4])
def test_metrics_equal_those_of_scikit_learn(seed: int, present: int | None) -> None:
    predictions = draw_predictions(80, 7, seed, present)
    truth, guess = predictions.labels.numpy(), predictions.predicted.numpy()
    classes = sorted(set(truth.tolist()))
    ours = compute_metrics(predictions, [f"class {k}" for k in range(7)])
    assert ours["accuracy"] == pytest.approx(reference.accuracy_score(truth, guess))
    recall = reference.recall_score(truth, guess, labels=classes, average="macro", zero_division=0)
    assert ours["balanced_accuracy"] == pytest.approx(recall)
    f1 = reference.f1_score(truth, guess, labels=classes, average="macro", zero_division=0)
    assert ours["f1_macro"] == pytest.approx(f1)
    loss = reference.log_loss(truth, predictions.logits.double().softmax(1).numpy(), labels=list(range(7)))
    assert ours["loss"] == pytest.approx(loss)
    top5 = reference.top_k_accuracy_score(truth, predictions.logits.numpy(), k=5, labels=list(range(7)))
    assert ours["top5_accuracy"] == pytest.approx(top5)
    assert (
        compute_confusion(predictions).tolist()
        == reference.confusion_matrix(truth, guess, labels=range(7)).tolist()
    )
    assert ours["classes_not_judged"] == [f"class {k}" for k in range(7) if k not in classes]


def test_top5_needs_six_classes() -> None:
    assert "top5_accuracy" not in compute_metrics(draw_predictions(20, 5, 0), "abcde")
    assert "top5_accuracy" in compute_metrics(draw_predictions(20, 6, 0), "abcdef")


@pytest.mark.parametrize("seed", range(3))
def test_metrics_by_class_equal_those_of_scikit_learn(seed: int) -> None:
    predictions = draw_predictions(80, 7, seed, 5)
    predictions.logits[:, 2] = -100  # never predicted
    truth, guess = predictions.labels.numpy(), predictions.predicted.numpy()
    theirs = reference.precision_recall_fscore_support(truth, guess, labels=range(7), zero_division=0)
    rows = list_by_class(predictions, "abcdefg")
    for place, (name, precision, recall, f1, support, predicted) in enumerate(rows):
        assert (name, support, predicted) == ("abcdefg"[place], theirs[3][place], (guess == place).sum())
        if place >= 5:  # without images the metrics are undefined, not 0
            assert (precision, recall, f1) == ("n/a", "n/a", "n/a")
            continue
        assert (recall, f1) == pytest.approx((theirs[1][place], theirs[2][place]))
        assert precision == ("n/a" if place == 2 else pytest.approx(theirs[0][place]))
    ours = compute_metrics(predictions, "abcdefg")
    classes = sorted(set(truth.tolist()))
    precision = reference.precision_score(truth, guess, labels=classes, average="macro", zero_division=0)
    assert ours["precision_macro"] == pytest.approx(precision)
    assert ours["error"] == pytest.approx(1 - ours["accuracy"])


@pytest.mark.parametrize("coarse", [False, True], ids=["no ties", "ties"])
def test_roc_auc_equals_that_of_scikit_learn(coarse: bool) -> None:
    predictions = draw_predictions(90, 4, 3)
    if coarse:
        predictions = Predictions(predictions.logits.round(), predictions.labels)
    truth, probabilities = (
        predictions.labels.numpy(),
        predictions.logits.double().softmax(1).numpy().round(12),
    )
    areas = [reference.roc_auc_score(truth == k, probabilities[:, k]) for k in range(4)]
    assert compute_roc_auc(predictions) == pytest.approx(sum(areas) / 4)


def test_roc_auc_needs_two_classes_with_images() -> None:
    predictions = draw_predictions(20, 4, 0, present=1)
    assert compute_roc_auc(predictions) is None
    assert compute_metrics(predictions, "abcd")["roc_auc"] is None


def test_counts_are_integers_if_nothing_is_right() -> None:
    predictions = Predictions(torch.tensor([[0.0, 1.0, 0.0]] * 3), torch.zeros(3, dtype=torch.int64))
    rows = list_by_class(predictions, "abc")
    assert rows == [("a", "n/a", 0.0, 0.0, 3, 0), ("b", *["n/a"] * 3, 0, 3), ("c", *["n/a"] * 3, 0, 0)]
    assert all(isinstance(count, int) for row in rows for count in row[4:])


def test_confused_pairs_have_their_share() -> None:
    confusion = torch.tensor([[5, 3, 0], [1, 9, 0], [0, 4, 6]]).numpy()
    assert find_most_confused(confusion, ["ant", "bee", "cat"]) == [
        {"label": "cat", "predicted": "bee", "count": 4, "share": 0.4},
        {"label": "ant", "predicted": "bee", "count": 3, "share": 0.375},
        {"label": "bee", "predicted": "ant", "count": 1, "share": 0.1},
    ]


def test_roc_auc_of_extreme_confidences() -> None:
    """Its probabilities are 0 or 1 in float32, but the order of its logits still counts."""
    gaps = torch.linspace(-60, 60, 100)
    predictions = Predictions(torch.stack([gaps, -gaps], dim=1) + 40, (gaps < 20).long())
    assert compute_roc_auc(predictions) == 1.0
