"""What follows from one class index an image, against torch, scikit-learn and formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from finetune import targets


def test_class_weights_have_sklearns_proportions_and_mean_one() -> None:
    counts = [10, 30, 60]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    reference = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = targets.compute_class_weights(counts).double().numpy()
    assert weights.mean() == pytest.approx(1)
    assert weights / weights[0] == pytest.approx(reference / reference[0])


def test_the_loss_weighs_classes_and_smooths_labels() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0])
    first, second = math.log1p(math.exp(-2)), math.log1p(math.exp(1))
    assert targets.build_loss()(logits, labels).item() == pytest.approx((first + second) / 2)
    smooth = targets.build_loss(label_smoothing=0.1)(logits[:1], labels[:1]).item()
    assert smooth == pytest.approx(0.95 * first + 0.05 * (first + 2))
    mixed = torch.tensor([0, 1])
    balanced = targets.build_loss([1, 9], "balanced")(logits, mixed).item()
    assert balanced == pytest.approx(0.9 * first + 0.1 * (second - 1))
    assert targets.build_loss([1, 9])(logits, mixed).item() == pytest.approx((first + second - 1) / 2)


def weigh_by_true_class(logits: torch.Tensor, shares: torch.Tensor, weights: list[float]) -> list[float]:
    """The loss of each image, smoothed by 0.1, in plain Python: the weight of each class of its label times
    the smoothed loss that this class alone would give."""
    losses = []
    for row, own in zip(logits.tolist(), shares.tolist(), strict=True):
        total = math.log(sum(map(math.exp, row)))
        of_class = [total - value for value in row]
        smooth = sum(of_class) / len(of_class)
        losses.append(
            sum(
                share * weight * (0.9 * one + 0.1 * smooth)
                for share, weight, one in zip(own, weights, of_class, strict=True)
            )
        )
    return losses


def test_weights_apply_to_the_whole_smoothed_loss_of_an_image() -> None:
    counts = [40, 1, 3]
    loss = targets.build_loss(counts, "balanced", 0.1)
    weights = targets.compute_class_weights(counts).tolist()
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=generator), torch.tensor([0, 0, 1, 2, 0, 2])
    hard = nn.functional.one_hot(labels, 3).float()
    own = sum(weights[label] for label in labels)
    expected = weigh_by_true_class(logits, hard, weights)
    assert loss(logits, labels).item() == pytest.approx(sum(expected) / own)
    mixed = 0.3 * hard + 0.7 * hard.flip(0)  # as mixup and cutmix make them
    expected = weigh_by_true_class(logits, mixed, weights)
    assert loss(logits, mixed).item() == pytest.approx(sum(expected) / len(labels))


@pytest.mark.parametrize("soft", [False, True])
def test_without_smoothing_or_weights_the_loss_is_torchs(soft: bool) -> None:
    logits, labels = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 2, 0]),
    )
    wanted = nn.functional.one_hot(labels, 3) * 0.7 + 0.1 if soft else labels
    weights = targets.compute_class_weights([4, 1, 2])
    pairs = (
        (targets.build_loss([4, 1, 2], "balanced"), nn.CrossEntropyLoss(weights)),
        (targets.build_loss([4, 1, 2], "none", 0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
    )
    for ours, torchs in pairs:
        assert ours(logits, wanted).equal(torchs(logits, wanted))


@pytest.mark.parametrize("mixed", [False, True], ids=["hard", "mixup"])
def test_forty_to_one_stays_separable_with_weights_and_smoothing(mixed: bool) -> None:
    """torch's own combination of the two predicts the rare class everywhere."""
    labels = torch.tensor([0] * 400 + [1] * 10)
    noise = torch.randn(410, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    points = noise + torch.tensor([[-2.0, 0.0], [2.0, 0.0]])[labels]
    layer, loss = nn.Linear(2, 2), targets.build_loss([400, 10], "balanced", 0.1)
    wanted = 0.8 * nn.functional.one_hot(labels, 2) + 0.2 * torch.tensor([1.0, 0.0]) if mixed else labels
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = loss(layer(points), wanted)
        value.backward()
        return value

    optimizer.step(step)  # type: ignore[no-untyped-call]
    assert (targets.decide(layer(points)) == labels).double().mean() == 1.0


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("soft", [False, True])
def test_shares_of_parts_put_the_mean_loss_together_again(
    class_weights: targets.ClassWeights, soft: bool
) -> None:
    loss = targets.build_loss([4, 1, 2], class_weights, 0.1)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 3, generator=generator), torch.tensor([0, 0, 1, 2, 0, 2, 0])
    wanted = nn.functional.one_hot(labels, 3) * 0.7 + 0.1 if soft else labels
    parts = [slice(0, 3), slice(3, 5), slice(5, 7)]
    summed = sum(
        float(loss(logits[part], wanted[part]) * targets.compute_share(loss, wanted[part], wanted))
        for part in parts
    )
    assert summed == pytest.approx(loss(logits, wanted).item())


def test_probabilities_decision_and_confidence_belong_together() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0], [1.0, -1.0]])
    probabilities = targets.to_probabilities(logits)
    assert probabilities[0].tolist() == pytest.approx([0.25, 0.75])
    confidence, predicted = targets.decide_with_confidence(probabilities)
    assert predicted.tolist() == targets.decide(logits).tolist() == [1, 0, 0]
    assert confidence.equal(probabilities.gather(1, predicted[:, None])[:, 0])
    assert targets.compute_margins(probabilities).tolist()[:2] == pytest.approx([0.5, 0.0])
    assert targets.compute_margins(torch.ones(2, 1)).tolist() == [math.inf, math.inf]


def test_logits_of_probabilities_give_them_back() -> None:
    probabilities = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    logits = targets.to_logits(probabilities)
    assert logits.isfinite().all()
    assert targets.to_probabilities(logits).tolist() == [pytest.approx(row) for row in probabilities.tolist()]


def test_classes_are_ranked_with_the_lower_index_first_among_equals() -> None:
    probabilities = np.array([0.1, 0.4, 0.4, 0.1], np.float32)
    assert targets.rank_classes(probabilities, 3) == [1, 2, 0]
    assert targets.rank_classes(probabilities, 9) == [1, 2, 0, 3]


def test_log_odds_are_those_of_probabilities() -> None:
    logits = 2 * torch.randn(30, 6, generator=torch.Generator().manual_seed(2))
    chances = logits.double().softmax(1).numpy()
    assert targets.compute_log_odds(logits) == pytest.approx(np.log(chances / (1 - chances)), abs=1e-8)


def test_losses_of_images_have_the_mean_loss() -> None:
    logits, labels = torch.tensor([[0.0, 0.0], [300.0, 0.0]]), torch.tensor([0, 1])
    losses = targets.compute_losses(logits, labels)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([math.log(2), 300])  # not cut off at some least probability
    assert targets.compute_mean_loss(logits, labels) == pytest.approx(losses.mean().item())
    assert targets.SINGLE.compute_monitored(logits, labels) == {
        "accuracy": 0.5,
        "loss": targets.compute_mean_loss(logits, labels),
    }


def test_top_1_is_the_decision_and_all_classes_hold_every_label() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 6, generator=generator), torch.randint(6, (50,), generator=generator)
    assert targets.find_in_top_k(logits, labels, 1).equal(targets.decide(logits) == labels)
    assert targets.find_in_top_k(logits, labels, 6).all()
    assert 0 < targets.find_in_top_k(logits, labels, 5).sum() < 50


@pytest.mark.parametrize(
    ("accuracy", "loss", "by_accuracy", "by_loss"),
    [(0.9, 0.5, True, False), (0.8, 0.2, True, True), (0.8, 0.4, False, False), (0.7, 0.1, False, True)],
)
def test_the_best_epoch(accuracy: float, loss: float, by_accuracy: bool, by_loss: bool) -> None:
    best, new = {"accuracy": 0.8, "loss": 0.3}, {"accuracy": accuracy, "loss": loss}
    assert targets.is_better(new, best, "score") == by_accuracy
    assert targets.is_better(new, best, "loss") == by_loss
    assert targets.is_better(new, {}, "loss")


def test_columns_of_probabilities_give_the_classes_back() -> None:
    classes = ["ant", "prob_bee", "no. 3"]
    columns = [*targets.PREDICTION_COLUMNS, *targets.name_probabilities(classes)]
    assert columns[:4] == ["path", "label", "predicted", "confidence"]
    assert columns[4:] == ["prob_ant", "prob_prob_bee", "prob_no. 3"]
    assert targets.read_classes(columns) == classes
    assert targets.name_answer_columns(["a", "b"], 2, with_rejected=True) == [
        "path", "label", "confidence", "rejected", "label_2", "confidence_2", "prob_a", "prob_b",
    ]  # fmt: skip


def test_every_listed_metric_has_a_name() -> None:
    listed = {*targets.HEADLINE_METRICS, *targets.DETAIL_METRICS}
    assert listed == set(targets.METRIC_NAMES)
    assert {*targets.CARD_METRICS, *targets.SERIES_METRICS} <= listed


# --- names ---------------------------------------------------------------------------------------

FEW_NAMES = st.lists(st.text("a (01)", max_size=7) | st.sampled_from(["a", "a (0)", "a (1)", "a (0) (0)"]))
"""Names among which an appended index meets a name that stands there."""


@given(FEW_NAMES)
def test_unique_names(names: list[str]) -> None:
    unique = targets.make_unique(names)
    assert len(unique) == len(names) == len(set(unique))
    assert targets.make_unique(unique) == unique
    for name, own in zip(names, unique, strict=True):
        assert own == name if names.count(name) == 1 else own.startswith(f"{name} (")


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        (["crane", "bee", "crane"], ("crane (0)", "bee", "crane (2)")),
        (["a", "a", "a (1)"], ("a (0)", "a (1) (1)", "a (1)")),
        (["a", "a", "a (0)", "a (0)"], ("a (0) (0)", "a (1)", "a (0) (2)", "a (0) (3)")),
        ([], ()),
    ],
)
def test_what_is_appended(names: list[str], unique: tuple[str, ...]) -> None:
    assert targets.make_unique(names) == unique
