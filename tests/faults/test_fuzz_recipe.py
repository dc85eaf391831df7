"""Whatever stands in a recipe file or on the command line becomes a recipe or a refusal, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import UsageError
from finetune.recipe import Recipe, flatten, load_recipe, parse_assignments

KEYS = [key for key, _ in flatten(Recipe().to_dict())]


class Mailbox:
    """A file that is written anew for every case, and how the cases ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.ends = path, Counter[str]()

    def load(self, content: str | bytes, overrides: Mapping[str, Any] | None = None) -> Recipe | None:
        """Load a recipe, and hold what must be true of either end."""
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        self.path.write_bytes(raw)
        return self.summarize(str(self.path), overrides)

    def summarize(self, source: str | None, overrides: Mapping[str, Any] | None) -> Recipe | None:
        try:
            recipe = load_recipe(source, overrides)
        except UsageError as error:
            self.ends["refused"] += 1
            check_refusal(error)
            return None
        self.ends["read"] += 1
        self.path.write_bytes(recipe.to_yaml().encode())
        assert load_recipe(str(self.path)) == recipe
        return recipe


def check_refusal(error: UsageError) -> None:
    assert error.found and error.fix
    unseen = [c for c in str(error) if c != "\n" and category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not unseen, str(error)
    assert len(error.found) < 10_000


@pytest.fixture(scope="module")
def mailbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mailbox]:
    return Mailbox(tmp_path_factory.mktemp("recipe") / "mine.yaml")


# --- what is written -----------------------------------------------------------------------------

SCALARS = st.one_of(
    st.sampled_from(
        [
            *(
                "1e999",
                "-1e999",
                ".nan",
                ".inf",
                "-.inf",
                "9" * 90,
                "9" * 5000,
                "0x" + "f" * 90,
                "-0",
                "1_000",
            ),
            *(
                "null",
                "~",
                "true",
                "no",
                "2020-13-45",
                "=",
                "<<",
                "''",
                '"\\ud800"',
                '"\\0"',
                '"\\x1b[31m"',
                "'\u2028'",
            ),
            *(
                "auto",
                "top",
                "sgd",
                "cpu",
                "cuda:0",
                "1",
                "0.5",
                "16",
                "5e-324",
                "1e308",
                "../..",
                "/dev/zero",
            ),
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.text(max_size=12).map(json.dumps),
)
WORDS = st.one_of(
    st.sampled_from([*{part for key in KEYS for part in key.split(".")}, *KEYS, "<<", "null", "1", "?"]),
    st.text(max_size=8),
    st.text(max_size=8).map(json.dumps),
)
MARKS = st.sampled_from(
    [
        "",
        "",
        "",
        "&a ",
        "*a ",
        "!t ",
        "!!int ",
        "!!binary ",
        "!!python/object/apply:os.system ",
        "? ",
        "- ",
        "|\n ",
    ]
)


def flow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Lists and mappings in brackets, which may repeat a key, carry a mark and name themselves."""
    pair = st.tuples(WORDS, inner).map(": ".join)
    return st.tuples(
        MARKS,
        st.one_of(
            st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
            st.lists(pair, max_size=4).map(lambda items: f"{{{', '.join(items)}}}"),
        ),
    ).map("".join)


VALUES = st.recursive(st.tuples(MARKS, SCALARS).map("".join), flow, max_leaves=8)
DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from(["", "", "  ", "\t", "---\n", "...\n", "%YAML 1.1\n", "# ", "- "]),
        WORDS,
        st.sampled_from([": ", ":", ":\n  ", ":\r\n", " "]),
        VALUES,
    ).map("".join),
    max_size=6,
).map("\n".join)
DEEP = st.builds(
    lambda open_, times, close: open_ * times + close * times,
    st.sampled_from(["[", "{a: ", "- ", "? ", "a:\n ", "[{x: ", "!t [", "&a ["]),
    st.integers(0, 3000),
    st.sampled_from(["", "]", "}", "}]"]),
)

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 2**63 - 1]),
    st.floats(),
    st.text(st.characters(codec=None), max_size=12),
)
OVERRIDES = st.dictionaries(
    st.one_of(st.sampled_from([*KEYS, "training", "input", ".", "training."]), st.text(max_size=12)),
    st.recursive(
        PLAIN,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=4,
    ),
    max_size=3,
)


def changed(key: str, new: str, value: str) -> str:
    """A complete recipe in which one key has another name or value."""
    sections: dict[str, list[str]] = {"": []}
    for each, default in flatten(Recipe().to_dict()):
        section, _, name = each.rpartition(".")
        text = value if each == key else json.dumps(default)
        sections.setdefault(section, []).append(f"{new if each == key else name}: {text}")
    lines = list(sections.pop(""))
    for section, inner in sections.items():
        lines += [f"{section}:", *(f"  {line}" for line in inner)]
    return "\n".join(lines)


# --- the cases -----------------------------------------------------------------------------------


@given(st.one_of(st.text(), st.text(st.characters(codec=None)), st.text(" \n-:[]{}&*!|>'\"%@`#,?a1.~\t")))
def test_any_text(mailbox: Mailbox, text: str) -> None:
    mailbox.load(text)


@given(st.one_of(st.binary(), st.binary().map(lambda raw: b"training:\n  lr: " + raw)))
def test_any_bytes(mailbox: Mailbox, raw: bytes) -> None:
    mailbox.load(raw)


@pytest.mark.slow
@given(st.one_of(DOCUMENTS, DEEP), st.one_of(st.just({}), OVERRIDES))
def test_what_looks_like_yaml(mailbox: Mailbox, text: str, overrides: dict[str, Any]) -> None:
    mailbox.load(text, overrides)


@given(OVERRIDES)
def test_any_overrides(mailbox: Mailbox, overrides: dict[str, Any]) -> None:
    mailbox.summarize(None, overrides)


@pytest.mark.slow
@given(st.sampled_from(KEYS), st.data())
def test_a_recipe_with_one_change(mailbox: Mailbox, key: str, data: st.DataObject) -> None:
    name = key.rpartition(".")[2]
    new = data.draw(st.one_of(st.just(name), WORDS))
    mailbox.load(changed(key, new, data.draw(VALUES) if new == name else "1"))


@given(
    st.lists(
        st.one_of(st.text(), st.tuples(st.sampled_from(KEYS), st.just("="), VALUES).map("".join)), max_size=3
    )
)
def test_any_assignments(mailbox: Mailbox, words: list[str]) -> None:
    try:
        overrides = parse_assignments(words)
    except UsageError as error:
        check_refusal(error)
    else:
        mailbox.summarize(None, overrides)


@pytest.mark.slow
@given(
    st.sampled_from(["data.path", "backbone.name", "backbone.weights"]), st.text(st.characters(codec=None))
)
def test_any_path_comes_back(mailbox: Mailbox, key: str, path: str) -> None:
    recipe = mailbox.summarize(None, {key: path})
    assert recipe is not None
    assert dict(flatten(recipe.to_dict()))[key] == path


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_name_of_a_recipe(mailbox: Mailbox, name: str) -> None:
    mailbox.summarize(name, None)


def test_the_cases_reach_both_ends(tmp_path: Path) -> None:
    """An unchanged recipe is read; what ``changed`` makes differs from it in one place only."""
    mailbox = Mailbox(tmp_path / "mine.yaml")
    assert mailbox.load(changed("seed", "seed", "0")) == Recipe()
    assert mailbox.load(changed("training.lr", "lr", "0.5")) == load_recipe(None, {"training.lr": 0.5})
    assert mailbox.load(changed("training.lr", "lrr", "0.5")) is None
    assert mailbox.ends == {"read": 2, "refused": 1}
