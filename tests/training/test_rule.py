"""The rule at its edges: sizes, similarity, which linear classifier, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune.pipeline import rule
from finetune.pipeline.rule import CELLS, SIMILARITIES, SIZES, Candidate, Evidence, decide
from finetune.recipe import load_recipe

LAST = Candidate("last", 0.80, 0.0, 0.0)
ALL = Candidate("all", 0.83, 0.03, 0.02)


def evidence(**changes: Any) -> Evidence:
    plain = Evidence(500, 10, 40, 0.9, -0.05, 0.02, (LAST, ALL))
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("images", "classes", "size"),
    [
        (rule.LITTLE_IMAGES - 1, 2, "little"),
        (rule.LITTLE_IMAGES, 2, "medium"),
        (rule.LITTLE_IMAGES, rule.LITTLE_IMAGES // rule.LITTLE_PER_CLASS, "medium"),
        (rule.LITTLE_IMAGES, rule.LITTLE_IMAGES // rule.LITTLE_PER_CLASS + 1, "little"),
        (rule.MANY_IMAGES - 1, 2, "medium"),
        (rule.MANY_IMAGES, rule.MANY_IMAGES // rule.MANY_PER_CLASS, "a lot"),
        (rule.MANY_IMAGES, rule.MANY_IMAGES // rule.MANY_PER_CLASS + 1, "medium"),
    ],
)
def test_sizes_at_their_edges(images: int, classes: int, size: str) -> None:
    assert decide(evidence(num_images=images, num_classes=classes)).size == size


@pytest.mark.parametrize(
    ("leep", "similarity"),
    [
        (rule.SIMILAR_LEEP, "similar"),
        (rule.SIMILAR_LEEP - 1e-9, "unsure"),
        (rule.DIFFERENT_LEEP, "unsure"),
        (rule.DIFFERENT_LEEP - 1e-9, "different"),
        (1.0, "similar"),
        (-0.1, "different"),
    ],
)
def test_similarity_at_its_edges(leep: float, similarity: str) -> None:
    assert decide(evidence(leep=leep, gap=0.5, gap_error=0.01)).similarity == similarity


@pytest.mark.parametrize(
    ("gap", "error", "similarity"),
    [
        (0.05, 0.02, "different"),
        (0.04, 0.02, "unsure"),  # two standard errors, and not more
        (-0.2, 0.02, "unsure"),  # the last layer is the best: no proof of similarity
        (0.0, 0.0, "unsure"),
    ],
)
def test_without_a_classifier_depth_decides(gap: float, error: float, similarity: str) -> None:
    assert decide(evidence(leep=None, gap=gap, gap_error=error)).similarity == similarity


def test_every_cell_leads_somewhere_that_a_recipe_takes() -> None:
    assert set(CELLS) == {(size, similarity) for size in SIZES for similarity in SIMILARITIES}
    sizes = {"little": (500, 10), "medium": (3_000, 10), "a lot": (20_000, 10)}
    leeps = {"similar": 0.9, "unsure": 0.7, "different": 0.2}
    for size, similarity in CELLS:
        images, classes = sizes[size]
        decision = decide(evidence(num_images=images, num_classes=classes, leep=leeps[similarity]))
        assert (decision.size, decision.similarity) == (size, similarity)
        keys = {f"strategy.{key}": value for key, value in decision.keys.items()}
        assert load_recipe(None, keys).strategy.name == CELLS[size, similarity].name
        assert len(decision.reasons) == 3


@pytest.mark.parametrize("leep", [0.2, 0.9])
def test_little_data_take_all_stages_whatever_they_show(leep: float) -> None:
    decision = decide(evidence(leep=leep))
    assert dict(decision.keys) == {"name": "freeze", "features": "all"}
    assert "all stages" in decision.reasons[2] and "+0.030" in decision.reasons[2]


@pytest.mark.parametrize(
    ("candidates", "features"),
    [
        ((LAST, replace(ALL, lead=-0.02)), "all"),  # one standard error, and not more
        ((LAST, replace(ALL, lead=-0.021)), "last"),
        ((LAST, replace(ALL, lead=0.0, lead_error=0.0)), "all"),
        ((LAST,), "last"),
    ],
)
def test_the_last_features_must_be_clearly_better(candidates: tuple[Candidate, ...], features: str) -> None:
    assert decide(evidence(candidates=candidates)).features == features


def test_fine_tuning_has_a_floor_and_starts_from_a_solution() -> None:
    keys = decide(evidence(num_images=20_000, leep=0.2)).keys
    assert keys["name"] == "full" and keys["probe_first"] and keys["floor"] == "all"
    assert keys["body_factor"] == 0.1  # nothing at 1/100 where everything has to move


def test_labels_that_mean_nothing_are_said() -> None:
    guess = Candidate("last", 0.11, 0.0, 0.0)
    decision = decide(evidence(leep=0.05, candidates=(guess,)))
    assert decision.cell.name == "freeze"
    assert "check the labels" in decision.warnings[0]
    assert not decide(evidence()).warnings


def test_what_would_change_it_names_the_bounds() -> None:
    changes = decide(evidence()).changes
    assert [change for change in changes if "with 2,000 training images or more" in change] == list(changes)
    medium = decide(evidence(num_images=3_000)).changes
    assert any("under 0.75" in change for change in medium)
    many = decide(evidence(num_images=20_000, num_classes=300)).changes  # 67 a class: medium
    assert (
        any("with 30,000 training images or more" in change for change in many)
        or CELLS["medium", "similar"] == CELLS["a lot", "similar"]
    )
