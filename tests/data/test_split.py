"""The validation part depends on names and seed alone."""

from __future__ import annotations

import random

import pytest

from finetune.data.split import split_off

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
