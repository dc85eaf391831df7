"""The kinds of labels: one contract for all, and their losses and scores against torch and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score
from torch import Tensor
from torch.nn import functional as F

from finetune.targets import (
    KINDS,
    SCORES,
    SINGLE,
    MultiLabel,
    Number,
    Target,
    compute_share,
    fit_target,
    is_better,
    read_target,
)
from pretrained.config import read_target as read_facts

LABELS = {
    "single": ["b", "a", "c", "a", "b", "c"],
    "multi": ["a|b", "", "c", "a|c", "b", "a|b|c"],
    "number": ["3.5", "-1.0", "7.0", "3.5", "0.25", "2e3"],
}


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest) -> Target:
    return fit_target(request.param, LABELS[request.param])


def make(target: Target, number: int = 6) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Random outputs, labels, and the names of the outputs."""
    labels = LABELS[target.kind]
    classes = target.name_outputs(labels)
    generator = torch.Generator().manual_seed(0)
    encoded = target.encode((labels * number)[:number], classes)
    return torch.randn(number, len(classes), generator=generator), encoded, classes


def test_there_is_a_kind_for_each_name() -> None:
    assert [fit_target(kind, LABELS[kind]).kind for kind in KINDS] == list(KINDS)
    assert {fit_target(kind, LABELS[kind]).score for kind in KINDS} == set(SCORES)


def test_outputs_have_sorted_names(target: Target) -> None:
    assert target.name_outputs(LABELS[target.kind]) == (
        ("value",) if target.kind == "number" else ("a", "b", "c")
    )


def test_the_loss_is_the_mean_of_the_losses_of_images(target: Target) -> None:
    outputs, labels, classes = make(target)
    loss = target.build_loss(labels, len(classes), "none", 0.0)
    expected = target.compute_losses(outputs, labels)
    assert expected.shape == (6,)
    assert expected.dtype == torch.float64
    assert loss(outputs, labels).item() == pytest.approx(expected.mean().item(), rel=1e-6)
    monitored = target.compute_monitored(outputs, labels)
    assert list(monitored) == [target.score, "loss"]
    assert monitored["loss"] == pytest.approx(expected.mean().item())


def test_parts_of_a_batch_have_their_share_of_its_loss(target: Target) -> None:
    outputs, labels, classes = make(target)
    loss = target.build_loss(labels, len(classes), "balanced" if target.has_classes else "none", 0.0)
    whole = loss(outputs, labels)
    parts = [
        loss(outputs[part], labels[part]) * compute_share(loss, labels[part], labels)
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_answers_have_the_outputs_that_gave_them(target: Target) -> None:
    outputs, _, _ = make(target)
    answers = target.activate(outputs)
    torch.testing.assert_close(target.activate(target.deactivate(answers)), answers, atol=1e-5, rtol=1e-5)
    assert target.deactivate(torch.zeros(1, 3)).isfinite().all()


def test_exact_outputs_have_the_best_score(target: Target) -> None:
    _, labels, classes = make(target)
    best = 20 * F.one_hot(labels, len(classes)).float() if labels.ndim == 1 else labels
    assert target.compute_score(best, labels) == pytest.approx(1)
    assert target.compute_score(-best, labels) < 0.9


def test_the_score_of_images_has_the_metric_as_its_mean(target: Target) -> None:
    outputs, labels, _ = make(target, 60)
    each = target.score_each(outputs, labels)
    assert each.shape == (60,)
    assert each.dtype == torch.float64
    if target == SINGLE:
        expected = float((outputs.argmax(dim=1) == labels).double().mean())
    else:
        expected = float(r2_score(labels, outputs, multioutput="uniform_average"))
    assert each.mean().item() == pytest.approx(expected)
    if target.additive_score == target.score:
        assert target.compute_score(outputs, labels) == pytest.approx(expected)


def test_what_does_not_vary_explains_nothing() -> None:
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert MultiLabel().score_each(labels, labels).tolist() == [1.0, 1.0]  # of the second class alone
    assert Number().score_each(torch.ones(3, 1), torch.ones(3, 1)).tolist() == [0.0] * 3


def test_facts_come_back_from_a_models_files(target: Target) -> None:
    if target == SINGLE:
        assert read_target({}) == read_target(target.to_facts()) == SINGLE
        return
    changed = (
        replace(target, margin=0.5) if isinstance(target, Number) else MultiLabel(thresholds=(0.25, 0.5, 1.0))
    )
    for one in (target, changed):
        facts = one.to_facts()
        assert read_target(dict(read_facts(facts))) == one


@pytest.mark.parametrize(
    "facts",
    [
        [],
        "multi",
        {"kind": "boxes"},
        {"kind": "multi", "thresholds": 0.5},
        {"kind": "multi", "thresholds": [2]},
        {"kind": "multi", "thresholds": ["0.5"]},
        {"kind": "number"},
        {"kind": "number", "mean": 0.0, "std": 0.0, "margin": None},
        {"kind": "number", "mean": float("nan"), "std": 1.0, "margin": None},
        {"kind": "number", "mean": 0.0, "std": 1.0, "margin": -1.0},
    ],
)
def test_foreign_facts_are_refused(facts: object) -> None:
    with pytest.raises(ValueError, match=r"target|threshold"):
        read_facts(facts)


def test_each_answer_has_a_cell_for_each_column(target: Target) -> None:
    outputs, _, classes = make(target)
    label, confidence = target.answer(target.activate(outputs)[0].numpy(), classes)
    columns = target.answer_columns(classes, 1, False)
    assert columns[0] == "path"
    assert (confidence is not None) == ("confidence" in columns) == (target == SINGLE)
    assert isinstance(label, str)


def test_every_image_with_a_class_is_in_a_stratum(target: Target) -> None:
    by_label: dict[str, list[str]] = {}
    for number, label in enumerate(LABELS[target.kind] * 10):
        by_label.setdefault(label, []).append(f"{number}.png")
    strata = target.strata(by_label)
    assert {path for paths in strata.values() for path in paths} == {f"{n}.png" for n in range(60)}
    assert min(map(len, strata.values())) >= 4


def test_a_single_image_without_a_class_is_no_stratum() -> None:
    assert MultiLabel().strata({"": ["x"], "a": ["y", "z"]}) == {"a": ["y", "z"]}


# --- several labels ---


def test_binary_cross_entropy_is_torchs_summed_over_classes() -> None:
    target = MultiLabel()
    outputs, labels, classes = make(target, 40)
    ours = target.build_loss(labels, 3, "none", 0.0)(outputs, labels)
    assert ours.item() == pytest.approx(
        len(classes) * F.binary_cross_entropy_with_logits(outputs, labels).item()
    )
    positive = labels.sum(dim=0)
    weights = (40 - positive) / positive
    balanced = F.binary_cross_entropy_with_logits(outputs, labels, pos_weight=weights, reduction="none")
    found = target.build_loss(labels, 3, "balanced", 0.0)(outputs, labels)
    assert found.item() == pytest.approx(balanced.sum(dim=1).mean().item())
    smooth = F.binary_cross_entropy_with_logits(outputs, labels * 0.8 + 0.1, reduction="none")
    found = target.build_loss(labels, 3, "none", 0.2)(outputs, labels)
    assert found.item() == pytest.approx(smooth.sum(dim=1).mean().item())


def test_mean_average_precision_is_scikit_learns_over_classes_with_images() -> None:
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(50, 4, generator=generator)
    labels = (torch.rand(50, 4, generator=generator) < 0.3).float()
    labels[:, 2] = 0
    kept = [0, 1, 3]
    expected = average_precision_score(labels[:, kept].numpy(), outputs[:, kept].numpy(), average="macro")
    assert MultiLabel().compute_score(outputs, labels) == pytest.approx(expected)
    assert MultiLabel().compute_score(outputs, torch.zeros(50, 4)) == 0.0


def test_classes_are_named_from_their_threshold_on() -> None:
    target = MultiLabel((0.2, 0.9, 0.5))
    values = np.array([0.2, 0.89, 0.7], np.float32)
    assert target.answer(values, ("a", "b", "c")) == ("a|c", None)
    assert target.decide(torch.from_numpy(values)[None]).tolist() == [[True, False, True]]
    assert MultiLabel().answer(values, ("a", "b", "c")) == ("b|c", None)


# --- numbers ---


def test_r_squared_is_scikit_learns_in_any_unit() -> None:
    generator = torch.Generator().manual_seed(4)
    truth = 1e4 + 300 * torch.randn(60, generator=generator, dtype=torch.float64)
    target = Number.fit([repr(value) for value in truth.tolist()])
    labels = target.encode([repr(value) for value in truth.tolist()], ("value",))
    outputs = labels + 0.5 * torch.randn(60, 1, generator=generator)
    assert labels.mean().item() == pytest.approx(0, abs=1e-5)
    assert labels.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    values = target.activate(outputs.double())[:, 0].numpy()
    assert target.compute_score(outputs, labels) == pytest.approx(r2_score(truth.numpy(), values), abs=1e-6)
    assert target.compute_losses(outputs, labels).mean().item() == pytest.approx(
        F.mse_loss(outputs, labels).item() / 4
    )


def test_the_huber_loss_is_torchs_and_the_squared_error_for_small_errors() -> None:
    target = Number.fit(["1", "2", "4"])
    labels, outputs = torch.zeros(5, 1), torch.tensor([[-8.0], [-0.5], [0.0], [0.3], [2.0]])
    squared = target.build_loss(labels, 1, "none", 0.0)
    assert squared(outputs, labels).item() == pytest.approx(F.mse_loss(outputs, labels).item() / 4)
    assert squared(1e4 + outputs, labels).item() == pytest.approx(
        F.mse_loss(1e4 + outputs, labels).item() / 4
    )
    for delta in (0.25, 1.0, 3.0):
        huber = target.build_loss(labels, 1, "none", 0.0, delta)
        expected = F.huber_loss(outputs, labels, delta=delta) / 2
        assert huber(outputs, labels).item() == pytest.approx(expected.item())
        small = outputs * delta / 8
        assert huber(small, labels).item() == pytest.approx(squared(small, labels).item())
    far = (outputs + 1e4).requires_grad_()
    target.build_loss(labels, 1, "none", 0.0, 1.0)(far, labels).backward()
    assert far.grad is not None and (far.grad.abs() <= 1 / 2 / len(labels) + 1e-6).all()


def test_equal_numbers_have_no_deviation_of_zero() -> None:
    target = Number.fit(["2", "2"])
    assert target.encode(["2", "3"], ("value",)).tolist() == [[0.0], [1.0]]
    assert target.compute_score(torch.zeros(2, 1), torch.zeros(2, 1)) == 0.0


# --- the best epoch ---


@pytest.mark.parametrize("score", SCORES)
def test_a_higher_score_wins_and_then_a_lower_loss(score: str) -> None:
    best = {score: 0.5, "loss": 1.0}
    assert is_better(best, {}, "score")
    assert is_better({score: 0.6, "loss": 9.0}, best, "score")
    assert is_better({score: 0.5, "loss": 0.9}, best, "score")
    assert not is_better({score: 0.4, "loss": 0.1}, best, "score")
    assert is_better({score: 0.4, "loss": 0.1}, best, "loss")
    assert not is_better({score: 0.9, "loss": 1.1}, best, "loss")
