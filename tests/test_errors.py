"""The text that all messages share."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import MOST_TEXT, FinetuneError, UsageError, count, find_nearest, sanitize, sanitize_line


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


MEGABYTES = {
    "letters": "x" * 10_000_000,
    "control": "\x1b" * 10_000_000,
    "addresses": "http:/" * 1_600_000,
    "user names": "a://" + "b" * 10_000_000,
    "signatures": "?sig" * 2_500_000,
    "half a signature": "?" + "token" * 2_000_000,
    "tokens": "hf_" * 3_300_000,
    "lines": "\n" * 10_000_000,
}


@pytest.mark.parametrize("kind", MEGABYTES)
def test_megabytes_become_a_short_message_at_once(kind: str) -> None:
    text = f"the start {MEGABYTES[kind]} the end"
    began = time.process_time()
    error = UsageError(text, text, text)
    assert time.process_time() - began < 1
    for part in (error.asked, error.found, error.fix):
        assert len(part) <= MOST_TEXT
        assert part.startswith("the start ") and part.endswith(" the end") and " ... " in part


def test_a_long_list_of_issues_stays_whole() -> None:
    issues = "\n".join(f"  line {number}: 'photos/{number}.jpg' does not exist" for number in range(200))
    assert UsageError("recipe", issues, "Correct it.").found == issues


@pytest.mark.parametrize("before", range(-45, 5))
def test_no_part_of_a_secret_stands_beside_a_cut(before: int) -> None:
    """Where the middle is left out, half a token would not be known for one."""
    token = "hf_" + "Secret9" * 5
    for cut in (MOST_TEXT // 2, 2 * MOST_TEXT):
        start = "\x1b " * ((cut + before) // 2)
        assert "Secret" not in sanitize(f"{start}{token}{' y' * 100_000}")
        assert "Secret" not in sanitize(f"{'y ' * 100_000}{token}{start}")


@given(st.text(st.characters(codec=None)), st.integers(0, 30_000))
def test_sanitising_twice_is_sanitising_once(text: str, times: int) -> None:
    once = sanitize(text + times * text[:3])
    assert sanitize(once) == once and len(once) <= MOST_TEXT
    assert "\n" not in sanitize_line(once)
    once.encode()


@pytest.mark.parametrize("kind", FinetuneError.__subclasses__())
def test_every_error_is_short(kind: type[FinetuneError]) -> None:
    error = kind.__new__(kind)  # some are made from other things than the three parts
    FinetuneError.__init__(error, "a" * 10**6, "b" * 10**6, "c" * 10**6)
    assert len(str(error)) <= 3 * MOST_TEXT + 3


def test_megabytes_are_like_no_known_word() -> None:
    began = time.process_time()
    assert find_nearest("resnet50" * 1_000_000, ["resnet50"]) == []
    assert time.process_time() - began < 0.1
