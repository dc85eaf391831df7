"""The validation split depends only on names and seed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.data.dataset import Dataset, Sample, sample_order
from finetune.data.split import SplitConfig, draw_folds, find_indivisible, keep_copies_together, split_off
from finetune.errors import DataError

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


# --- Groups, folds and copies ---

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


def test_one_large_group_of_a_class_leaves_the_other_for_validation() -> None:
    paths = {"ant": [f"a/{n}" for n in range(10)], "bee": [f"b/{n}" for n in range(10)]}
    groups = {f"a/{n}": "x" if n < 9 else "y" for n in range(10)}
    taken = split_off(paths, 0.2, 0, groups)
    assert {path for path in taken if path.startswith("a")} == {"a/9"}
    assert find_indivisible(paths, groups) == []
    assert find_indivisible(paths, dict.fromkeys(paths["ant"], "x")) == ["ant"]


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


def drawn(splits: dict[str, str], groups: dict[str, str] | None = None) -> Dataset:
    """``{"ant/0": "train"}``; the class is the folder."""
    classes = tuple(sorted({path.split("/")[0] for path in splits}))
    samples = [
        Sample(path, classes.index(path.split("/")[0]), split, (groups or {}).get(path, ""))  # type: ignore[arg-type]
        for path, split in splits.items()
    ]
    samples.sort(key=sample_order)
    return Dataset(Path("/x"), classes, tuple(samples), val_was_drawn=True)


def splits_of(dataset: Dataset) -> dict[str, str]:
    return {sample.path: sample.split for sample in dataset.samples}


def doubled(number: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Paths of two classes and digests: every image twice."""
    paths = {name: [f"{name}/{n}{copy}" for n in range(number) for copy in "ab"] for name in ("ant", "bee")}
    return paths, {path: path[:-1] for own in paths.values() for path in own}


def splits_for(paths: dict[str, list[str]], taken: set[str]) -> dict[str, str]:
    return {path: "val" if path in taken else "train" for own in paths.values() for path in own}


def test_if_every_image_exists_twice_the_split_keeps_its_size() -> None:
    paths, digests = doubled(100)
    first = drawn(splits_for(paths, split_off(paths, 0.2, 0)))
    dataset, moved = keep_copies_together(first, digests, SplitConfig(0.2, 0))
    assert first.counts("val") == [40, 40] == dataset.counts("val")
    splits: dict[str, set[str]] = {}
    for path, split in splits_of(dataset).items():
        splits.setdefault(digests[path], set()).add(split)
    assert all(len(own) == 1 for own in splits.values())
    assert moved == sum(splits_of(first)[path] != split for path, split in splits_of(dataset).items()) > 0
    assert keep_copies_together(dataset, digests, SplitConfig(0.2, 0)) == (dataset, 0)
    assert [s.path for s in dataset.of("train")] == sorted(s.path for s in dataset.of("train"))


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_without_copies_the_draw_stays_the_same(groups: dict[str, str]) -> None:
    first = drawn(splits_for(PATIENTS, split_off(PATIENTS, 0.25, 0, groups)), groups)
    digests = {path: path for path in splits_of(first)}
    assert keep_copies_together(first, digests, SplitConfig(0.25, 0)) == (first, 0)
    digests |= dict.fromkeys(("ant/p1_0.jpg", "ant/p1_1.jpg"), "same")  # of one group, where there are groups
    again, _ = keep_copies_together(first, digests, SplitConfig(0.25, 0))
    if groups:
        assert again == first
    assert splits_of(again)["ant/p1_0.jpg"] == splits_of(again)["ant/p1_1.jpg"]


def test_a_class_of_copies_only_keeps_its_training_images() -> None:
    splits = {"ant/0": "val", "ant/1": "train", "bee/0": "val", "bee/1": "train"}
    digests = {"ant/0": "same", "ant/1": "same", "bee/0": "b0", "bee/1": "b1"}
    dataset, _ = keep_copies_together(drawn(splits), digests, SplitConfig(0.5, 0))
    assert dataset.counts("train") == [2, 1] and dataset.counts("val") == [0, 1]
    with pytest.raises(DataError, match="none is left for validation"):
        keep_copies_together(
            drawn(splits), digests | dict.fromkeys(("bee/0", "bee/1"), "other"), SplitConfig(0.5, 0)
        )


def test_copies_move_with_their_groups() -> None:
    splits = {f"ant/{n}": "val" if n < 4 else "train" for n in range(10)}
    groups = {"ant/0": "g", "ant/1": "g"}
    digests = {path: path for path in splits} | {"ant/1": "same", "ant/9": "same"}
    dataset, _ = keep_copies_together(drawn(splits, groups), digests, SplitConfig(0.4, 0))
    found = splits_of(dataset)
    assert found["ant/0"] == found["ant/1"] == found["ant/9"] and dataset.counts("val") == [4]


def test_given_test_images_stay_where_they_are() -> None:
    splits = {"ant/0": "test", "ant/1": "val", "ant/2": "train", "ant/3": "train"}
    dataset, moved = keep_copies_together(
        drawn(splits), dict.fromkeys(("ant/0", "ant/2"), "same"), SplitConfig(0.3, 0)
    )
    assert (moved, splits_of(dataset)) == (0, splits)


def test_an_earlier_draw_stays_and_new_copies_join_it() -> None:
    splits = {f"ant/{n}": "val" if n < 4 else "train" for n in range(12)}
    digests = {path: path for path in splits} | {"ant/10": "ant/0", "ant/3": "ant/5", "ant/2": "ant/11"}
    dataset = replace(drawn(splits), settled=frozenset(set(splits) - {"ant/3", "ant/10", "ant/11"}))
    after, moved = keep_copies_together(dataset, digests, SplitConfig(0.4, 0))
    assert moved == 3
    assert splits_of(after) == splits | {"ant/10": "val", "ant/3": "train", "ant/11": "val"}


def dealt(paths: dict[str, list[str]], num_folds: int, held_out: int) -> Dataset:
    folds = draw_folds(paths, num_folds, 0)
    classes = tuple(sorted(paths))
    samples = [
        Sample(path, label, "val" if folds[path] == held_out else "train", "", folds[path])
        for label, name in enumerate(classes)
        for path in sorted(paths[name])
    ]
    samples.sort(key=sample_order)
    return Dataset(Path("/x"), classes, tuple(samples), val_was_drawn=True)


@pytest.mark.parametrize("held_out", [1, 2, 3])
def test_copies_share_a_fold_and_folds_stay_even(held_out: int) -> None:
    paths, digests = doubled(30)
    dataset, _ = keep_copies_together(dealt(paths, 3, held_out), digests, SplitConfig(0.2, 0))
    folds: dict[str, set[int]] = {}
    for sample in dataset.samples:
        folds.setdefault(digests[sample.path], set()).add(sample.fold)
        assert (sample.fold == held_out) == (sample.split == "val")
    assert all(len(own) == 1 for own in folds.values())
    assert dataset.counts("val") == [20, 20]


def test_folds_that_copies_empty_are_refused() -> None:
    paths, digests = doubled(2)
    with pytest.raises(DataError, match="only 2 images or groups"):
        keep_copies_together(
            dealt(paths, 4, 1), {path: digests[path][-1] for path in digests}, SplitConfig(0.2, 0)
        )
    paths, digests = doubled(6)
    same = digests | dict.fromkeys(paths["ant"], "same")
    for held_out in (1, 2, 3):  # whichever fold is held out
        with pytest.raises(DataError, match="has every image of class 'ant'"):
            keep_copies_together(dealt(paths, 3, held_out), same, SplitConfig(0.2, 0))
