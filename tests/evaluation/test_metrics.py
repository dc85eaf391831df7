"""Figures against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics as reference

from finetune.evaluation.metrics import compute_confusion, compute_metrics, compute_top_k
from finetune.evaluation.predict import Predictions


def draw_predictions(num_images: int, num_classes: int, seed: int, present: int | None = None) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(present or num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 1
    return Predictions(logits, labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("present", [None, 4])
def test_figures_are_scikit_learns(seed: int, present: int | None) -> None:
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


def test_top1_is_accuracy() -> None:
    predictions = draw_predictions(50, 6, 1)
    assert compute_top_k(predictions, 1) == pytest.approx(predictions.accuracy)
