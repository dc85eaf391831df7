"""Labels in a list beside the images are read where that is certain; else the advice names the list."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.errors import DataError


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def found(data: Path) -> Dataset:
    return discover(data, SplitConfig(0.25, 0))


def refused(data: Path) -> DataError:
    with pytest.raises(DataError) as error:
        found(data)
    return error.value


def labels(dataset: Dataset) -> dict[str, str]:
    return {sample.path: dataset.classes[sample.label] for sample in dataset.samples}


NAMES = [f"{n}.jpg" for n in range(8)]


def wanted(folder: str) -> dict[str, str]:
    return {f"{folder}{name}": "xy"[n % 2] for n, name in enumerate(NAMES)}


def rows(folder: str) -> str:
    return "path,label\n" + "".join(f"{path},{label}\n" for path, label in wanted(folder).items())


@pytest.mark.parametrize("folder", ["images/", "photos/", "img/", ""])
def test_a_table_beside_the_images(tmp_path: Path, folder: str) -> None:
    tree(tmp_path, *(folder + name for name in NAMES))
    write(tmp_path, "labels.csv", rows(folder))
    dataset = found(tmp_path)
    assert labels(dataset) == wanted(folder) and dataset.root == tmp_path and dataset.is_folder
    assert dataset.warnings == ("The labels were read from the list 'labels.csv'.",)


def test_a_table_beside_images_in_split_folders(tmp_path: Path) -> None:
    tree(tmp_path, *(f"train/{name}" for name in NAMES), "test/9.jpg")
    write(tmp_path, "labels.csv", rows("train/"))
    assert labels(found(tmp_path)) == wanted("train/")


def test_a_table_does_not_overrule_class_folders(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/{n}.jpg" for name in ("ant", "bee") for n in range(4)))
    write(tmp_path, "labels.csv", rows(""))
    assert found(tmp_path).classes == ("ant", "bee")


def test_a_faulty_table_is_named(tmp_path: Path) -> None:
    tree(tmp_path, *(f"images/{name}" for name in NAMES))
    write(tmp_path, "labels.csv", rows("gone/"))
    error = refused(tmp_path)
    assert error.asked == f"--data {tmp_path}, list 'labels.csv'" and "8 rows cannot be used" in error.found


@pytest.mark.parametrize(
    "lists", [("train.csv", "test.csv"), ("annotations.json",), ("list.txt", "README.txt")]
)
@pytest.mark.parametrize("folder", ["images/", "", "train/"])
def test_lists_that_are_not_read_are_named(tmp_path: Path, lists: tuple[str, ...], folder: str) -> None:
    tree(tmp_path, *(folder + name for name in NAMES))
    for name in lists:
        write(tmp_path, name, "1\n")
    fix = refused(tmp_path).fix
    assert repr(lists[0]) in fix and "README" not in fix and "path,label" in fix


def test_a_table_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in NAMES:
            file.writestr(f"data/images/{name}", name)
        file.writestr("data/labels.csv", rows("images/"))
    assert labels(found(tmp_path / "x.zip")) == wanted("images/")


def zipped(file: Path, *paths: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for path in paths:
            archive.writestr(path, path)


@pytest.mark.parametrize("inside", ["train/", ""])
def test_a_list_beside_archives_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zipped(tmp_path / "data/train.zip", *(inside + name for name in NAMES))
    write(tmp_path / "data", "labels.csv", rows(""))
    assert "unpack the archives; 'labels.csv' beside the archives" in refused(tmp_path / "data").fix


def test_a_split_in_an_archive_that_is_not_read_is_no_missing_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zipped(tmp_path / "data/train.zip", *(f"{c}/{name}" for c in "xy" for name in NAMES))
    (tmp_path / "data/more.zip").touch()
    assert "Beside 'train.zip', these archives are not read: 'more.zip'." in found(tmp_path / "data").warnings
    (tmp_path / "data/val.tar.bz2").touch()
    assert "holds 'val.tar.bz2' beside 'train.zip'" in refused(tmp_path / "data").found
    (tmp_path / "data/train.zip").rename(tmp_path / "data/train.7z")
    assert (
        "Unpack 'more.zip', 'train.7z', 'val.tar.bz2', and give the folder." in refused(tmp_path / "data").fix
    )


def test_archives_in_an_archive_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zipped(tmp_path / "x.zip", "train.zip", "test.zip")
    assert "only .zip (2)" in refused(tmp_path / "x.zip").found
    assert "the archives in it" in refused(tmp_path / "x.zip").fix


# Roboflow


def roboflow(root: Path, split: str, text: str = "") -> None:
    tree(root, *(f"{split}/{name}" for name in NAMES))
    lines = [f"{name}, {1 - n % 2}, {n % 2}" for n, name in enumerate(NAMES)]
    write(root, f"{split}/_classes.csv", text or "\n".join(["filename, x, y", *lines]))


def test_a_table_of_zeros_and_ones_in_each_split(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        roboflow(tmp_path, split)
    dataset = found(tmp_path)
    assert labels(dataset) == {**wanted("train/"), **wanted("valid/"), **wanted("test/")}
    assert [len(dataset.of(split)) for split in ("train", "val", "test")] == [8, 8, 8]
    assert "'train/_classes.csv'" in dataset.warnings[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filename,x,y\n0.jpg,1,1\n1.jpg,0,0\n2.jpg,1,0", "2 images no class or several: '0.jpg', '1.jpg'"),
        ("filename,x,y\n../0.jpg,1,0\n", "1 image that do not exist: 'train/../0.jpg'"),
        ("filename,x,y\n/etc/passwd,1,0\n", "do not exist: 'train//etc/passwd'"),
        ("filename\n0.jpg\n", "no column for a class"),
        (f"filename,x,y\n{'0' * 200_000}.jpg,1,0\n", "is not a table (field larger than field limit"),
        ("filename,x,y\n0.jpg,1\n", "1 image no class or several"),
    ],
)
def test_a_table_of_zeros_and_ones_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    roboflow(tmp_path, "train", text)
    assert said in refused(tmp_path).found


# CUB


def cub(root: Path, **changed: str) -> Path:
    paths = [f"{1 + n % 2:03}.bird/{name}" for n, name in enumerate(NAMES)]
    tree(root, *(f"images/{path}" for path in paths), "attributes/x.txt", "parts/parts.txt")
    texts = {
        "images.txt": "".join(f"{n + 1} {path}\n" for n, path in enumerate(paths)),
        "image_class_labels.txt": "".join(f"{n + 1} {1 + n % 2}\n" for n in range(8)),
        "classes.txt": "1 001.Black_Bird\n2 002.Red Bird\n",
        "train_test_split.txt": "".join(f"{n + 1} {int(n > 1)}\n" for n in range(8)),
    }
    for name, text in {**texts, **changed}.items():
        if text:
            write(root, name, text)
    return root


def test_the_lists_of_cub(tmp_path: Path) -> None:
    dataset = found(cub(tmp_path))
    assert dataset.classes == ("001.Black_Bird", "002.Red Bird")
    assert dataset.counts("test") == [1, 1] and len(dataset.of("train")) + len(dataset.of("val")) == 6
    assert {sample.path for sample in dataset.of("test")} == {
        "images/001.bird/0.jpg",
        "images/002.bird/1.jpg",
    }
    assert "'train_test_split.txt'" in dataset.warnings[0]


def test_the_lists_of_cub_in_a_folder_are_not_lost(tmp_path: Path) -> None:
    data = cub(tmp_path / "CUB_200_2011")
    assert refused(tmp_path).fix == f"Did you mean --data {data}?"


def test_the_lists_of_cub_with_tabs(tmp_path: Path) -> None:
    data = cub(tmp_path)
    for name in ("images.txt", "image_class_labels.txt"):
        (data / name).write_text((data / name).read_text().replace(" ", "\t"))
    assert found(data).classes == ("001.Black_Bird", "002.Red Bird")


def test_the_lists_of_cub_without_names_and_splits(tmp_path: Path) -> None:
    dataset = found(cub(tmp_path, **{"classes.txt": "", "train_test_split.txt": ""}))
    assert dataset.classes == ("1", "2") and not dataset.of("test") and len(dataset.samples) == 8


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("images.txt", "1 ../../etc/passwd\n", "1 image that do not exist: 'images/../../etc/passwd'"),
        ("images.txt", "1\n", "line 1 of 'images.txt' is no pair"),
        ("images.txt", "1 a\n1 b\n", "line 2 of 'images.txt' is no pair"),
        ("image_class_labels.txt", "1 1\n", "the label '' in 'images.txt' is empty"),
        ("classes.txt", "1 a/b\n2 c\n", "the label 'a/b' in 'images.txt' is a path, not a name"),
        ("train_test_split.txt", "1 1\n", "says neither 0 nor 1 of 7 images"),
    ],
)
def test_lists_of_cub_that_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    assert said in refused(cub(tmp_path, **{name: text})).found


def test_a_list_that_leads_out_is_not_read(tmp_path: Path) -> None:
    cub(tmp_path / "data")
    (tmp_path / "data/images.txt").unlink()
    (tmp_path / "data/images.txt").symlink_to("/etc/passwd")
    assert "1 link leads out of the folder: 'images.txt' -> '/etc/passwd'" in refused(tmp_path / "data").found
