"""The text that all messages share."""

from __future__ import annotations

import pytest

from finetune.errors import count


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ("image",), "1 image"),
        (0, ("image",), "0 images"),
        (2000, ("image",), "2,000 images"),
        (1, ("class", "classes"), "1 class"),
        (2, ("image has", "images have"), "2 images have"),
    ],
)
def test_a_number_has_its_noun(number: int, words: tuple[str, ...], text: str) -> None:
    assert count(number, *words) == text
