"""Groups by a column or by a regular expression on the path; unusable ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data import split as groups
from finetune.data.discover import discover, discover_leniently
from finetune.data.split import SplitConfig, draw_folds, find_fold_fault
from finetune.errors import DataError, UsageError
from tests.conftest import draw

PATIENTS = range(8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, eight patients with three images of each class."""
    for kind, colour in (("sick", (200, 30, 30)), ("well", (30, 200, 30))):
        for patient in PATIENTS:
            for shot in range(3):
                draw(tmp_path / kind / f"patient{patient}-{shot}.jpg", colour, patient * 10 + shot)
    return tmp_path


@pytest.fixture
def table(folder: Path) -> Path:
    rows = ["path,label,patient,note"]
    for file in sorted(folder.rglob("*.jpg")):
        rows.append(f"{file.relative_to(folder)},{file.parent.name},{file.name[7]},")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "labels.csv"


@pytest.mark.parametrize("pattern", [r"patient(\d)", r"patient\d"])
def test_a_pattern_names_groups_that_are_drawn_whole(folder: Path, pattern: str) -> None:
    dataset = discover(folder, SplitConfig(0.25, 0, group_by=pattern))
    assert {sample.group for sample in dataset.samples} == (
        {str(n) for n in PATIENTS} if "(" in pattern else {f"patient{n}" for n in PATIENTS}
    )
    train, val = ({sample.group for sample in dataset.of(split)} for split in ("train", "val"))
    assert not train & val and len(val) == 2
    assert dataset.counts("val") == [6, 6]


def test_a_column_names_groups(table: Path) -> None:
    dataset = discover(table, SplitConfig(0.25, 0, group_by="patient"))
    train, val = ({sample.group for sample in dataset.of(split)} for split in ("train", "val"))
    assert not train & val and train | val == {str(n) for n in PATIENTS}
    by_path = discover(table, SplitConfig(0.25, 0, group_by=r"patient(\d)"))
    assert by_path == dataset


@pytest.mark.parametrize("fold", [1, 2, 3, 4])
def test_folds_hold_out_whole_groups(folder: Path, fold: int) -> None:
    dataset = discover(folder, SplitConfig(0.2, 0, group_by=r"patient(\d)", folds=4, fold=fold))
    assert dataset.val_was_drawn and dataset.counts("val") == [6, 6]
    assert {sample.fold for sample in dataset.of("val")} == {fold}
    assert {sample.fold for sample in dataset.of("train")} == {1, 2, 3, 4} - {fold}


def test_every_image_is_held_out_once_also_of_a_given_val(folder: Path, tmp_path: Path) -> None:
    for split, kind in (("val", "sick"), ("val", "well"), ("test", "sick"), ("test", "well")):
        for shot in range(2):
            draw(tmp_path / "parts" / split / kind / f"{split}{shot}.jpg", (1, 2, 3), shot)
    (tmp_path / "parts" / "train").mkdir()
    for kind in ("sick", "well"):
        (folder / kind).rename(tmp_path / "parts" / "train" / kind)
    held: list[str] = []
    for fold in (1, 2, 3):
        dataset = discover(tmp_path / "parts", SplitConfig(0.2, 0, folds=3, fold=fold))
        held += [sample.path for sample in dataset.of("val")]
        assert len(dataset.of("test")) == 4 and {sample.fold for sample in dataset.of("test")} == {0}
    assert len(held) == len(set(held)) == 48 + 4


@pytest.mark.parametrize(
    ("group_by", "said"),
    [
        ("(", "it is not a regular expression"),
        ("(a+)+$", "it repeats a repetition"),
        ("((a+))+$", "it repeats a repetition"),
        ("(a|a)+$", "it repeats a repetition or a choice"),
        ("(a{1,50}){1,50}x", "it repeats a repetition"),
        ("(a?){30}x", "it repeats a repetition"),
        (r"clinic(\d)", "matches none of 48 image paths"),
        ("sick|well", "belong to one group"),
    ],
)
def test_patterns_that_are_refused(folder: Path, group_by: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        discover(folder, SplitConfig(0.2, 0, group_by=group_by))


@pytest.mark.parametrize(("column", "said"), [("pation", "did you mean 'patient'"), ("note", "is empty")])
def test_columns_that_are_refused(table: Path, column: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        discover(table, SplitConfig(0.2, 0, group_by=column))


@pytest.mark.parametrize(("folds", "fold"), [(5, None), (None, 1), (5, 6)])
def test_folds_that_do_not_exist_are_refused(folder: Path, folds: int | None, fold: int | None) -> None:
    with pytest.raises(UsageError):
        discover(folder, SplitConfig(0.2, 0, folds=folds, fold=fold))


def test_more_folds_than_groups_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="only 8 images or groups"):
        discover(folder, SplitConfig(0.2, 0, group_by=r"patient(\d)", folds=9, fold=1))


def test_images_without_a_group_are_reported(folder: Path) -> None:
    draw(folder / "sick" / "other.jpg", (1, 2, 3), 99)
    dataset = discover(folder, SplitConfig(0.25, 0, group_by=r"patient(\d)"))
    assert [issue.code for issue in dataset.issues] == ["group-missing"]
    assert "1 of 49 images" in dataset.warnings[0]


def test_a_hostile_pattern_does_not_hang(folder: Path) -> None:
    with pytest.raises(DataError):  # before it is applied to any path
        discover(folder, SplitConfig(0.25, 0, group_by=r"((\w+)*-)+x"))


@pytest.mark.parametrize(
    "pattern",
    [r"(\d{4}-){2}", r"(\d{1,3}\.){3}", r"(ab)+", r"[^/]+/p(\d+)?_", r"(?:sick|well)/(\w+)", r"\(\w+\)+"],
)
def test_harmless_patterns_are_accepted(pattern: str) -> None:
    assert groups._compile(pattern).pattern == pattern


def test_empty_cells_of_a_column_are_reported(table: Path) -> None:
    rows = table.read_text().splitlines()
    rows[3] = ",".join([*rows[3].split(",")[:2], "", ""])
    table.write_text("\n".join(rows) + "\n")
    dataset = discover(table, SplitConfig(0.25, 0, group_by="patient"))
    assert [issue.code for issue in dataset.issues] == ["group-missing"]
    assert "1 of 48 images" in dataset.warnings[0]


def test_a_column_that_only_faulty_rows_fill_is_not_a_pattern(table: Path) -> None:
    rows = [
        "path,label,sick",
        *(",".join([*row.split(",")[:2], ""]) for row in table.read_text().split()[1:]),
    ]
    table.write_text("\n".join([*rows, "gone.jpg,sick,7"]) + "\n")
    dataset, issues = discover_leniently(table, SplitConfig(0.25, 0, group_by="sick"))
    assert dataset is not None and not any(sample.group for sample in dataset.samples)
    assert {issue.code for issue in issues} == {"row-unusable", "group-missing"}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_a_class_in_one_fold_is_refused_whichever_is_held_out(tmp_path: Path, fold: int) -> None:
    """Both groups of class a are assigned to the same fold."""
    paths = {"a": [f"a/{n}" for n in range(2)], "b": [f"b/{n}" for n in range(30)]}
    own = dict.fromkeys(["a/0", *paths["b"][:10]], "x") | dict.fromkeys(["a/1", *paths["b"][10:20]], "y")
    folds = {**draw_folds(paths, 3, 0, own), "a/0": 2, "a/1": 2}
    assert find_fold_fault(paths, folds, 3) == "fold 2 has every image of class 'a'"
    for name, many in (("a", 2), ("b", 9)):
        for number in range(many):
            draw(tmp_path / name / f"{'x' if name == 'a' else number}_{number}.jpg", (1, 2, 3), number)
    with pytest.raises(DataError, match="belong to one group"):
        discover(tmp_path, SplitConfig(0.2, 0, group_by="(.)_", folds=3, fold=fold))
    dataset, issues = discover_leniently(tmp_path, SplitConfig(0.2, 0, group_by="(.)_", folds=3))
    assert dataset is not None and {"group-single", "fold-empty"} <= {issue.code for issue in issues}
