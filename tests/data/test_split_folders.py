"""Splits under other names are taken if they can mean nothing else, and refused if they may be classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.inputs import find_labelled
from finetune.data.layouts.split_folders import parse
from finetune.data.split import SplitConfig
from finetune.errors import DataError

CLASSES = ("ant", "bee")


def images(root: Path, *folders: str, classes: tuple[str, ...] = CLASSES, number: int = 4) -> Path:
    for folder in folders:
        for name in classes:
            for n in range(number):
                file = root / folder / name / f"{n}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    return root


def loose(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(4):
            (root / folder / f"{n}.jpg").touch()
    return root


def found(data: Path) -> Dataset:
    return discover(data, SplitConfig(0.25, 0))


def refusal(data: Path) -> str:
    with pytest.raises(DataError) as error:
        found(data)
    return error.value.found


def folders_by_split(dataset: Dataset) -> dict[str, str]:
    """The folder above the class folders, by split."""
    return {sample.split: str(Path(sample.path).parents[1]) for sample in dataset.samples}


TAKEN: tuple[Mapping[str, str], ...] = (
    {"train": "Training", "test": "Testing"},
    {"train": "seg_train", "test": "seg_test"},
    {"train": "training_set", "test": "test_set"},
    {"train": "train_data", "val": "val_data", "test": "test_data"},
    {"train": "Train Images", "test": "Test Images"},
    {"train": "train", "val": "dev"},
    {"train": "train", "val": "eval"},
    {"train": "train", "test": "testing"},
    {"train": "TRAINING", "val": "Validation", "test": "TEST"},
    {"train": "train-images", "val": "valid-images", "test": "test-images"},
    {"train": "TrainSet", "val": "ValSet", "test": "TestSet"},
    {"train": "imgs_train", "val": "imgs_val"},
    {"train": "dataset.train", "test": "dataset.test"},
    {"train": "flowers-train", "val": "flowers-val", "test": "flowers-test"},
    {"train": "train_224", "val": "val_224"},
    {"train": "01_train", "val": "02_val", "test": "03_test"},
    {"train": "ILSVRC2012_img_train", "val": "ILSVRC2012_img_val"},
    {"train": "train.v2", "test": "test.v2"},
    {"train": "train", "val": "eval", "test": "test"},
    {"train": "train", "val": "vali", "test": "tests"},
    {"train": "trainval", "test": "test"},
    {"train": "train+val", "test": "test"},
)


@pytest.mark.parametrize("names", TAKEN, ids=lambda names: "+".join(names.values()))
def test_names_that_can_only_be_splits_are_taken_and_said(tmp_path: Path, names: Mapping[str, str]) -> None:
    dataset = found(images(tmp_path, *names.values()))
    assert dataset.classes == CLASSES
    drawn = {} if "val" in names else {"val": names["train"]}
    assert folders_by_split(dataset) == {**names, **drawn}
    assert dataset.val_was_drawn == bool(drawn)
    said = ", ".join(f"{name!r} as {split}" for split, name in names.items())
    assert dataset.warnings == (f"Folders were read as splits by their names: {said}.",)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "VALID", "Test")])
def test_the_documented_names_need_no_word(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert found(images(tmp_path, *names)).warnings == ()


@pytest.mark.parametrize(
    "names",
    [
        ("cat_train", "cat_test", "dog_train", "dog_test"),  # class and split in one name
        ("train_augmented", "test_plain"),
        ("Training", "Testing", "Training set"),
        ("2019", "2020"),  # both hold the same classes
        ("Trainingsdaten", "Testdaten"),
        ("entrenamiento", "prueba"),
        ("validation_set", "test_set"),
        ("train", "holdout"),
        ("train", "development"),
        ("train", "val", "eval"),
        ("train", "test_small"),
        ("Training", "ant"),
        ("train", "pruebas"),
        ("train", "extra"),
        ("train", "test", "vaild"),
        ("train", "val", "tets"),
        ("train", "test", "cv"),
    ],
    ids="+".join,
)
def test_what_may_be_splits_or_classes_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    said = refusal(images(tmp_path, *names))
    assert any(repr(name) in said for name in names)


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("cat_train", "cat_test"), ("my_train", "my_val")]
)
def test_splits_without_class_folders_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert "look like splits" in refusal(loose(tmp_path, *names))


@pytest.mark.parametrize(
    "names",
    [
        ("train_station", "airport", "bridge"),
        ("Training", "Running", "Swimming"),
        ("negative_test", "positive_test"),
        ("test_tube", "flask"),
        ("dev", "prod"),
        ("trainer", "contest", "evaluate_me"),
        ("latest", "validated"),
        ("bullet train", "steam engine"),
    ],
    ids="+".join,
)
def test_classes_with_such_words_stay_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    dataset = found(loose(tmp_path, *names))
    assert dataset.classes == tuple(sorted(names)) and dataset.warnings == ()


def test_classes_with_folders_of_their_own_stay_classes(tmp_path: Path) -> None:
    images(tmp_path, "ant", classes=("red", "black"))
    images(tmp_path, "bee", classes=("wild", "kept", "red"))
    assert found(tmp_path).classes == CLASSES
    images(tmp_path, "wasp", classes=("red", "black"))
    assert found(tmp_path).num_classes == 3


def test_folders_with_the_same_folders_are_classes_below_train(tmp_path: Path) -> None:
    """The way out that the refusal names."""
    images(tmp_path / "bare", *CLASSES, classes=("left", "right"))
    assert "all hold 'left', 'right'" in refusal(tmp_path / "bare")
    images(tmp_path / "clear/train", *CLASSES, classes=("left", "right"))
    assert found(tmp_path / "clear").classes == CLASSES


@pytest.mark.parametrize(
    "parts", [("train", "val"), ("train", "val", "test"), ("Training", "Testing"), ("train_set", "test_set")]
)
def test_splits_inside_the_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    dataset = found(images(tmp_path, *CLASSES, classes=parts))
    assert dataset.classes == CLASSES
    for sample in dataset.samples:
        name, part, _ = sample.path.split("/")
        assert dataset.classes[sample.label] == name
        word = parse(part)
        assert word is not None and sample.split in (
            {word.split, "val"} if dataset.val_was_drawn else {word.split}
        )
    assert "'ant/" + parts[0] in dataset.warnings[0]


def test_splits_inside_the_classes_with_the_name_of_the_class(tmp_path: Path) -> None:
    for name in CLASSES:
        loose(tmp_path, f"{name}/train_{name}", f"{name}/test_{name}")
    dataset = found(tmp_path)
    assert dataset.classes == CLASSES and dataset.counts("test") == [4, 4]
    assert "'ant/test_ant'" in dataset.warnings[0]


@pytest.mark.parametrize("other", ["more", ""], ids=["a folder", "images"])
def test_splits_in_some_classes_only_are_refused(tmp_path: Path, other: str) -> None:
    images(tmp_path, "ant", classes=("train", "val"))
    loose(tmp_path, f"bee/{other}")
    assert "'ant' hold splits" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train/train", "val/val"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("training_set/training_set", "test_set/test_set"),
        ("train/images", "val/images"),
        ("train/train", "val"),
        ("train/train/train", "valid/validation"),
    ],
)
def test_a_split_packed_in_its_own_folder_is_entered(tmp_path: Path, train: str, val: str) -> None:
    dataset = found(images(tmp_path, train, val))
    assert dataset.classes == CLASSES
    by_split = folders_by_split(dataset)
    assert by_split["train"] == train and val in by_split.values()
    assert repr(train) in dataset.warnings[0] and repr(val) in dataset.warnings[0]


def test_splits_inside_train_are_no_classes(tmp_path: Path) -> None:
    said = refusal(images(tmp_path, "train/train", "train/val", "val"))
    assert said == "the classes in 'train' would be 'train', 'val', which look like splits"


@pytest.mark.parametrize("top", ["", "train"])
@pytest.mark.parametrize("names", [("images", "masks"), ("imgs", "annotations"), ("Images", "Labels")])
def test_images_and_masks_are_no_classes(tmp_path: Path, top: str, names: tuple[str, str]) -> None:
    said = refusal(images(tmp_path, top, classes=names))
    assert "images and their masks or annotations" in said


def test_a_class_that_is_named_train(tmp_path: Path) -> None:
    loose(tmp_path, "bus", "car", "train")
    with pytest.raises(DataError, match="'train' holds images but no class folders") as error:
        found(tmp_path)
    assert (
        "If 'train' is a class, as 'bus', 'car', put them all into one more folder named train."
        in error.value.fix
    )
    loose(tmp_path / "way out/train", "bus", "car", "train")
    assert found(tmp_path / "way out").classes == ("bus", "car", "train")


def test_a_documented_name_comes_first(tmp_path: Path) -> None:
    dataset = found(images(tmp_path, "train", "training_old", "val", "validation_set", "test", "test2"))
    assert folders_by_split(dataset) == {"train": "train", "val": "val", "test": "test"}
    assert "these folders are ignored: 'test2', 'training_old', 'validation_set'" in dataset.warnings[0]


def test_evaluation_reads_the_same_names(tmp_path: Path) -> None:
    data = images(tmp_path, "Training", "Testing")
    assert {s.path.split("/")[0] for s in find_labelled(data, CLASSES).samples} == {"Testing"}
    alone = images(tmp_path / "alone", "Test Images")
    assert len(find_labelled(alone, CLASSES).samples) == 8


@pytest.mark.parametrize(
    ("folders", "inner"),
    [
        (("flowers/train", "flowers/test"), "flowers"),
        (("a b/data/Training", "a b/data/Testing"), "a b/data"),
        (("a/b/c",), "a/b/c"),
        (("photos/ant/train", "photos/bee/train"), "photos"),
    ],
)
def test_the_folder_inside_a_single_one_is_named(
    tmp_path: Path, folders: tuple[str, ...], inner: str
) -> None:
    data = images(tmp_path, *folders)
    with pytest.raises(DataError, match="has only one class") as error:
        found(data)
    assert error.value.fix == f"Did you mean --data {tmp_path}/{inner}?"
    with pytest.raises(DataError) as error:
        find_labelled(data, CLASSES)
    assert error.value.fix == f"Did you mean --data {tmp_path}/{inner}?"


def test_a_single_class_in_a_split_is_no_folder_to_enter(tmp_path: Path) -> None:
    """A flat train/train: --data train would lose val/."""
    loose(tmp_path, "train/train", "val/val")
    with pytest.raises(DataError, match="has only one class") as error:
        found(tmp_path)
    assert "Did you mean" not in error.value.fix


def test_a_validation_folder_without_classes_may_be_left_out(tmp_path: Path) -> None:
    loose(images(tmp_path, "train"), "val")
    with pytest.raises(DataError, match="'val' holds images but no class folders") as error:
        found(tmp_path)
    assert "Or move 'val' away" in error.value.fix


# A test folder without labels


@pytest.mark.parametrize("name", ["test", "Testing", "test_set"])
@pytest.mark.parametrize("inside", ["images", "empty", "empty classes", "one folder", "itself"])
def test_a_test_folder_without_labels_is_left_out(tmp_path: Path, name: str, inside: str) -> None:
    images(tmp_path, "train")
    where = {"one folder": f"{name}/unknown", "itself": f"{name}/{name}"}.get(inside, name)
    (tmp_path / where / ("ant" if inside == "empty classes" else "")).mkdir(parents=True)
    if not inside.startswith("empty"):
        loose(tmp_path, where)
    dataset = found(tmp_path)
    assert {sample.split for sample in dataset.samples} == {"train", "val"} and len(dataset.samples) == 8
    (said,) = [warning for warning in dataset.warnings if "left out" in warning]
    assert (f"`finetune predict RUN {name}/ --output " in said) == (not inside.startswith("empty"))


def test_evaluation_still_needs_the_labels(tmp_path: Path) -> None:
    loose(images(tmp_path, "train"), "test")
    with pytest.raises(DataError, match="'test' holds images but no class folders"):
        find_labelled(tmp_path, CLASSES)


# Hidden and system folders


def test_hidden_images_are_named(tmp_path: Path) -> None:
    images(tmp_path, "", classes=("ant", "bee", ".wasp"))
    loose(tmp_path, "ant/.more", "bee/.kept/deep")
    (tmp_path / ".empty").mkdir()
    (tmp_path / "ant/.0.jpg").touch()
    dataset = found(tmp_path)
    assert dataset.classes == CLASSES and len(dataset.samples) == 8
    said = "'.wasp', 'ant/.0.jpg', 'ant/.more', 'bee/.kept'"
    assert dataset.warnings[-1] == f"Hidden images and hidden folders with images are not read: {said}."


@pytest.mark.parametrize("names", [(".ant", ".bee"), (".ant", "bee")])
def test_hidden_images_are_named_in_refusals(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"no class folders|only one class") as error:
        found(images(tmp_path, "", classes=names))
    assert "Hidden images are not read ('.ant'" in error.value.fix


@pytest.mark.parametrize(
    "name", ["@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", "#recycle", "FOUND.001"]
)
def test_system_folders_are_no_classes(tmp_path: Path, name: str) -> None:
    dataset = found(images(tmp_path, "", classes=(*CLASSES, name)))
    assert dataset.classes == CLASSES and dataset.warnings == ()


# Unicode forms

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    dataset = found(images(tmp_path, "", classes=(COMPOSED, DECOMPOSED, "bee")))
    assert dataset.classes == ("bee", COMPOSED) and len(dataset.samples) == 12
    assert "one class: 'caf\u00e9'" in dataset.warnings[0]


@pytest.mark.parametrize(("train", "val"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_split_in_another_form_is_the_class_of_training(tmp_path: Path, train: str, val: str) -> None:
    images(tmp_path, "train", classes=(train, "bee"))
    images(tmp_path, "val", classes=(val, "bee"))
    dataset = found(tmp_path)
    assert dataset.classes == ("bee", train)
    assert dataset.counts("val") == [4, 4]


def test_a_form_alone_is_kept(tmp_path: Path) -> None:
    dataset = found(images(tmp_path, "", classes=(DECOMPOSED, "bee")))
    assert dataset.classes == ("bee", DECOMPOSED) and dataset.warnings == ()


@pytest.mark.parametrize(("model", "data"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_model_knows_its_class_in_another_form(tmp_path: Path, model: str, data: str) -> None:
    images(tmp_path, "", classes=(data, "bee"))
    assert len(find_labelled(tmp_path, ("bee", model)).samples) == 8
