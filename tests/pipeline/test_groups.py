"""Images that come in bursts: the advice counts objects; a run says where its choice promised too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.pipeline.results import find_gap
from tests.conftest import Cli

# Small batches, so that five epochs learn the views of an object.
VERIFIED = ("--set", "advise.verify=true", "--set", "training.batch_size=2")
CLASSES, OBJECTS, VIEWS, SIZE = ("a", "b"), 8, 6, 32


def draw_bursts(root: Path, objects: int, views: int, seed: int) -> None:
    """Views of objects that have nothing in common but their class's name: shifted, with other noise."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(objects):
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            whole = Image.fromarray(pixels).resize((SIZE + 4, SIZE + 4), Image.Resampling.BICUBIC)
            for view in range(views):
                x, y = rng.integers(0, 4, 2).tolist()
                part = np.asarray(whole.crop((x, y, x + SIZE, y + SIZE))).astype(int)
                part = (part + rng.integers(-8, 9, part.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(part).save(root / name / f"{number:02}-{view}.png")


@pytest.fixture
def bursts(tmp_path: Path) -> Path:
    draw_bursts(tmp_path / "images/train", OBJECTS, VIEWS, seed=0)
    draw_bursts(tmp_path / "images/val", 3 * OBJECTS, 1, seed=1)
    return tmp_path / "images"


@pytest.mark.slow
def test_the_advice_counts_objects_and_promises_nothing(
    cli: Cli, bursts: Path, tiny: Path, tmp_path: Path
) -> None:
    done = cli("run", "-b", tiny, "-d", bursts, "-s", "auto", "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    advice = json.loads((tmp_path / "run/advice.json").read_text("utf-8"))
    objects, images = len(CLASSES) * OBJECTS, len(CLASSES) * OBJECTS * VIEWS
    assert advice["num_looked_at"] == images
    assert objects <= advice["num_independent"] < images / 3
    assert "training images come in groups of look-alikes" in " ".join(done.stderr.split())
    assert max(one["score"] for one in advice["candidates"]) < 0.8  # 1.0 if views were held out alone
    assert json.loads((tmp_path / "run/metrics.json").read_text("utf-8"))["advice_gap"] is None


@pytest.mark.slow
def test_a_brief_training_holds_groups_out_whole(cli: Cli, bursts: Path, tiny: Path) -> None:
    found = {}
    for known in ("", "group"):  # what look-alikes find, and what the user names
        words = ["--set", r"data.group_by=([a-z]/\d+)-"] if known else []
        done = cli("advise", "-b", tiny, "-d", bursts, "--json", *VERIFIED, *words)
        assert done.exit_code == 0, done.output
        found[known] = json.loads(done.stdout)["verified"]["top"]
    assert max(found.values()) < 0.65  # 0.78 if views were held out alone


def advice(accuracy: float, number: int) -> dict[str, Any]:
    return {"candidates": [{"score": 0.1}, {"score": accuracy}], "num_independent": number}


@pytest.mark.parametrize(
    ("cross_validated", "independent", "val", "num_val", "is_gap"),
    [
        (0.921, 355, 0.353, 150, True),
        (0.921, 9, 0.5, 12, False),  # too few to tell
        (0.90, 300, 0.86, 300, False),
        (0.90, 3000, 0.86, 3000, True),
        (0.5, 1000, 0.9, 1000, False),  # better than promised
        (1.0, 100, 1.0, 100, False),
    ],
)
def test_a_gap_is_told_where_the_intervals_do_not_meet(
    cross_validated: float, independent: int, val: float, num_val: int, is_gap: bool
) -> None:
    gap = find_gap(advice(cross_validated, independent), val, num_val)
    assert (gap is not None) == is_gap
    if gap is not None:
        assert gap["val"] <= gap["at_most"] < gap["at_least"] <= gap["cross_validated"]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"candidates": []},
        {"candidates": {"a": 1}, "num_independent": 3},
        {"candidates": [{"score": "x"}], "num_independent": "y"},
        advice(float("nan"), 3),
        advice(0.9, 0),
        advice(0.9, -1),
    ],
)
def test_no_advice_or_a_damaged_one_says_nothing(content: dict[str, Any]) -> None:
    assert find_gap(content, 0.1, 100) is None


@pytest.mark.slow
def test_the_gap_is_a_warning_and_in_the_report(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"cross_validated": 0.921, "at_least": 0.889, "val": 0.353, "at_most": 0.432}
    monkeypatch.setattr("finetune.pipeline.run.find_gap", lambda *_: found)
    done = cli("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "--epochs", 1, "-o", tmp_path / "run")
    said = " ".join(done.stderr.split())
    assert "the advice cross-validated 0.921 (at least 0.889), and validation is 0.353" in said
    assert "groups" in said and "of another kind" in said and "--group-by" in said
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "their 95 % intervals do not meet" in page and "92.1 %" in page and "35.3 %" in page
