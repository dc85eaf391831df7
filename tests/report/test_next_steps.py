"""Each suggestion depends on one number of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Recipe
from finetune.report.facts import Facts, load_facts
from finetune.report.next_steps import suggest_steps
from finetune.runs.folder import RunFolder
from finetune.runs.reader import PredictionRow

QUIET: dict[str, Any] = {
    "num_samples": 2000, "split_chose_checkpoint": False, "best_epoch": 3, "epochs": 5,
    "balanced_accuracy": 0.9, "data_wait_fraction": 0.05, "skipped_steps": 0, "rollbacks": 0,
    "intervals": {"accuracy": [0.89, 0.91]}, "calibration": {"ece": 0.03, "ece_calibrated": 0.01},
}  # fmt: skip
HISTORY = tuple({"epoch": float(n), "train_loss": 0.5, "eval_loss": 0.55} for n in range(1, 6))


def split(**counts: int) -> tuple[dict[str, str], ...]:
    return tuple(
        {"path": "x", "label": name, "split": "train"} for name, n in counts.items() for _ in range(n)
    )


def facts(metrics: dict[str, Any] | None = None, **fields: Any) -> Facts:
    quiet = {"history": HISTORY, "split": split(a=100, b=100, c=100)}
    return Facts(RunFolder(Path("runs/x")), metrics=QUIET | (metrics or {}), **(quiet | fields))


def test_without_evidence_nothing_is_suggested() -> None:
    assert suggest_steps(facts()) == []
    assert suggest_steps(Facts(RunFolder(Path("x")))) == []


CONFUSED = {"classes": ("a", "b", "c"), "confusion": ((90, 9, 1), (6, 93, 1), (2, 1, 97))}
WEAK = tuple(
    {"label": name, "recall": str(recall), "support": "30"}
    for name, recall in zip("abc", (0.5, 0.95, 0.96), strict=True)
)
FINDINGS = [{"severity": one, "message": "odd"} for one in ("error", "warning", "note")]
APART = tuple({**row, "train_loss": 0.1, "eval_loss": 0.8} for row in HISTORY)
SURE = tuple(PredictionRow("x", "a", "b", 0.97) for _ in range(4))


@pytest.mark.parametrize(
    ("found", "words", "number"),
    [
        (facts(check={"findings": FINDINGS}), "data check", "1 error and 1 warning"),
        (facts(predictions=SURE), "wrong labels", "4 of 4"),
        (facts({"split_chose_checkpoint": True}), "test/", "2000"),
        (facts({"best_epoch": 5}), "--epochs", "5 of 5"),
        (facts(history=APART), "augmentation", "training loss was 0.10 and the validation loss 0.80"),
        (facts(**CONFUSED), "a and b", "15 of 20"),
        (facts(per_class=WEAK), "images of a", "50 %"),
        (facts(split=split(a=600, b=100, c=100)), "class_weights", "ratio of 6"),
        (facts(split=split(a=60, b=40, c=45)), "More training images", "b has 40"),
        (facts({"intervals": {"accuracy": [0.8, 0.9]}}), "--repeats", "80.0 to 90.0 %"),
        (facts({"calibration": {"ece": 0.1, "ece_calibrated": 0.07}}), "probabilities", "7.0 points"),
        (facts({"data_wait_fraction": 0.6}), "--workers", "60 %"),
        (facts({"skipped_steps": 3}), "--lr", "3 steps"),
    ],
)  # fmt: skip
def test_each_rule_suggests_with_its_number(found: Facts, words: str, number: str) -> None:
    [(advice, evidence)] = suggest_steps(found)
    assert words in advice and number in evidence


def test_fewer_than_eight_mistakes_give_no_confused_pair() -> None:
    """With seven mistakes, five between one pair may be chance."""
    few = {"classes": ("a", "b", "c"), "confusion": ((90, 5, 1), (0, 93, 1), (0, 0, 97))}
    assert suggest_steps(facts(**few)) == []
    enough = few | {"confusion": ((90, 5, 2), (0, 93, 1), (0, 0, 97))}
    [(_, evidence)] = suggest_steps(facts(**enough))
    assert evidence.startswith("5 of 8 mistakes")


@pytest.mark.parametrize("part", ["train", "all", None])
def test_evaluated_images_do_not_count_as_training_images(part: str | None) -> None:
    few = tuple(PredictionRow("x", name, name, 0.6) for name in "aaaaaab")
    assert suggest_steps(facts({"split": part}, split=(), predictions=few)) == []


def test_the_number_of_suggestions_is_limited() -> None:
    everything = facts(
        {"split_chose_checkpoint": True, "best_epoch": 5, "data_wait_fraction": 0.9, "skipped_steps": 1,
         "intervals": {"accuracy": [0.5, 0.9]}},
        split=split(a=100, b=2), predictions=SURE, per_class=WEAK, **CONFUSED,
    )  # fmt: skip
    assert len(suggest_steps(everything)) == 6


# --- the next strategy ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "following"), [("freeze", "top"), ("top", "full")])
def test_the_next_strategy_trains_more_stages(name: str, following: str) -> None:
    recipe = Recipe.model_validate({"backbone": {"name": "resnet18"}, "strategy": {"name": name}})
    [(advice, evidence)] = suggest_steps(facts({"accuracy": 0.9}, recipe=recipe))
    assert f"--strategy {following}" in advice and evidence == f"`{name}` classified 90.0 % correctly."


@pytest.mark.parametrize(
    ("changed", "strategy"),
    [
        ({}, {"name": "full"}),
        ({}, {"name": "freeze", "features": "all"}),
        ({"metrics": QUIET | {"accuracy": 1.0}}, {"name": "top"}),
        ({"advice": {"reasons": ["measured"]}}, {"name": "top"}),
    ],
    ids=["all stages", "solved", "no mistake", "chosen from evidence"],
)
def test_no_strategy_follows(changed: dict[str, Any], strategy: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({"backbone": {"name": "resnet18"}, "strategy": strategy})
    values = {"metrics": QUIET | {"accuracy": 0.9}, "history": HISTORY, "recipe": recipe} | changed
    assert "--strategy" not in str(suggest_steps(Facts(RunFolder(Path("runs/x")), **values)))


def write_run(folder: Path, accuracy: float, images: str = "ab", **strategy: Any) -> RunFolder:
    """Write the files of a run that a suggestion reads."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    features = ["layer4"] if "features" in strategy else None
    metrics = {"accuracy": accuracy, "backbone": "timm/resnet18", "features": features}
    run.metrics.write_text(json.dumps(metrics))
    run.recipe.write_text(json.dumps({"backbone": {"name": "resnet18"}, "strategy": strategy}))
    rows = [f"{path}.jpg,a,a,0.9,0.9,0.1" for path in images]
    run.predictions.write_text("\n".join(["path,label,predicted,confidence,prob_a,prob_b", *rows]) + "\n")
    return run


@pytest.mark.parametrize(("name", "key"), [("top", "floor"), ("full", "floor"), ("freeze", "features")])
def test_a_better_linear_classifier_beside_the_run_is_suggested(tmp_path: Path, name: str, key: str) -> None:
    run = write_run(tmp_path / "trained", 0.9, name=name)
    write_run(tmp_path / "some", 0.95, name="freeze", features="last")
    write_run(tmp_path / "most", 0.97, name="freeze", features="all")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/metrics.json").write_text("{")
    [(advice, evidence)] = suggest_steps(load_facts(run))
    assert f"--set strategy.{key}=all" in advice
    assert "97.0 %" in evidence and "(most)" in evidence and "90.0 %" in evidence


def test_a_strategy_that_knows_no_floor_is_given_none(tmp_path: Path) -> None:
    """The recipe refuses `strategy.floor` for scratch."""
    run = write_run(tmp_path / "trained", 0.9, name="scratch")
    write_run(tmp_path / "solved", 0.97, name="freeze", features="all")
    assert suggest_steps(load_facts(run)) == []


@pytest.mark.parametrize(
    ("accuracy", "images", "backbone"),
    [(0.9, "ab", "resnet18"), (0.97, "abc", "resnet18"), (0.97, "ab", "resnet50")],
    ids=["not better", "other images", "another backbone"],
)
def test_a_run_that_cannot_be_compared_suggests_no_floor(
    tmp_path: Path, accuracy: float, images: str, backbone: str
) -> None:
    run = write_run(tmp_path / "trained", 0.9, name="top")
    other = write_run(tmp_path / "solved", accuracy, images, name="freeze", features="all")
    other.metrics.write_text(other.metrics.read_text().replace("resnet18", backbone))
    [(advice, _)] = suggest_steps(load_facts(run))
    assert "floor" not in advice and "--strategy full" in advice
