"""Linear classifiers against scikit-learn: the same optimum on all features, and C from training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC
from torch import Tensor

from finetune.errors import DataError, InternalError
from finetune.features import minimize, solvers, standardised
from finetune.features.minimize import Logistic, Loss, Objective, Softmax, Spectrum, SquaredHinge
from finetune.features.rows import FileRows, MemoryRows
from finetune.features.solvers import (
    DEFAULT_STRENGTH,
    STRENGTHS,
    Kind,
    LinearClassifier,
    build_training_rows,
    choose_strength,
    draw_folds,
    fit,
    solve,
)
from tests.pretend_device import pretended_device
from tests.sweeps import slow_except

KINDS: tuple[Kind, ...] = ("softmax", "svm", "logreg")


def draw(
    num_rows: int, width: int, num_classes: int, seed: int = 0, noise: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Features as networks give them: correlated, of many scales, none below zero. Classes differ in size."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(num_rows, generator=generator).square() * num_classes).long()
    labels[:num_classes] = torch.arange(num_classes)
    few = max(2, width // 3)
    hidden = torch.randn(num_classes, few, generator=generator)[labels]
    hidden = hidden + noise * torch.randn(num_rows, few, generator=generator)
    features = hidden @ torch.randn(few, width, generator=generator)
    features += noise * torch.randn(num_rows, width, generator=generator)
    scales = torch.rand(width, generator=generator).mul(3).exp()
    scales[0] /= 300  # under the floor of deviations
    return features.relu() * scales, labels


def standardise(rows: Tensor, train: Tensor) -> Tensor:
    mean, std = rows[train].double().mean(dim=0), rows[train].double().std(dim=0, correction=0)
    return (rows.double() - mean) / std.clamp_min(0.1 * std.mean())


def build_reference(
    kind: Kind, strength: float
) -> LogisticRegression | LinearSVC | OneVsRestClassifier[LogisticRegression]:
    regression = LogisticRegression(C=strength, tol=1e-8, max_iter=100_000)
    if kind == "svm":  # its bias is penalised, but by next to nothing
        return LinearSVC(C=strength, dual=False, tol=1e-10, intercept_scaling=1e3, max_iter=100_000)
    return regression if kind == "softmax" else OneVsRestClassifier(regression)


def compute_objective(
    kind: Kind, strength: float, scaled: Tensor, labels: Tensor, weight: Tensor, bias: Tensor
) -> float:
    """The objective in float64, written as scikit-learn's documentation has it."""
    scores = scaled @ weight.double().T + bias.double()
    signs = torch.nn.functional.one_hot(labels, len(bias)) * 2 - 1
    if kind == "softmax":
        loss = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
    elif kind == "svm":
        loss = (1 - signs * scores).clamp_min(0).square().sum()
    else:
        loss = (1 + (-signs * scores).exp()).log().sum()
    return (strength * loss + weight.double().square().sum() / 2).item()


def on_standardised(classifier: LinearClassifier, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for standardised features, from those for the features as they are."""
    mean, std = rows.double().mean(dim=0), rows.double().std(dim=0, correction=0)
    weight = classifier.weight.double()
    return weight * std.clamp_min(0.1 * std.mean()), classifier.bias.double() + weight @ mean


# --- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "width"), [(150, 20), (60, 50), (30, 200)])
@pytest.mark.parametrize("multiple", [0.1, 1.0, 10.0])
def test_the_optimum_is_scikit_learns(kind: Kind, num_rows: int, width: int, multiple: float) -> None:
    rows, labels = draw(num_rows, width, 4)
    training = build_training_rows(MemoryRows(rows), torch.arange(num_rows), labels, 4)
    strength = training.strength(kind, multiple)
    classifier = solve(training, kind, strength)
    scaled = standardise(rows, torch.arange(num_rows))
    reference = build_reference(kind, strength).fit(scaled, labels)
    expected = (
        [(one.coef_, one.intercept_) for one in reference.estimators_]
        if isinstance(reference, OneVsRestClassifier)
        else [(reference.coef_, reference.intercept_)]
    )
    weight, bias = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*expected, strict=True))
    ours = compute_objective(kind, strength, scaled, labels, *on_standardised(classifier, rows))
    theirs = compute_objective(kind, strength, scaled, labels, weight, bias)
    assert ours <= theirs * (1 + 1e-6)
    assert ours >= theirs * (1 - 1e-4)  # where theirs is a little over the optimum
    scores, expected_scores = classifier.scores(rows).double(), scaled @ weight.T + bias
    if kind == "softmax":  # a constant for all classes means nothing
        scores, expected_scores = (one - one.mean(dim=1, keepdim=True) for one in (scores, expected_scores))
    assert (scores - expected_scores).abs().max() < 2e-2 * expected_scores.abs().max()
    assert classifier.strength == strength
    assert classifier.weight.dtype == classifier.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_two_classes(kind: Kind) -> None:
    rows, labels = draw(80, 12, 2)
    classifier = solve(build_training_rows(MemoryRows(rows), torch.arange(80), labels, 2), kind, 0.05)
    scaled = standardise(rows, torch.arange(80))
    # A softmax of two classes shares the penalty between them: half of it, for the same difference.
    reference = build_reference("svm" if kind == "svm" else "softmax", 0.1 if kind == "softmax" else 0.05)
    decisions = torch.from_numpy(reference.fit(scaled, labels).decision_function(scaled))
    scores = classifier.scores(rows).double()
    ours = scores[:, 1] - scores[:, 0] if kind == "softmax" else scores[:, 1]
    scale = decisions.abs().max().item()
    assert (ours - decisions).abs().max() < 5e-3 * scale
    assert kind == "softmax" or (scores[:, 0] + scores[:, 1]).abs().max() < 5e-3 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_hard_problems_end_at_the_optimum_too(kind: Kind) -> None:
    """Nearly dependent features, and C a thousand times its unit."""
    rows, labels = draw(100, 10, 3, noise=1.0)
    rows = torch.cat([rows, rows + 1e-2 * draw(100, 10, 3, seed=1)[0]], dim=1)
    training = build_training_rows(MemoryRows(rows), torch.arange(100), labels, 3)
    strength = training.strength(kind, 1000.0)
    scaled = standardise(rows, torch.arange(100))
    classifier = solve(training, kind, strength)
    ours = compute_objective(kind, strength, scaled, labels, *on_standardised(classifier, rows))
    reference = build_reference(kind, strength).fit(scaled, labels)
    models = reference.estimators_ if isinstance(reference, OneVsRestClassifier) else [reference]
    weight = torch.from_numpy(np.concatenate([model.coef_ for model in models]))
    bias = torch.from_numpy(np.concatenate([model.intercept_ for model in models]))
    assert ours <= compute_objective(kind, strength, scaled, labels, weight, bias) * (1 + 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_spectrum_changes_steps_and_not_the_optimum(kind: Kind) -> None:
    rows, labels = draw(90, 30, 4)
    training = build_training_rows(MemoryRows(rows), torch.arange(90), labels, 4)
    blind = replace(training, spectrum=Spectrum(torch.zeros(30, 1), torch.zeros(1), 0.0))
    strength = training.strength(kind, 1.0)
    best, other = solve(training, kind, strength), solve(blind, kind, strength)
    assert (best.scores(rows) - other.scores(rows)).abs().max() < 5e-3 * best.scores(rows).abs().max()


@pytest.mark.parametrize(("kind", "most"), [("softmax", 12), ("svm", 8), ("logreg", 8)])
def test_few_steps_are_enough(kind: Kind, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the spectrum they would be half as many again."""
    rows, labels = draw(150, 40, 6)
    training = build_training_rows(MemoryRows(rows), torch.arange(150), labels, 6)
    strength = training.strength(kind, 1.0)
    signs = torch.nn.functional.one_hot(labels, 6) * 2.0 - 1
    losses: dict[Kind, type[Loss]] = {"softmax": Softmax, "svm": SquaredHinge, "logreg": Logistic}
    objective = Objective(training.matrix, losses[kind](signs), strength, training.spectrum)
    best = minimize.minimize(objective, 1e-7)
    monkeypatch.setattr(minimize, "MOST_STEPS", most)
    soon = minimize.minimize(objective, 0.0)
    value = objective.value(best, training.matrix @ best.T)
    assert objective.value(soon, training.matrix @ soon.T) == pytest.approx(value, rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_start_ends_at_the_same_optimum(kind: Kind) -> None:
    """Far out a loss is flat or steep, and Newton's lengths are a thousand times too long or too short."""
    rows, labels = draw(90, 30, 4)
    training = build_training_rows(MemoryRows(rows), torch.arange(90), labels, 4)
    strength = training.strength(kind, 1.0)
    best = training.minimize(kind, strength, 1e-7)
    start = 100 * torch.randn(4, 31, generator=torch.Generator().manual_seed(0))
    found = training.minimize(kind, strength, 1e-7, start)
    if kind == "softmax":  # a constant for all biases means nothing
        best[:, -1] -= best[:, -1].mean()
        found[:, -1] -= found[:, -1].mean()
    assert (found - best).norm() < 1e-2 * best.norm()


# --- features of every kind ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_wide_features_are_solved_exactly_in_their_span(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = draw(50, 400, 3)
    train = torch.arange(0, 50, 2)
    wide = build_training_rows(MemoryRows(rows), train, labels[train], 3)
    assert wide.matrix.shape[1] <= 26
    monkeypatch.setattr(solvers, "WIDE", 1000)
    plain = build_training_rows(MemoryRows(rows), train, labels[train], 3)
    assert plain.matrix.shape == (25, 401)
    strength = plain.strength(kind, 1.0)
    assert strength == pytest.approx(wide.strength(kind, 1.0))
    ours, direct = solve(wide, kind, strength), solve(plain, kind, strength)
    scores = direct.scores(rows)  # of images that were not trained on as well
    assert (ours.scores(rows) - scores).abs().max() < 3e-3 * scores.abs().max()
    assert (ours.weight - direct.weight).norm() < 3e-3 * direct.weight.norm()


@pytest.mark.parametrize("width", [12, 300])
def test_rows_in_a_file_and_small_blocks(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, labels = draw(60, width, 3)
    train = torch.arange(10, 50)
    whole = fit(MemoryRows(rows), train, labels[train], 3, "softmax", 0)
    rows.numpy().tofile(tmp_path / "rows")
    kept = FileRows(tmp_path / "rows", (60, width), torch.float32)
    found = fit(kept, train, labels[train], 3, "softmax", 0)
    assert found.weight.equal(whole.weight)
    assert found.bias.equal(whole.bias)
    monkeypatch.setattr(standardised, "_BLOCK_BYTES", 8 * 40 * 5)
    monkeypatch.setattr(standardised, "_PANEL", 16)
    cut = fit(kept, train, labels[train], 3, "softmax", 0)
    assert cut.strength == pytest.approx(whole.strength)
    assert (cut.weight - whole.weight).norm() < 1e-3 * whole.weight.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_say_nothing_have_no_weight(kind: Kind) -> None:
    rows, labels = draw(60, 11, 3)
    rows = rows[:, 1:]  # without the feature that the floor holds down: the floor is another one here
    constant = torch.cat([rows, torch.full((60, 4), 7.25)], dim=1)
    strength = 0.01
    alone = solve(build_training_rows(MemoryRows(rows), torch.arange(60), labels, 3), kind, strength)
    both = solve(build_training_rows(MemoryRows(constant), torch.arange(60), labels, 3), kind, strength)
    assert both.weight[:, 10:].abs().max() == 0
    assert (both.scores(constant) - alone.scores(rows)).abs().max() < 3e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [3, 50])
def test_images_that_are_all_the_same(kind: Kind, width: int) -> None:
    labels = torch.tensor([0, 1, 1, 1, 2, 2])
    classifier = fit(MemoryRows(torch.full((6, width), 0.3)), torch.arange(6), labels, 3, kind, 0)
    scores = classifier.scores(torch.full((1, width), 0.3))
    assert scores.isfinite().all()
    assert scores.argmax() == 1  # the class with most images


def test_scale_and_origin_of_features_do_not_matter() -> None:
    rows, labels = draw(60, 20, 3)
    other = rows * 1000 + 50
    train = torch.arange(40)
    one = fit(MemoryRows(rows), train, labels[train], 3, "softmax", 0)
    two = fit(MemoryRows(other), train, labels[train], 3, "softmax", 0)
    assert two.strength == pytest.approx(one.strength, rel=1e-4)
    assert (one.scores(rows) - two.scores(other)).abs().max() < 2e-2


def test_half_precision_rows() -> None:
    rows, labels = draw(40, 10, 2, noise=0.5)
    halves = (rows / rows.max()).half()
    classifier = fit(MemoryRows(halves), torch.arange(40), labels, 2, "svm", 0)
    assert classifier.weight.dtype == torch.float32
    assert (classifier.scores(halves).argmax(dim=1) == labels).float().mean() > 0.8


@pytest.mark.parametrize("width", [10, 300])
def test_the_same_input_gives_the_same_bits(width: int) -> None:
    rows, labels = draw(60, width, 3)
    one, two = (fit(MemoryRows(rows), torch.arange(60), labels, 3, "logreg", 5) for _ in range(2))
    assert one.weight.equal(two.weight)
    assert one.bias.equal(two.bias)
    assert one.strength == two.strength


@pytest.mark.parametrize("kind", KINDS)
def test_other_images_are_never_read(kind: Kind) -> None:
    rows, labels = draw(60, 15, 3)
    train = torch.arange(0, 60, 2)
    clean = fit(MemoryRows(rows), train, labels[train], 3, kind, 0)
    spoilt = rows.clone()
    spoilt[1::2] = torch.nan
    assert fit(MemoryRows(spoilt), train, labels[train], 3, kind, 0).weight.equal(clean.weight)


# --- how strongly to fit -------------------------------------------------------------------------


def score_by_reference(
    kind: Kind, rows: Tensor, labels: Tensor, strengths: Sequence[float], folds: Tensor, used: Sequence[int]
) -> list[float]:
    """What scikit-learn's classifiers make of held-out images: mean log likelihood, or accuracy of an SVM."""
    scaled = standardise(rows, torch.arange(len(rows)))
    found = []
    for strength in strengths:
        scores = []
        for fold in used:
            part, held = folds != fold, folds == fold
            model = build_reference(kind, strength).fit(scaled[part], labels[part])
            if kind == "svm":
                scores.append(torch.from_numpy(model.predict(scaled[held])) == labels[held])
            else:
                likely = torch.from_numpy(model.predict_proba(scaled[held])).log()
                scores.append(likely.gather(1, labels[held][:, None])[:, 0])
        found.append(torch.cat(scores).double().mean().item())
    return found


@pytest.mark.parametrize("kind", ["softmax", "svm"])
@pytest.mark.parametrize(("large", "used"), [(2e8, [0, 1, 2]), (0, [0])])
def test_the_chosen_strength_is_best_by_scikit_learn(
    kind: Kind, large: float, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "LARGE", large)
    monkeypatch.setattr(solvers, "_NEARLY_SOLVED", 1e-7)  # one image more or less decides here
    rows, labels = draw(120, 16, 3, seed=3)
    training = build_training_rows(MemoryRows(rows), torch.arange(120), labels, 3)
    strengths = [training.strength(kind, multiple) for multiple in STRENGTHS]
    scores = score_by_reference(kind, rows, labels, strengths, draw_folds(labels, 3, 7), used)
    best = max(range(len(scores)), key=lambda place: (scores[place], -place))
    assert max(scores) > scores[0] + 0.01  # there is something to choose
    assert choose_strength(training, kind, 7) == strengths[best]


def test_of_equally_good_strengths_the_smallest() -> None:
    rows = torch.eye(2).repeat_interleave(10, dim=0)
    labels = torch.arange(2).repeat_interleave(10)
    training = build_training_rows(MemoryRows(rows), torch.arange(20), labels, 2)
    assert choose_strength(training, "svm", 0) == training.strength("svm", STRENGTHS[0])


@pytest.mark.parametrize(("kind", "curvature"), [("softmax", 2 / 9), ("svm", 2.0), ("logreg", 0.25)])
def test_the_unit_of_strength(kind: Kind, curvature: float) -> None:
    """C = 1 / (curvature of the loss at zero * mean squared length of an image)."""
    rows, labels = draw(60, 10, 3)
    rows = torch.cat([rows, torch.ones(60, 5)], dim=1)
    training = build_training_rows(MemoryRows(rows), torch.arange(60), labels, 3)
    square = standardise(rows, torch.arange(60)).square().sum().item() / 60
    assert square < 10.001  # of ten features that vary, some less than the floor
    assert training.strength(kind, 3.0) == pytest.approx(3 / (curvature * square), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_one_image(kind: Kind) -> None:
    rows, labels = draw(31, 8, 3, noise=0.5)
    labels[:30] = labels[:30].clamp_max(1)
    labels[30] = 2
    rows[30] += 100 * rows.std(dim=0)
    classifier = fit(MemoryRows(rows), torch.arange(31), labels, 3, kind, 0)
    assert classifier.scores(rows[30:]).argmax() == 2


def test_where_nothing_can_be_held_out() -> None:
    rows, _ = draw(4, 8, 2)
    training = build_training_rows(MemoryRows(rows), torch.arange(4), torch.arange(4), 4)
    assert choose_strength(training, "svm", 0) == training.strength("svm", DEFAULT_STRENGTH)
    classifier = fit(MemoryRows(rows), torch.arange(4), torch.arange(4), 4, "svm", 0)
    assert classifier.scores(rows).argmax(dim=1).tolist() == [0, 1, 2, 3]


# --- folds and cross-validation ------------------------------------------------------------------


@pytest.mark.parametrize("num_folds", [3, 5])
def test_folds_keep_every_class_on_both_sides(num_folds: int) -> None:
    labels = torch.tensor([0] * 17 + [1] * 2 + [2] + [3] * 6 + [5] * 40)
    folds = draw_folds(labels, num_folds, 0)
    assert folds[labels == 2].tolist() == [-1]
    assert (folds[labels != 2] >= 0).all()
    sizes = folds[folds >= 0].bincount(minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1
    for label in (0, 1, 3, 5):
        own = folds[labels == label].bincount(minlength=num_folds)
        assert own.max() - own.min() <= 1
        assert (own.sum() - own >= 1).all()


def test_folds_depend_on_seed_and_labels_alone() -> None:
    _, labels = draw(50, 4, 3)
    state = torch.random.get_rng_state()
    assert draw_folds(labels, 5, 3).equal(draw_folds(labels.clone(), 5, 3))
    assert not draw_folds(labels, 5, 3).equal(draw_folds(labels, 5, 4))
    assert torch.random.get_rng_state().equal(state)


# --- refusals ------------------------------------------------------------------------------------


def test_refusals() -> None:
    rows, labels = draw(12, 4, 3)
    with pytest.raises(DataError, match="there is only one class"):
        build_training_rows(MemoryRows(rows), torch.arange(12), torch.zeros(12, dtype=torch.int64), 1)
    with pytest.raises(DataError, match="class number 3 has no training image"):
        build_training_rows(MemoryRows(rows), torch.arange(12), labels, 5)
    rows[3, 2] = torch.inf
    with pytest.raises(InternalError, match="not finite"):
        build_training_rows(MemoryRows(rows), torch.arange(12), labels, 3)


# --- the device ----------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", slow_except(["svm"], KINDS))
@pytest.mark.parametrize("width", [20, 200])  # all features, and their span
def test_a_device_solves_and_the_cpu_gets_the_same_weights(kind: Kind, width: int) -> None:
    features, labels = draw(60, width, 3)
    rows, indices = MemoryRows(features), torch.arange(60)
    here = fit(rows, indices, labels, 3, kind, seed=0)
    with pretended_device() as device:
        matrix = build_training_rows(rows, indices, labels, 3, device).matrix
        there = fit(rows, indices, labels, 3, kind, 0, device)
    assert matrix.device == device
    assert there.weight.device == there.bias.device == torch.device("cpu")
    assert there.weight.equal(here.weight) and there.bias.equal(here.bias)
    assert there.strength == here.strength


def test_the_pretended_device_notices_a_tensor_that_stayed_behind() -> None:
    with pretended_device() as device:
        there = torch.ones(3, device=device)
        assert (there + torch.tensor(1.0)).sum().item() == 6
        assert (there.cpu() + torch.ones(3)).sum() == 6
        with pytest.raises(AssertionError, match="mixes devices"):
            there + torch.ones(3)


def test_a_program_that_allows_tf32_gets_exact_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw(60, 20, 3)
    during: list[str] = []
    value = Objective.value

    def noted(self: Objective, weights: Tensor, scores: Tensor) -> float:
        during.append(torch.backends.cuda.matmul.fp32_precision)
        return value(self, weights, scores)

    monkeypatch.setattr(Objective, "value", noted)
    torch.set_float32_matmul_precision("high")
    try:
        fit(MemoryRows(features), torch.arange(60), labels, 3, "softmax", seed=0)
        assert set(during) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_several_labels_are_a_logistic_regression_for_each_class() -> None:
    rows, labels = draw(90, 12, 3, seed=8)
    several = torch.nn.functional.one_hot(labels, 3).float()
    several[::4, 0] = 1
    several[::7] = 0
    training = build_training_rows(MemoryRows(rows), torch.arange(90), several, 3)
    strength = training.strength("logreg", 1.0)
    found = solve(training, "logreg", strength)
    scaled = standardise(rows, torch.arange(90)).numpy()
    for label in range(3):
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=100_000).fit(
            scaled, several[:, label].numpy()
        )
        expected = model.decision_function(scaled)
        assert found.scores(rows)[:, label].numpy() == pytest.approx(expected, abs=2e-2)


def test_c_of_several_labels_is_chosen_without_strata() -> None:
    rows, labels = draw(60, 12, 3, seed=9)
    several = torch.nn.functional.one_hot(labels, 3).float()
    found = fit(MemoryRows(rows), torch.arange(60), several, 3, "logreg", 0)
    again = fit(MemoryRows(rows), torch.arange(60), several, 3, "logreg", 0)
    assert found.weight.equal(again.weight)
    assert ((found.scores(rows) > 0) == (several > 0)).float().mean() > 0.8
    with pytest.raises(DataError, match="class number 1 has no training image"):
        fit(MemoryRows(rows), torch.arange(60), several * torch.tensor([1.0, 0.0, 1.0]), 3, "logreg", 0)
