"""The recipe: what is read, every kind of mistake and its sentence, and what "auto" becomes."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

import pretrained.catalog
from finetune.errors import UsageError
from finetune.recipe import (
    LANGUAGE_SERVER_LINE,
    AutoValues,
    HeadChoice,
    Precision,
    Recipe,
    build_schema,
    changed_keys,
    compute_batch_size,
    find_recipe,
    flatten,
    load_recipe,
    merge_override,
    parse_assignments,
    read_recipe,
    resolve_recipe,
    shipped_recipes,
)
from finetune.recipe.flags import build_recipe
from finetune.recipe.mistakes import list_fields
from finetune.recipe.reading import set_dotted
from finetune.system import device as runtime
from tests.conftest import Cli

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a recipe from its text: ``load("seed: 1", {"training.lr": 0.1})``."""

    def load_text(text: str | bytes, overrides: Mapping[str, Any] | None = None) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(str(path), overrides)

    return load_text


@pytest.fixture
def mistake(load: Load, tmp_path: Path) -> Callable[..., str]:
    """Load a recipe that must be refused, and return what was found."""

    def refuse(text: str | bytes, overrides: Mapping[str, Any] | None = None) -> str:
        with pytest.raises(UsageError) as refusal:
            load(text, overrides)
        assert str(tmp_path / "mine.yaml") in refusal.value.asked
        assert refusal.value.fix.endswith(".")
        return refusal.value.found

    return refuse


# --- the sentences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # a key that is not there, and the right one
        (
            "training: {epoch: 3}",
            "there is no `training.epoch`; did you mean `training.epochs` or `training.keep_epochs`?",
        ),
        ("training: {learning_rate: 1}", "there is no `training.learning_rate`; did you mean `training.lr`?"),
        ("training: {learningRate: 1}", "there is no `training.learningRate`; did you mean `training.lr`?"),
        (
            "training: {batch-size: 1}",
            "there is no `training.batch-size`; did you mean `training.batch_size`?",
        ),
        ("training: {EPOCHS: 1}", "there is no `training.EPOCHS`; did you mean `training.epochs`?"),
        (
            "EPOCH: 1",
            "there is no `EPOCH`; did you mean `training.epochs` or `training.keep_epochs`?",
        ),
        ("model: resnet50", "there is no `model`; did you mean `backbone.name`?"),
        ("training: {amp: true}", "there is no `training.amp`; did you mean `training.precision`?"),
        ("data: {num_workers: 2}", "there is no `data.num_workers`; did you mean `data.workers`?"),
        (
            "training: {lr: 1, drop_rate: 0}",
            "there is no `training.drop_rate`; did you mean `strategy.dropout`?",
        ),
        ("epochs: 3", "there is no `epochs`; did you mean `training.epochs`?"),
        ("name: x", "there is no `name`; did you mean `backbone.name` or `strategy.name`?"),
        ("strategy: {lr: 1}", "there is no `strategy.lr`; did you mean `training.lr`?"),
        ("strategy: {nam: top}", "there is no `strategy.nam`; did you mean `strategy.name`?"),
        ("trainig: {lr: 1}", "there is no `trainig`; did you mean `training` or `tracking`?"),
        ("training.lr: 1", "there is no `training.lr`; write `lr` inside `training`"),
        ("training: {xyzzy: 1}", "there is no `training.xyzzy`"),
        ("1: 2", "there is no `1`"),
        ("null: 2", "there is no `null`"),
        ('"a\\e[31m": 2', r"there is no `'a\x1b[31m'`"),
        ('"\\uD83D\\uDE00": 2', r"there is no `'\ud83d\ude00'`"),
        (
            'seed: {"\\ud83d": 1}',
            "`seed` is {'\\ud83d': 1}; it must be a whole number of at least 0 and below 9223372036854775808",
        ),
        ('training: {"\\udcff": 2}', r"there is no `'training.\udcff'`"),
        # a section that is none
        ("strategy: freeze", "`strategy` is a section, not a value"),
        ("strategy: [freeze]", "`strategy` is a section, not a value"),
        # a value of the wrong kind
        ("training: {epochs: ten}", "`training.epochs` is 'ten'; it must be a whole number of at least 1"),
        ("training: {epochs: 1.5}", "`training.epochs` is 1.5; it must be a whole number of at least 1"),
        ("training: {epochs: true}", "`training.epochs` is true; it must be a whole number of at least 1"),
        ("training: {epochs: null}", "`training.epochs` is null; it must be a whole number of at least 1"),
        ("training: {epochs: '3'}", "`training.epochs` is '3'; it must be a whole number of at least 1"),
        ("training: {lr: {a: 1}}", "`training.lr` is {'a': 1}; it must be a number above 0 or auto"),
        ("data: {path: 3}", "`data.path` is 3; it must be text or null"),
        ("backbone: {offline: no}", "`backbone.offline` is 'no'; it must be true or false"),
        ("training: {channels_last: 1}", "`training.channels_last` is 1; it must be true, false or auto"),
        (
            "input: {mean: 1}",
            "`input.mean` is 1; it must be "
            "a list of numbers of at least -1000000 and at most 1000000 or auto",
        ),
        (
            "input: {mean: [a, 1, 2]}",
            "`input.mean` is ['a', 1, 2]; it must be "
            "a list of numbers of at least -1000000 and at most 1000000 or auto",
        ),
        (
            "input: {std: [0, 1, 1]}",
            "`input.std` is [0, 1, 1]; it must be "
            "a list of numbers of at least 1e-06 and at most 1000000 or auto",
        ),
        (
            "seed: null",
            "`seed` is null; it must be a whole number of at least 0 and below 9223372036854775808",
        ),
        # a value out of bounds
        ("training: {lr: 0}", "`training.lr` is 0; it must be a number above 0 or auto"),
        ("training: {lr: .nan}", "`training.lr` is nan; it must be a number above 0 or auto"),
        ("training: {lr: 1e999}", "`training.lr` is inf; it must be a number above 0 or auto"),
        ("training: {clip_grad: -1}", "`training.clip_grad` is -1; it must be a number above 0 or null"),
        ("data: {val_fraction: 1}", "`data.val_fraction` is 1; it must be a number above 0 and below 1"),
        (
            "data: {val_fraction: auto}",
            "`data.val_fraction` is 'auto'; it must be a number above 0 and below 1",
        ),
        (
            "input: {img_size: 8}",
            "`input.img_size` is 8; it must be a whole number of at least 16 and at most 4096, two "
            "whole numbers of at least 16 and at most 4096 or auto",
        ),
        (
            "training: {milestones: [100, 150]}",
            "`training.milestones` is [100, 150]; it must be a list of ascending numbers above 0 and below 1",
        ),
        (
            "training: {milestones: [0.5, 0.5]}",
            "`training.milestones` is [0.5, 0.5]; it must be a list of ascending numbers above 0 and below 1",
        ),
        (
            "training: {milestones: [0.7, 0.5]}",
            "`training.milestones` is [0.7, 0.5]; it must be a list of ascending numbers above 0 and below 1",
        ),
        (
            "training: {keep_epochs: [0]}",
            "`training.keep_epochs` is [0]; it must be a list of whole numbers of at least 1",
        ),
        # a word that is no choice
        (
            "training: {optimizer: sdg}",
            "`training.optimizer` is 'sdg'; it must be sgd or adamw; did you mean 'sgd'?",
        ),
        (
            "training: {monitor: los}",
            "`training.monitor` is 'los'; it must be score, loss or last; did you mean 'loss'?",
        ),
        # not a recipe
        ("- a\n- b", "it is not a mapping of sections"),
        ("7", "it is not a mapping of sections"),
        # not YAML, or more than a recipe needs
        ("training: {lr: 1\n", "its YAML is refused: line 2: expected ',' or '}', but got '<stream end>'"),
        (
            "training:\n\tlr: 3",
            "its YAML is refused: line 2: found character '\\t' that cannot start any token",
        ),
        ("training:\n  lr: 1\n  lr: 1\n", "its YAML is refused: line 3: the key 'lr' is given twice"),
        ("seed: 1\ndata:\nseed: 2\n", "its YAML is refused: line 3: the key 'seed' is given twice"),
        ("[1, 2]: 3", "its YAML is refused: line 1: a key must be a word"),
        ("seed: 1\n---\nseed: 2", "its YAML is refused: line 2: a second document begins; a recipe is one"),
        ("seed: !!int x", "its YAML is refused: line 1: tags (`!name`) have no place in a recipe"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "its YAML is refused: line 1: tags (`!name`) have no place in a recipe",
        ),
        ("data: &d\n  path: *d", "its YAML is refused: line 1: anchors (`&name`) have no place in a recipe"),
        ("seed: *x", "its YAML is refused: line 1: aliases (`*name`) have no place in a recipe"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"#" * 70_000, "it is larger than 65,536 bytes, and no recipe"),
    ],
)
def test_what_is_said_of_a_mistake(mistake: Callable[..., str], text: str | bytes, found: str) -> None:
    assert mistake(text) == found


def test_all_mistakes_are_told_at_once(mistake: Callable[..., str]) -> None:
    text = "training:\n  epochs: 0\n  lr: fast\n  learning_rate: 1\nstrategy: freeze\nseeds: 1\n"
    assert mistake(text, {"data.workers": -1}).splitlines() == [
        "6 mistakes",
        "  - `data.workers` is -1; it must be a whole number of at least 0 or auto",
        "  - `strategy` is a section, not a value",
        "  - `training.epochs` is 0; it must be a whole number of at least 1",
        "  - `training.lr` is 'fast'; it must be a number above 0 or auto",
        "  - there is no `training.learning_rate`; did you mean `training.lr`?",
        "  - there is no `seeds`; did you mean `seed`?",
    ]


def test_a_long_value_is_shortened(mistake: Callable[..., str]) -> None:
    assert len(mistake(f"seed: {'9' * 5000}\n{'k' * 5000}: 1")) < 500


def test_a_number_that_python_does_not_print() -> None:
    with pytest.raises(UsageError, match="`seed` is a number of thousands of digits; it must be a whole"):
        load_recipe(None, {"seed": 10**5000})


def test_a_byte_on_the_command_line_that_is_no_text() -> None:
    with pytest.raises(UsageError, match=r"there is no `'\\udcff'`"):
        load_recipe(None, {"\udcff": 1})


def test_a_mistake_without_a_file_and_the_way_out() -> None:
    with pytest.raises(UsageError) as refusal:
        load_recipe(None, {"training.epochs": 0})
    assert str(refusal.value) == (
        "recipe: `training.epochs` is 0; it must be a whole number of at least 1\n"
        "Correct it; docs/recipe.md describes every key."
    )


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError) as refusal:
        load_recipe("topp")
    assert refusal.value.message == (
        "--recipe topp: no such file, and no shipped recipe of that name; did you mean 'top'?"
    )
    assert refusal.value.fix == f"Shipped recipes: {', '.join(shipped_recipes())}."


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a folder\nName a YAML file"):
        load_recipe(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    with pytest.raises(UsageError, match=re.escape(f"--recipe {tmp_path / 'recipe.yaml'}")):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "/dev/zero"])
def test_a_name_that_cannot_be_a_recipe(name: str) -> None:
    with pytest.raises(UsageError):
        load_recipe(name)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null", "training:\n", "\ufeff", "{}"])
def test_nothing_means_the_defaults(load: Load, text: str) -> None:
    assert load(text) == Recipe() == load_recipe()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        ("1", 1.0),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("0x10", 16.0),
        ("0o17", 15.0),
        ("auto", "auto"),
        ('"auto"', "auto"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(load: Load, text: str, value: object) -> None:
    rate = load(f"training:\n  lr: {text}\n").training.lr
    assert rate == value and type(rate) is type(value)


@pytest.mark.parametrize(
    "text", ["no", "off", "yes", "y", "2024-05-01", "1:30", "1_000", "nul", "0x", "1e", "=", "<<"]
)
def test_what_yaml_1_1_would_turn_into_something_else_is_text(load: Load, text: str) -> None:
    assert load(f"data:\n  path: {text}\n").data.path == text
    assert parse_assignments([f"data.path={text}"]) == {"data.path": text}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("TRUE", True)])
def test_truth_values(load: Load, text: str, value: bool) -> None:
    assert load(f"backbone: {{offline: {text}}}").backbone.offline is value


def test_windows_line_ends_and_a_byte_order_mark(load: Load) -> None:
    assert load(b"\xef\xbb\xbfseed: 3\r\ntraining:\r\n  epochs: 4\r\n") == load(
        "seed: 3\ntraining: {epochs: 4}"
    )


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().training.epochs = 3  # type: ignore[misc]


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_beat_the_file_and_leave_the_rest(load: Load) -> None:
    recipe = load(
        "training: {lr: 0.1, epochs: 3}\nseed: 1", {"training.lr": 0.2, "data.path": "x", "seed": 2}
    )
    assert [change.line for change in changed_keys(Recipe(), recipe)] == [
        "data.path: None -> 'x'",
        "training.epochs: 10 -> 3",
        "training.lr: 'auto' -> 0.2",
        "seed: 0 -> 2",
    ]


def test_an_override_of_a_whole_section_leaves_its_other_keys(load: Load) -> None:
    training = load("training: {lr: 0.1, epochs: 3}", {"training": {"epochs": 4}}).training
    assert (training.lr, training.epochs) == (0.1, 4)


def test_an_override_does_not_hide_a_mistake_of_the_file(mistake: Callable[..., str]) -> None:
    assert mistake("training: fast", {"training.lr": 0.1}) == "`training` is a section, not a value"


@pytest.mark.parametrize(
    "key", ["a", "a.b", "training.lr.x", ".", "..", "training.", ".lr", "a." * 5000 + "a"]
)
def test_an_override_of_no_key(key: str) -> None:
    with pytest.raises(UsageError, match="there is no `"):
        load_recipe(None, {key: 1})


def test_assignments() -> None:
    words = ["training.lr=1e-3", " seed = 4", "data.path=a=b #c: *d", "input.mean=[0, .5, 1]", "data.x="]
    assert parse_assignments(words) == {
        "training.lr": 0.001,
        "seed": 4,
        "data.path": "a=b #c: *d",
        "input.mean": [0, 0.5, 1],
        "data.x": None,
    }
    assert parse_assignments(['data.path="3"', "training.lr='auto'"]) == {
        "data.path": "3",
        "training.lr": "auto",
    }


@pytest.mark.parametrize("word", ["training.lr", "", "=3", " =3", "training.lr 3"])
def test_an_assignment_without_a_key_or_a_value(word: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_assignments([word])
    assert str(refusal.value) == f"--set {word}: there is no `=`\nWrite --set section.key=value."


@pytest.mark.parametrize("value", ["[1, 2", '"a', "[" * 3000, "[*a]", "[!!int x]"])
def test_an_assignment_that_does_not_end(value: str) -> None:
    with pytest.raises(UsageError, match="the value is not valid YAML: line 1"):
        parse_assignments([f"input.mean={value}"])


def test_the_same_key_twice() -> None:
    with pytest.raises(UsageError) as refusal:
        parse_assignments(["training.lr=0.1", "training.lr=0.2"])
    assert str(refusal.value) == "training.lr=0.2: training.lr=0.1 was given as well\nGive it once."
    assert parse_assignments(["training.lr=0.1", "training.lr=1e-1"]) == {"training.lr": 0.1}
    values = {"seed": 1}
    merge_override(values, "seed", 1)
    with pytest.raises(UsageError):
        merge_override(values, "seed", 2)
    assert values == {"seed": 1}


# --- every key, from its declaration -------------------------------------------------------------


def _declarations() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every dotted key with the branches of its JSON schema, which pydantic makes without our words."""
    schema = Recipe.model_json_schema()
    for name, part in schema["properties"].items():
        if "$ref" in part:
            inner = schema["$defs"][part["$ref"].rpartition("/")[2]]["properties"]
            yield from ((f"{name}.{key}", value.get("anyOf", [value])) for key, value in inner.items())
        else:
            yield name, part.get("anyOf", [part])


def _wrong_values() -> Iterator[tuple[str, Any]]:
    """For every key: a value of every kind that it does not take, and one beyond each bound."""
    samples = {
        "boolean": True,
        "integer": 7,
        "number": 0.5,
        "string": "no such word",
        "null": None,
        "array": [1, 2],
        "object": {"a": 1},
    }
    for key, branches in _declarations():
        kinds = {branch.get("type", "string") for branch in branches}
        free_text = any(
            branch.get("type") == "string" and not {"enum", "const"} & set(branch) for branch in branches
        )
        taken = (kinds - {"string"}) | ({"string"} if free_text else set()) - {"array"}
        if "number" in kinds:
            taken |= {"integer"}
        items = {branch.get("items", {}).get("type") for branch in branches}
        taken -= {"array"}
        if items & {"integer", "number"}:
            yield key, ["no such word"]
            taken |= {"array"}
        if "integer" in items:
            yield key, [0]  # whole numbers, from 1
        yield from ((key, value) for kind, value in samples.items() if kind not in taken)
        for branch in branches:
            step = 1 if branch.get("type") == "integer" else 1e-9
            if "number" in kinds:
                yield from ((key, value) for value in (float("nan"), float("inf"), float("-inf")))
            for bound, sign in (("minimum", -step), ("maximum", step)):
                if bound in branch:
                    yield key, branch[bound] + sign
                if f"exclusive{bound.title()}" in branch:
                    yield key, branch[f"exclusive{bound.title()}"]


WRONG = list(_wrong_values())


def test_the_sweep_reaches_every_key() -> None:
    keys = [key for key, _ in flatten(Recipe().to_dict())]
    assert sorted({key for key, _ in WRONG}) == sorted(keys) == sorted(key for key, _ in list_fields())
    assert len(WRONG) > 5 * len(keys)


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda part: str(part)[:30])
def test_a_wrong_value_of_every_kind_for_every_key(key: str, value: Any) -> None:
    overrides = {key: value}
    with pytest.raises(UsageError) as refusal:
        load_recipe(None, overrides)
    message = refusal.value.found
    if isinstance(value, dict):  # nested mappings are dotted keys
        assert message.startswith((f"there is no `{key}.a`", f"`{key}` is {{")), message
        return
    assert message.startswith(f"`{key}` is "), message
    assert "; it must be " in message and "\n" not in message, message
    assert not re.search(r"Input|should|valid|Literal|typing", message), f"pydantic's words: {message}"


def test_every_key_says_what_it_means() -> None:
    for key, info in list_fields():
        assert info.description and len(info.description) >= 5, f"{key} has no description"
        assert not info.description.endswith("."), (
            f"{key}: descriptions stand in a table, without a full stop"
        )


def test_every_auto_is_a_default() -> None:
    """``auto_keys`` takes a key to be automatic when its default is. (A strategy is chosen before.)"""
    for key, branches in _declarations():
        if key == "strategy.name":
            continue
        takes_auto = any("auto" in branch.get("enum", [branch.get("const")]) for branch in branches)
        if takes_auto:
            assert dict(flatten(Recipe().to_dict()))[key] == "auto", key


# --- hostile files -------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "alias bomb": BOMB,
    "own alias": "data: &d\n  path: *d",
    "lists": "[" * 60_000,
    "mappings": "{a: " * 15_000,
    "closed lists": "[" * 900 + "]" * 900,
    "blocks": "- " * 30_000,
    "questions": "? " * 30_000,
    "indented": "".join(f"{' ' * depth}a:\n" for depth in range(340)),
    "long number": f"seed: {'9' * 60_000}",
    "long hexadecimal": f"seed: 0x{'f' * 60_000}",
    "many keys": "".join(f"k{number}: 1\n" for number in range(6_500)),
    "impossible date": "data: {path: 2020-99-99}\nx: 1",
    "directive": "%YAML 9.9\n---\nx: 1",
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_time(mistake: Callable[..., str], name: str) -> None:
    began = time.process_time()
    found = mistake(HOSTILE[name])
    assert time.process_time() - began < 5
    assert len(found) < 5_000


def _random_text(generator: random.Random) -> bytes:
    """Pieces of YAML and of recipes in any order, now and then with a byte that is neither."""
    pieces = [
        *(
            "training",
            "strategy",
            "input",
            "lr",
            "epochs",
            "mean",
            "seed",
            "name",
            "auto",
            "null",
            "~",
            "1e-3",
        ),
        *(
            ": ",
            ":\n  ",
            "\n",
            "\n  ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "? ",
            "&a ",
            "*a",
            "!!int ",
            "!t ",
            "|\n",
        ),
        *(
            "<<: ",
            "---\n",
            "...\n",
            "%YAML 1.1\n",
            "#",
            "'",
            '"',
            "\\",
            "\t",
            "0x1",
            "-1",
            ".inf",
            "2020-13-45",
        ),
        *(
            "true",
            "no",
            "é",
            "\u2028",
            "\ufeff",
            "top",
            "@",
            "`",
            ">-\n",
            "!!binary ",
            "!!timestamp ",
            "\\ud800",
        ),
    ]
    text = "".join(generator.choices(pieces, k=generator.randrange(1, 25))).encode()
    if generator.random() < 0.2:
        place = generator.randrange(len(text) + 1)
        text = text[:place] + bytes([generator.randrange(256)]) + text[place:]
    return text


def test_random_files_are_read_or_refused(load: Load) -> None:
    generator = random.Random(0)
    read = refused = 0
    for number in range(300):
        text = _random_text(generator)
        if number % 3 == 0:
            text = b"training:\n  lr: " + text
        try:
            recipe = load(text)
        except UsageError as error:
            refused += 1
            assert error.found and error.fix
        except Exception as error:
            pytest.fail(f"{text!r} escapes with {error!r}")
        else:
            read += 1
            assert isinstance(recipe, Recipe)
    assert refused > 100 and read > 0, (refused, read)


# --- out and back --------------------------------------------------------------------------------

NAMES = [
    *(
        "no",
        "yes",
        "null",
        "~",
        "true",
        "True",
        "1",
        "1e3",
        "1e-3",
        "0x1",
        "0o7",
        ".5",
        ".inf",
        ".nan",
        "2024-05-01",
    ),
    *(
        "",
        " ",
        "a ",
        " a",
        "a  b",
        "a: b",
        "a #b",
        "- a",
        "[a]",
        "{a}",
        "*a",
        "&a",
        "!a",
        "|",
        ">",
        "%",
        "@",
        "`",
        "?",
    ),
    *(
        "'",
        '"',
        "a'b",
        'a"b',
        "\\",
        "a\\nb",
        "a\nb",
        "a\n\nb\n",
        "\ta",
        "a\r\nb",
        "\x07",
        "\x85",
        "\u2028",
        "é",
        "名",
        "🦊",
    ),
    *(
        "x" * 300,
        "word " * 60,
        "a  " * 100,
        "\udcff",
        "---",
        "...",
        "<<",
        "=",
        "1_000",
        "1:30",
        "auto",
        "a,b",
        "#",
    ),
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_any_text_survives_the_file(load: Load, name: str) -> None:
    recipe = load_recipe(None, {"data.path": name, "backbone.weights": name})
    assert load(recipe.to_yaml().encode()) == recipe


def test_a_resolved_recipe_survives_the_file(load: Load) -> None:
    recipe = resolve_recipe(load_recipe("full-adamw", {"data.path": "x", "training.lr": 1 / 3}), facts())
    text = recipe.to_yaml()
    assert load(text).to_dict() == recipe.to_dict()
    assert "auto" not in text
    values = YAML(typ="safe", pure=True).load(text)  # any YAML reader gets the same
    assert values == recipe.to_dict()
    assert list(values) == list(Recipe.model_fields)  # in the order of the schema
    assert list(values["training"]) == list(dict(recipe.training))


# --- auto, then certainty ------------------------------------------------------------------------

PREPROCESSING: dict[str, Any] = {
    "img_size": 96,
    "crop_pct": 0.9,
    "resize": "pad",
    "interpolation": "lanczos",
    "channels": "rgb",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
}


def facts(**changes: Any) -> AutoValues:
    values = {
        "device": "cuda:1",
        "precision": "bfloat16",
        "channels_last": True,
        "workers": 5,
        "num_train": 5_000,
        "preprocessing": PREPROCESSING,
        "dropout": 0.25,
        "runtime": "torch",
        "target": "single",
    }
    return AutoValues(**values | changes)


def test_every_auto_is_decided() -> None:
    recipe = load_recipe()
    before = recipe.model_copy(deep=True)
    resolved = resolve_recipe(recipe, facts())
    assert resolved.auto_keys() == ()
    assert recipe == before and recipe.auto_keys()
    assert dict(resolved.input) == PREPROCESSING | {"augmentation": "light"}
    assert (resolved.data.workers, resolved.device) == (5, "cuda:1")
    assert resolved.strategy.dropout == 0.25
    assert (resolved.training.precision, resolved.training.channels_last) == ("bfloat16", True)
    assert (resolved.training.batch_size, resolved.training.lr) == (32, 0.01)
    assert len(changed_keys(recipe, resolved)) == len(recipe.auto_keys())


@pytest.mark.parametrize(
    ("strategy", "epochs", "views"),
    [
        *(("top", 1, 1), ("top", 4, 1), ("top", 5, 2), ("top", 9, 3), ("top", 10, 4), ("top", 100, 4)),
        *(("freeze", 4, 1), ("freeze", 5, 2), ("freeze", 100, 2), ("full", 100, 1)),
    ],
)
def test_each_cached_view_serves_several_epochs(strategy: str, epochs: int, views: int) -> None:
    keys = {"strategy.name": strategy, "training.epochs": epochs}
    assert resolve_recipe(load_recipe(None, keys), facts()).cache.views == views
    asked = resolve_recipe(load_recipe(None, keys | {"cache.views": 4}), facts())
    assert asked.cache.views == 4
    plain = resolve_recipe(load_recipe(None, keys | {"input.augmentation": "none"}), facts())
    assert plain.cache.views == 1


def test_a_false_and_a_zero_are_decisions() -> None:
    resolved = resolve_recipe(load_recipe(), facts(channels_last=False, workers=0))
    assert resolved.training.channels_last is False and resolved.data.workers == 0


def test_nothing_the_user_set_is_changed() -> None:
    own = {
        "data.workers": 0,
        "input.img_size": 64,
        "input.crop_pct": 0.5,
        "input.resize": "squash",
        "input.interpolation": "nearest",
        "input.channels": "grey",
        "input.mean": [0, 0, 0],
        "input.std": [1, 1, 1],
        "data.target": "multi",
        "strategy.norm": "train",
        "strategy.dropout": 0.0,
        "training.batch_size": 7,
        "training.lr": 0.5,
        "training.precision": "float16",
        "training.channels_last": False,
        "cache.views": 3,
        "device": "cuda:1",
        "runtime": "onnxruntime",
    }
    recipe = load_recipe(None, own)
    assert set(own) == set(load_recipe().auto_keys())  # a new auto key belongs in this test
    assert resolve_recipe(recipe, facts()).to_dict() == recipe.to_dict()


def test_a_device_is_made_certain() -> None:
    assert resolve_recipe(load_recipe(None, {"device": "cuda"}), facts(device="cuda:0")).device == "cuda:0"


def test_a_folder_called_auto_is_a_folder() -> None:
    recipe = load_recipe(None, {"data.path": "auto", "backbone.weights": "auto"})
    resolved = resolve_recipe(recipe, facts())
    assert (resolved.data.path, resolved.backbone.weights, resolved.auto_keys()) == ("auto", "auto", ())


def test_the_rate_belongs_to_the_optimizer() -> None:
    assert resolve_recipe(load_recipe(None, {"training.optimizer": "adamw"}), facts()).training.lr == 0.001


@pytest.mark.parametrize(
    ("num_train", "size"), [(0, 16), (1, 16), (999, 16), (1_000, 32), (9_999, 32), (10_000, 64), (10**7, 64)]
)
def test_batch_size(num_train: int, size: int) -> None:
    assert compute_batch_size(num_train) == size


def test_changed_keys() -> None:
    one = load_recipe(None, {"input.mean": [0, 0, 0]})
    other = load_recipe(None, {"input.mean": [0, 0, 1], "seed": 3, "training.patience": 2})
    assert changed_keys(one, one) == []
    assert [change.line for change in changed_keys(one, other)] == [
        "input.mean: [0.0, 0.0, 0.0] -> [0.0, 0.0, 1.0]",
        "training.patience: None -> 2",
        "seed: 0 -> 3",
    ]


def test_words_that_are_declared_in_two_rooms_are_the_same() -> None:
    assert get_args(Precision) == get_args(runtime.Precision) == tuple(runtime.DTYPES)
    assert get_args(HeadChoice) == get_args(pretrained.catalog.HeadChoice)


# --- the shipped ones ----------------------------------------------------------------------------


def test_which_recipes_are_shipped() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    assert list(shipped_recipes()) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert {"freeze", "top", "full", "scratch"} <= set(shipped_recipes())


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe(name: str) -> None:
    text = find_recipe(name)
    assert changed_keys(Recipe(), load_recipe(name)) or name == "top"
    first, sentence, *_ = text.splitlines()
    assert first == LANGUAGE_SERVER_LINE
    assert re.fullmatch(r"# [A-Z].{20,}\.", sentence), f"the second line is no sentence: {sentence}"
    jsonschema.validate(read_recipe(name), build_schema())
    assert re.search(rf"^#\s+finetune run --recipe {re.escape(name)} --", text, re.MULTILINE)
    assert text.endswith("\n") and max(map(len, text.splitlines())) <= 110


def test_the_schema_beside_the_recipes_is_up_to_date(cli: Cli) -> None:
    """Make it again: finetune recipes schema > recipes/recipe.schema.json."""
    written = (Path(__file__).parents[2] / "recipes" / "recipe.schema.json").read_text("utf-8")
    assert cli("recipes", "schema").stdout == written
    jsonschema.Draft202012Validator.check_schema(json.loads(written))


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({}, True),
        ({"training": None, "cache": "off"}, True),
        ({"strategy": {"name": "auto"}, "input": {"mean": [0.5, 0.5, 0.5], "img_size": "auto"}}, True),
        ({"strategy": {"name": "frieze"}}, False),
        ({"training": {"epoch": 3}}, False),
        ({"training": {"epochs": 0}}, False),
        ({"training": "off"}, False),
        ({"input": {"mean": ["half"]}}, False),
    ],
)
def test_the_schema_takes_what_a_recipe_takes(values: dict[str, Any], fits: bool, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(values))
    for accept, refusal in (
        (lambda: jsonschema.validate(values, build_schema()), jsonschema.ValidationError),
        (lambda: load_recipe(str(file)), UsageError),
    ):
        with nullcontext() if fits else pytest.raises(refusal):
            accept()


@pytest.mark.parametrize("name", ["freeze", "top", "full", "scratch"])
def test_a_recipe_called_like_a_strategy_uses_it(name: str) -> None:
    assert load_recipe(name).strategy.name == name


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_example_command_of_a_shipped_recipe_names_flags_that_exist(name: str) -> None:
    import inspect

    from finetune.cli.training.run import run_command

    lines = re.findall(r"^#\s+(finetune run .*)$", find_recipe(name), re.MULTILINE)
    assert lines
    parameters = set(inspect.signature(run_command).parameters)
    flags = {flag.replace("-", "_") for line in lines for flag in re.findall(r"--([a-z-]+)", line)}
    assert flags <= parameters | {"set", "json"}, flags - parameters


def test_words_declared_twice_are_the_same() -> None:
    """Low rooms cannot import the schema's types, nor the schema theirs without torch."""
    from finetune.recipe import HeadChoice, Precision
    from finetune.system import device as runtime
    from pretrained import catalog

    assert Precision == runtime.Precision
    assert HeadChoice == catalog.HeadChoice


def test_a_resolved_recipe_admits_no_auto() -> None:
    """Each key that may be "auto" in a recipe is narrower in the resolved type."""
    resolved = resolve_recipe(Recipe(), facts())
    for key in Recipe().auto_keys():
        if key in ("device", "backbone.name"):
            continue
        values = resolved.to_dict()
        set_dotted(values, key, "auto")
        with pytest.raises(ValidationError):
            type(resolved).model_validate_json(json.dumps(values))


# --- input sizes and aspect ratios ---------------------------------------------------------------


def test_the_flag_of_the_size_takes_height_and_width() -> None:
    def size(given: object) -> object:
        return build_recipe(None, {"img_size": given}).input.img_size

    assert [size(given) for given in ("224", 224, "224x224", "224x448", (224, 448))] == [
        *(224, 224, 224),
        *((224, 448), (224, 448)),
    ]
    assert load_recipe(None, {"input.img_size": "32X48"}).input.img_size == (32, 48)  # --set, a job's recipe
    written = load_recipe(None, {"input.img_size": [32, 48]}).to_yaml()
    assert YAML(typ="safe", pure=True).load(written)["input"]["img_size"] == [32, 48]


def test_a_recipe_with_timms_crop_mode_is_still_read() -> None:
    """Recipes of earlier run folders have it."""
    for old, new in {"center": "crop", "squash": "squash", "border": "pad", "auto": "auto"}.items():
        assert load_recipe(None, {"input.crop_mode": old}).input.resize == new
    with pytest.raises(UsageError, match=r"no `input.crop_mode`; did you mean `input.resize`\?"):
        load_recipe(None, {"input.crop_mode": "other"})


def test_statistics_of_other_channels_are_forgotten() -> None:
    resolved = load_recipe(None, {"input.channels": "rgb", "input.mean": [0.5] * 3, "input.std": [0.5] * 3})
    grey = load_recipe(resolved, {"input.channels": "grey"})
    assert (grey.input.mean, grey.input.std) == ("auto", "auto")
    same = load_recipe(resolved, {"input.channels": "rgb", "input.img_size": 64})
    assert same.input.mean == (0.5, 0.5, 0.5)
    given = load_recipe(resolved, {"input.channels": 2, "input.mean": [1, 2]})
    assert (given.input.mean, given.input.std) == ((1.0, 2.0), "auto")


def test_an_old_crop_mode_overrides_too() -> None:
    assert load_recipe(load_recipe("freeze"), {"input.crop_mode": "border"}).input.resize == "pad"
