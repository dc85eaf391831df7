"""Labels of a table: one class, several, or a number; what is read, said and refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.prepare import describe_data
from finetune.data.split import SplitConfig
from finetune.data.tables.config import TableConfig
from finetune.errors import DataError

CONFIG = SplitConfig(0.25, 0)


def read(folder: Path, header: str, cells: list[str], **given: str) -> Dataset:
    """A table with an image a row, and a drawn validation split."""
    for number in range(len(cells)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    rows = [f"{number}.png,{cell}" for number, cell in enumerate(cells)]
    table = folder / "labels.csv"
    table.write_text("\n".join([f"path,{header}", *rows]) + "\n", encoding="utf-8")
    return discover(table, CONFIG, table=TableConfig(**given))  # type: ignore[arg-type]


def labels_of(dataset: Dataset) -> list[str]:
    ordered = sorted(dataset.samples, key=lambda sample: int(sample.path.partition(".")[0]))
    return [dataset.label_of(sample) for sample in ordered]


CELLS = ["cat|dog", "dog", "", "cat", "dog|cat", "bird|cat", "bird", "bird"]
SORTED = ["cat|dog", "dog", "", "cat", "cat|dog", "bird|cat", "bird", "bird"]


@pytest.mark.parametrize("name", ["labels", "tags", "Finding Labels"])
@pytest.mark.parametrize("separator", ["|", ";", " | "])
def test_several_labels_of_a_column_of_several(tmp_path: Path, name: str, separator: str) -> None:
    dataset = read(tmp_path, name, [cell.replace("|", separator) for cell in CELLS])
    assert dataset.target.kind == "multi"
    assert dataset.classes == ("bird", "cat", "dog")
    assert labels_of(dataset) == SORTED
    assert "several labels: 3 classes, 1.2 an image, 1 images with none" in describe_data(dataset)


def test_several_labels_as_a_list(tmp_path: Path) -> None:
    cells = ["\"['dog', 'cat']\"", '"[""bird""]"', "[]", '"[""bird"", ""cat""]"', "['dog']", "['bird']"]
    dataset = read(tmp_path, "labels", [*cells, "['dog']", "['cat']"])
    assert labels_of(dataset)[:5] == ["cat|dog", "bird", "", "bird|cat", "dog"]


def test_a_column_of_zero_and_one_for_each_class(tmp_path: Path) -> None:
    rows = ["1,0,1", "0,0,0", "0,1,0", "1,1,1", "0,0,1", "1,0,0", "0,1,1", "1,1,0"]
    dataset = read(tmp_path, "cat,dog,bird", rows)
    assert dataset.target.kind == "multi"
    assert labels_of(dataset)[:4] == ["bird|cat", "", "dog", "bird|cat|dog"]
    assert dataset.counts("train") != dataset.counts("val")
    total = [a + b for a, b in zip(dataset.counts("train"), dataset.counts("val"), strict=True)]
    assert dict(zip(dataset.classes, total, strict=True)) == {"bird": 4, "cat": 4, "dog": 4}


def test_exactly_one_in_each_row_is_one_class_an_image(tmp_path: Path) -> None:
    dataset = read(tmp_path, "cat,dog", ["1,0", "0,1"] * 4)
    assert dataset.target.kind == "single"
    assert labels_of(dataset) == ["cat", "dog"] * 4
    as_many = read(tmp_path, "cat,dog", ["1,0", "0,1"] * 4, target="multi")
    assert as_many.target.kind == "multi"


def test_numbers_of_a_column_value(tmp_path: Path) -> None:
    dataset = read(tmp_path, "value", [f"{number / 4}" for number in range(12)])
    assert dataset.target.kind == "number"
    assert dataset.classes == ("value",)
    assert labels_of(dataset)[:3] == ["0.0", "0.25", "0.5"]
    assert "a number from 0 to 2.75" in describe_data(dataset)


def test_a_column_is_a_number_where_that_is_asked(tmp_path: Path) -> None:
    grades = ["1", "2", "3", "4"] * 3
    assert read(tmp_path, "grade", grades).target.kind == "single"
    asked = read(tmp_path, "grade", grades, target="number", label_column="grade")
    assert asked.target.kind == "number"


def test_a_separator_in_a_column_of_one_label_is_said(tmp_path: Path) -> None:
    dataset = read(tmp_path, "label", ["cat|dog", "cat|dog", "cat", "cat", "dog", "dog"])
    assert dataset.target.kind == "single"
    assert any("may name several labels" in warning for warning in dataset.warnings)
    asked = read(tmp_path, "label", ["cat|dog", "cat|dog", "cat", "cat", "dog", "dog"], target="multi")
    assert asked.classes == ("cat", "dog")


def test_a_separator_of_ones_own(tmp_path: Path) -> None:
    cells = ["clear primary", "haze", "clear", "haze primary", "clear", "haze", "primary", "primary"]
    dataset = read(tmp_path, "tags", cells, target="multi", label_separator=" ")
    assert dataset.classes == ("clear", "haze", "primary")


@pytest.mark.parametrize(
    ("header", "cells", "given", "said"),
    [
        ("labels", ["a|b", "a;b", "a", "b"], {}, "either may separate labels"),
        ("labels", ["a|b", "[a]", "a", "b"], {}, "not a list"),
        ("labels", ["a;b/c", "a", "b", "a"], {}, "is a path, not a name"),
        ("value", ["1", "2", "x", "4"], {"target": "number"}, "'x' is not a finite number"),
        ("value", ["1", "2", "inf", "4"], {"target": "number"}, "'inf' is not a finite number"),
        ("cat,dog", ["1,0", "1,1", "0,1", "0,0"], {"target": "single"}, "exactly one 1 in each row"),
        ("cat,dog", ["1,0", "1,1", "0,1", "0,0"], {"target": "number"}, "needs one number"),
        ("value", ["2", "2", "2", "2"], {"target": "number"}, "one label in all training images"),
    ],
)
def test_unclear_labels_are_refused(
    tmp_path: Path, header: str, cells: list[str], given: dict[str, str], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, header, cells, **given)


def test_class_folders_give_no_numbers(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(DataError, match="class folders give each image one class"):
        discover(tmp_path, CONFIG, table=TableConfig(target="number"))


def test_a_drawn_split_keeps_every_class_of_several_even(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(8)]
    has = [[(number * 7919 >> k) % (k + 2) == 0 for k in range(8)] for number in range(240)]
    cells = ["|".join(name for name, own in zip(names, row, strict=True) if own) for row in has]
    dataset = read(tmp_path, "labels", cells)
    every, val = Counter[str](), Counter[str]()
    for sample in dataset.samples:
        own = dataset.target.classes_of(dataset.label_of(sample))
        every.update(own)
        val.update(own if sample.split == "val" else ())
    shares = [val[name] / every[name] for name in names]
    assert max(abs(share - 0.25) for share in shares) < 0.06
    assert abs(len(dataset.of("val")) / 240 - 0.25) < 0.05


def test_a_drawn_split_keeps_ranges_of_numbers_even(tmp_path: Path) -> None:
    dataset = read(tmp_path, "value", [f"{number**2}" for number in range(200)])
    val = sorted(float(dataset.label_of(sample)) ** 0.5 for sample in dataset.of("val"))
    for low in range(0, 200, 20):
        assert 3 <= sum(low <= value < low + 20 for value in val) <= 7


def test_a_set_of_classes_that_training_lacks_is_refused(tmp_path: Path) -> None:
    cells = ["a|b,train", "a,train", "b,train", "a|c,val"]
    with pytest.raises(DataError, match="training does not have: 'c'"):
        read(tmp_path, "labels,split", cells)
    fine = read(tmp_path, "labels,split", ["a,train", "b,train", "a,train", "a|b,val"])
    assert fine.classes == ("a", "b")
