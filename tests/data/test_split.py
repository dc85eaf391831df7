"""The validation part depends on names and seed alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from finetune.data.sample import SPLITS, Dataset, Sample
from finetune.data.split import draw_folds, find_undividable, keep_copies_together, split_off

CLASSES = {"ant": [f"ant/{n}.jpg" for n in range(40)], "bee": [f"bee/{n}.jpg" for n in range(10)]}


def test_takes_the_fraction_of_each_class() -> None:
    taken = split_off(CLASSES, 0.2, seed=0)
    assert sorted(path.split("/")[0] for path in taken) == ["ant"] * 8 + ["bee"] * 2


def test_order_of_files_and_classes_does_not_matter() -> None:
    rng = random.Random(1)
    shuffled = {name: rng.sample(CLASSES[name], len(CLASSES[name])) for name in reversed(CLASSES)}
    assert split_off(shuffled, 0.3, seed=7) == split_off(CLASSES, 0.3, seed=7)


def test_pinned_so_that_no_release_moves_images_across() -> None:
    assert split_off({"bee": CLASSES["bee"]}, 0.2, seed=0) == {"bee/4.jpg", "bee/5.jpg"}


def test_another_seed_gives_another_choice() -> None:
    assert split_off(CLASSES, 0.2, seed=0) != split_off(CLASSES, 0.2, seed=1)


def test_one_class_does_not_depend_on_the_others() -> None:
    alone = split_off({"bee": CLASSES["bee"]}, 0.2, seed=3)
    assert alone == {path for path in split_off(CLASSES, 0.2, seed=3) if path.startswith("bee")}


def test_an_added_image_moves_at_most_one_other() -> None:
    before = split_off({"ant": CLASSES["ant"]}, 0.25, seed=0)
    after = split_off({"ant": [*CLASSES["ant"], "ant/new.jpg"]}, 0.25, seed=0)
    assert len(before - after) <= 1


@pytest.mark.parametrize(
    ("images", "fraction", "taken"),
    [
        (2, 0.01, 1),
        (2, 0.99, 1),
        (10, 0.01, 1),
        (10, 0.99, 9),
        (10, 0.25, 2),
        (10, 0.26, 3),
        (1, 0.5, 0),
        (0, 0.5, 0),
    ],
)
def test_at_least_one_is_taken_and_one_is_left(images: int, fraction: float, taken: int) -> None:
    assert len(split_off({"x": [f"{n}.jpg" for n in range(images)]}, fraction, seed=0)) == taken


# --- groups, folds and copies --------------------------------------------------------------------

PATIENTS = {
    name: [f"{name}/p{patient}_{shot}.jpg" for patient in range(20) for shot in range(1 + patient % 5)]
    for name in ("ant", "bee")
}
GROUPS = {path: path.split("/")[1].split("_")[0] for paths in PATIENTS.values() for path in paths}


def test_groups_stay_whole_and_classes_even() -> None:
    taken = split_off(PATIENTS, 0.25, 0, GROUPS)
    for group in set(GROUPS.values()):
        assert len({path in taken for path, own in GROUPS.items() if own == group}) == 1
    for name, paths in PATIENTS.items():
        share = sum(path.startswith(name) for path in taken) / len(paths)
        assert 0.2 <= share <= 0.3
    assert taken == split_off({n: PATIENTS[n][::-1] for n in ("bee", "ant")}, 0.25, 0, GROUPS)


def test_one_large_group_of_a_class_leaves_the_other_to_judge() -> None:
    paths = {"ant": [f"a/{n}" for n in range(10)], "bee": [f"b/{n}" for n in range(10)]}
    groups = {f"a/{n}": "x" if n < 9 else "y" for n in range(10)}
    taken = split_off(paths, 0.2, 0, groups)
    assert {path for path in taken if path.startswith("a")} == {"a/9"}
    assert find_undividable(paths, groups) == []
    assert find_undividable(paths, dict.fromkeys(paths["ant"], "x")) == ["ant"]


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_folds_are_even_and_groups_whole(num_folds: int) -> None:
    folds = draw_folds(PATIENTS, num_folds, 0, GROUPS)
    assert set(folds.values()) == set(range(1, num_folds + 1))
    assert all(len({folds[p] for p, own in GROUPS.items() if own == group}) == 1 for group in GROUPS.values())
    for paths in PATIENTS.values():
        counts = [sum(folds[path] == fold for path in paths) for fold in range(1, num_folds + 1)]
        assert max(counts) - min(counts) <= 6  # a group has up to five images of a class
    alone = draw_folds(CLASSES, num_folds, 0)
    for paths in CLASSES.values():
        counts = [sum(alone[path] == fold for path in paths) for fold in range(1, num_folds + 1)]
        assert max(counts) - min(counts) <= 1
    assert alone == draw_folds({n: CLASSES[n][::-1] for n in ("bee", "ant")}, num_folds, 0)


def drawn(parts: dict[str, str], groups: dict[str, str] | None = None) -> Dataset:
    """``{"ant/0": "train"}``; the class is the folder."""
    classes = tuple(sorted({path.split("/")[0] for path in parts}))
    samples = [
        Sample(path, classes.index(path.split("/")[0]), part, (groups or {}).get(path, ""))  # type: ignore[arg-type]
        for path, part in parts.items()
    ]
    samples.sort(key=lambda one: (SPLITS.index(one.split), one.path))
    return Dataset(Path("/x"), classes, tuple(samples), val_was_drawn=True)


def parts_of(dataset: Dataset) -> dict[str, str]:
    return {sample.path: sample.split for sample in dataset.samples}


def test_copies_go_back_to_training() -> None:
    parts = {f"{name}/{n}": "val" if n < 3 else "train" for name in ("ant", "bee") for n in range(10)}
    digests = {path: path for path in parts} | {"ant/0": "same", "ant/5": "same", "bee/7": "same"}
    dataset, moved = keep_copies_together(drawn(parts), digests, 0)
    assert moved == 1
    assert parts_of(dataset) == parts | {"ant/0": "train"}
    assert keep_copies_together(dataset, digests, 0) == (dataset, 0)
    assert [s.path for s in dataset.samples if s.split == "train"] == sorted(dataset_paths(dataset, "train"))


def dataset_paths(dataset: Dataset, part: str) -> list[str]:
    return [sample.path for sample in dataset.samples if sample.split == part]


def test_a_class_keeps_something_to_be_judged_by() -> None:
    parts = {"ant/0": "val", **{f"ant/{n}": "train" for n in range(1, 5)}}
    parts |= {"bee/0": "val", "bee/1": "train", "bee/2": "train"}
    digests = {path: path for path in parts} | {"ant/0": "same", "ant/1": "same"}
    dataset, moved = keep_copies_together(drawn(parts), digests, 0)
    assert moved == 2
    assert dataset.counts("val") == [1, 1] and dataset.counts("train") == [4, 2]
    assert {parts_of(dataset)[path] for path in ("ant/0", "ant/1")} == {"train"}


def test_a_class_of_nothing_but_copies_keeps_its_training_images() -> None:
    parts = {"ant/0": "val", "ant/1": "train", "bee/0": "val", "bee/1": "train"}
    digests = {"ant/0": "same", "ant/1": "same", "bee/0": "b0", "bee/1": "b1"}
    dataset, _ = keep_copies_together(drawn(parts), digests, 0)
    assert dataset.counts("train") == [2, 1] and dataset.counts("val") == [0, 1]


def test_copies_take_their_groups_along() -> None:
    parts = {f"ant/{n}": "val" if n < 4 else "train" for n in range(10)}
    groups = {"ant/0": "g", "ant/1": "g"}
    digests = {path: path for path in parts} | {"ant/1": "same", "ant/9": "same"}
    dataset, moved = keep_copies_together(drawn(parts, groups), digests, 0)
    assert moved == 2 and parts_of(dataset)["ant/0"] == parts_of(dataset)["ant/1"] == "train"


def test_given_test_images_stay_where_they_are() -> None:
    parts = {"ant/0": "test", "ant/1": "val", "ant/2": "train", "ant/3": "train"}
    dataset, moved = keep_copies_together(drawn(parts), dict.fromkeys(("ant/0", "ant/2"), "same"), 0)
    assert (moved, parts_of(dataset)) == (0, parts)


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_copies_share_a_fold(fold: int) -> None:
    folds = draw_folds(CLASSES, 3, 0)
    digests = {path: path for path in folds} | dict.fromkeys(CLASSES["bee"][:4], "same")
    samples = [
        Sample(path, 0, "val" if own == fold else "train", "", own) for path, own in sorted(folds.items())
    ]
    samples.sort(key=lambda one: (SPLITS.index(one.split), one.path))
    dataset, _ = keep_copies_together(Dataset(Path("/x"), ("all",), tuple(samples)), digests, 0)
    found = {sample.path: sample.fold for sample in dataset.samples}
    assert {found[path] for path in CLASSES["bee"][:4]} == {folds["bee/0.jpg"]}
    assert all((sample.fold == fold) == (sample.split == "val") for sample in dataset.samples)
    assert len(found) == len(folds)
