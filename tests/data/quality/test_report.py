"""Every problem of a spoilt dataset is found, and nothing else; a clean one has no issues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.data.dataset import Issue
from finetune.data.discover import discover_leniently
from finetune.data.quality.files import _PLACEHOLDER
from finetune.data.quality.report import QualityReport, inspect_dataset
from finetune.data.scan import check_images
from finetune.data.split import SplitConfig
from tests.data.quality.spoilt import build_clean, photo, put, spoil


def look(root: Path, allow_leaks: bool = False, group_by: str | None = None) -> QualityReport:
    dataset, issues = discover_leniently(root, SplitConfig(0.2, 0, group_by=group_by))
    assert dataset is not None
    return inspect_dataset(dataset, check_images(dataset), allow_leaks, issues)


def by_code(report: QualityReport) -> dict[str, Issue]:
    return {issue.code: issue for issue in report.issues}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> QualityReport:
    return look(spoil(tmp_path_factory.mktemp("spoilt")))


EXPECTED = {
    "class-empty": ("error", 1, None),
    "class-unknown": ("error", 1, None),
    "file-empty": ("error", 1, "train/ants/empty.jpg"),
    "file-truncated": ("error", 1, "train/ants/cut.jpg"),
    "file-no-image": ("error", 1, "train/ants/page.jpg"),
    "picture-too-large": ("error", 1, "train/bees/bomb.png"),
    "leak": ("error", 1, "val/ants/copy.jpg"),
    "ignored-image": ("warning", 1, None),
    "ignored-file": ("warning", 1, None),
    "class-missing": ("warning", 2, None),
    "label-conflict": ("warning", 1, "train/bees/copy.jpg"),
    "picture-repeated": ("warning", 1, "train/bees/gone_a.jpg"),
    "duplicate": ("warning", 5, "train/ants/copy.jpg"),
    "near-leak": ("warning", 1, "val/ants/smaller.jpg"),
    "near-label-conflict": ("warning", 1, "train/bees/near.jpg"),
    "class-tiny": ("warning", 2, None),
    "class-alike": ("warning", 2, None),
    "imbalance": ("warning", 1, None),
    "picture-placeholder": ("warning", 1, "train/ants/imageNotFound.gif"),
    "picture-odd": ("warning", 3, "train/ants/moving.gif"),
    "file-disguised": ("warning", 1, "train/ants/disguised.jpg"),
    "picture-animated": ("warning", 1, "train/ants/moving.gif"),
    "picture-plain": ("warning", 1, "train/bees/plain.jpg"),
    "picture-small": ("warning", 1, "train/bees/small.jpg"),
    "picture-long": ("warning", 1, "train/bees/long.jpg"),
    "near-duplicate": ("note", 1, "val/ants/smaller.jpg"),
}


@pytest.mark.parametrize("code", EXPECTED)
def test_each_issue_is_found(spoilt: QualityReport, code: str) -> None:
    severity, number, path = EXPECTED[code]
    issue = by_code(spoilt)[code]
    assert (issue.severity, issue.count) == (severity, number), issue
    assert issue.message.endswith((".", "images", "wasps'?")) and issue.fix.endswith(".")
    if path is not None:
        assert path in issue.paths


def test_nothing_else_is_found(spoilt: QualityReport) -> None:
    assert sorted(issue.code for issue in spoilt.issues) == sorted(EXPECTED)
    assert [issue.severity for issue in spoilt.issues] == sorted(
        (severity for severity, *_ in EXPECTED.values()), key=["error", "warning", "note"].index
    )


def test_the_summary_counts_images_classes_and_formats(spoilt: QualityReport) -> None:
    result = json.loads(json.dumps(spoilt.to_dict(), allow_nan=False))
    summary = result["summary"]
    assert (result["errors"], result["warnings"], result["notes"]) == (7, 18, 1)
    assert summary["parts"]["train"]["classes"] == {"ants": 127, "bee_s": 2, "bees": 120, "wasps": 3}
    assert summary["parts"]["train"]["imbalance_ratio"] == 127 / 2
    assert summary["parts"]["val"]["classes"] == {"ants": 14, "bee_s": 0, "bees": 12, "wasps": 0}
    assert summary["formats"] == {"JPEG": 271, "GIF": 2, "PNG": 1} and summary["modes"]["P"] == 2
    assert summary["num_unreadable"] == 4 and summary["num_images"] == 278
    assert summary["width"] == {"min": 20, "median": 96, "max": 300}
    assert summary["aspect_ratio"]["max"] == 7.5


def test_clean_data_has_no_issues(tmp_path: Path) -> None:
    root = build_clean(tmp_path, {"train/ants": 20, "train/bees": 20, "val/ants": 8, "val/bees": 8})
    assert look(root).issues == ()


def test_allowed_leaks_are_a_warning(tmp_path: Path) -> None:
    root = build_clean(tmp_path, {"train/ants": 20, "train/bees": 20, "val/ants": 8, "val/bees": 8})
    shutil.copy(root / "train/ants/000.jpg", root / "val/bees/new.jpg")
    assert by_code(look(root))["leak"].severity == "error"
    assert by_code(look(root, allow_leaks=True))["leak"].severity == "warning"


def test_a_validation_split_that_repeats_the_training_split_is_an_error(tmp_path: Path) -> None:
    root = build_clean(tmp_path, {"train/ants": 20, "train/bees": 20})
    shutil.copytree(root / "train", root / "val")
    found = by_code(look(root))
    assert found["part-repeated"].severity == found["leak"].severity == "error"
    assert found["part-repeated"].count == found["leak"].count == 40
    assert "val repeats train" in found["part-repeated"].message


def test_the_same_folder_for_two_splits_is_reported_with_all_other_issues(tmp_path: Path) -> None:
    root = build_clean(tmp_path, {"train/ants": 20, "train/bees": 20})
    (root / "val").symlink_to(root / "train")
    (root / "train/ants/empty.jpg").write_bytes(b"")
    errors = {issue.code for issue in look(root).errors}
    assert errors == {"part-repeated", "leak", "file-empty"}


def test_groups_that_given_splits_divide_are_reported(tmp_path: Path) -> None:
    for split, patients in (("train", (1, 2, 3)), ("val", (3, 4))):
        for kind, offset in (("ants", 0), ("bees", 500)):
            for patient in patients:
                for shot in range(6):
                    seed = offset + 100 * patient + shot + 50 * (split == "val")
                    put(tmp_path / split / kind / f"p{patient}_{shot}.jpg", seed)
    found = by_code(look(tmp_path, group_by=r"p(\d+)_"))
    assert found["group-leak"].count == 1 and "'3'" in found["group-leak"].message
    assert found["group-leak"].severity == "warning"
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "train", flat)
    assert "group-leak" not in by_code(look(flat, group_by=r"p(\d+)_"))


def test_a_few_unreadable_training_images_are_a_warning(tmp_path: Path) -> None:
    root = build_clean(tmp_path, {"train/ants": 60, "train/bees": 60, "val/ants": 5, "val/bees": 5})
    (root / "train/ants/empty.jpg").write_bytes(b"")
    assert by_code(look(root))["file-empty"].severity == "warning"
    (root / "val/ants/empty.jpg").write_bytes(b"")
    assert by_code(look(root))["file-empty"].severity == "error"


def test_another_size_among_equal_ones_is_reported(tmp_path: Path) -> None:
    root = build_clean(tmp_path, {"train/ants": 20, "train/bees": 20, "val/ants": 8, "val/bees": 8})
    photo(7).resize((50, 50)).save(root / "train/ants/other.jpg")
    assert by_code(look(root))["size-odd"].paths == ("train/ants/other.jpg",)


def test_a_placeholder_among_real_photographs_is_reported(hymenoptera: Path) -> None:
    report = look(hymenoptera)
    found = by_code(report)
    assert set(found) == {"picture-placeholder", "picture-odd"}
    for issue in found.values():
        assert issue.paths == ("train/ants/imageNotFound.gif",) and issue.count == 1


def test_files_with_unknown_suffixes_are_not_reported(tmp_path: Path) -> None:
    rows = ["path,label,split"]
    for number in range(8):
        name = f"{number:032x}" if number % 2 else f"{number}.jfif"
        put(tmp_path / "x.jpg", number).rename(tmp_path / name)
        rows.append(f"{name},{'ab'[number % 2]},{'train' if number < 4 else 'val'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    assert set(by_code(look(tmp_path / "labels.csv"))) == {"class-tiny"}


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("piano_photo_1", False),
        ("volcano picture", False),
        ("casino-image", False),
        ("imageNotFound", True),
        ("no_image", True),
        ("img-not-available", True),
        ("photo_missing", True),
        ("no_picture", True),
        ("picture-not-found", True),
        ("missing picture", True),
        ("default.placeholder", True),
    ],
)
def test_names_of_placeholders_are_recognised(name: str, is_one: bool) -> None:
    assert bool(_PLACEHOLDER.search(name)) == is_one
