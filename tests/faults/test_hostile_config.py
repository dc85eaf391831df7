"""Every value of a model folder's ``config.json`` gives a model that works, or a refusal, and never a bug."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import finetune
from finetune.data.layout import NAME_BYTES, name_fault, printable
from finetune.errors import MOST_TEXT, ExitCode, FinetuneError, UsageError
from finetune.evaluation.prediction_rows import FORMATS, PredictionRows
from finetune.exporters.config import build_config
from finetune.exporters.deployed import Interface
from finetune.exporters.folder import export_model
from finetune.exporters.graph_files import write_companions
from finetune.exporters.model_card import build_readme
from finetune.recipe import load_recipe
from finetune.runs.files import write_json, write_text
from pretrained.backbone import check_same_labels, load_backbone
from pretrained.catalog import find_card
from pretrained.config import (
    CROPS,
    MAX_NAME_BYTES,
    MAX_TEXT_LENGTH,
    MEANS,
    STDS,
    read_label_names,
    read_name,
)
from tests.conftest import Cli, draw_folder

NAN, INFINITY = float("nan"), float("inf")
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
NUMBERS = (
    NAN,
    INFINITY,
    -INFINITY,
    -1,
    0,
    1,
    2,
    0.5,
    1e-9,
    1e-300,
    5e-324,
    1e308,
    10**30,
    10**400,
    True,
    False,
)
TEXTS = (
    "",
    "a",
    "0.5",
    "\ud800",
    "\x1b[31m\n",
    "\u202e",
    "\0",
    "../../x",
    "x" * 5_000,
    "test_resnet",
    "1" * 5_000,
)
SINGLE = (*NUMBERS, *TEXTS, None)
MANY = (
    *([value] for value in SINGLE),
    *([value] * 3 for value in SINGLE),
    *({"0": value} for value in SINGLE),
    *([], {}, [[]], DEEP, {"a": DEEP}, {"": {}}, [1, 2], [2, 1], [-1e38, 1e38], [0, 1e-300]),
    *(
        ["a"] * 10,
        ["a", "a", "a (1)", *"defghij"],
        ["\ud800", "\\ud800", *"cdefghij"],
        [*map(str, range(10))],
    ),
    *(
        [["conv1.0", 0, False]],
        [["conv1.0", 10**30, False]],
        [["\ud800", 0, True]],
        [3, 64, 64],
        [3, 4096, 4096],
    ),
)
VALUES = (*SINGLE, *MANY)
FIELDS = {
    "": ("architecture", "num_classes", "label_names", "labels", "model_args", "pretrained_cfg", "finetune"),
    "pretrained_cfg": (
        *(
            "input_size",
            "crop_pct",
            "crop_mode",
            "interpolation",
            "mean",
            "std",
            "num_classes",
            "label_names",
        ),
        *(
            "labels",
            "tag",
            "license",
            "paper_ids",
            "origin_url",
            "classifier",
            "first_conv",
            "fixed_input_size",
        ),
    ),
    "finetune": (
        *(
            "library",
            "architecture",
            "head",
            "dropout",
            "sha256",
            "taps",
            "pool",
            "temperature",
            "value_range",
        ),
        *("base_model", "version"),
    ),
}
"""Every key that is read, by the object that holds it."""
PLACES = [(section, key) for section, keys in FIELDS.items() for key in keys]
Write = Callable[[str, str, Any], Path]


@pytest.fixture(scope="module", autouse=True)
def _quick_list() -> Iterator[None]:
    """timm sorts its names on every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", cache(timm.list_models))
        yield


@pytest.fixture(scope="module")
def write(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write the tiny network's folder with another value somewhere, and return it."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
    own = json.loads((tiny / "config.json").read_text())

    def write(section: str, key: str, value: Any) -> Path:
        config = own | {"finetune": {}}
        config = {**config, section: config[section] | {key: value}} if section else config | {key: value}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.mark.sample(6)
@pytest.mark.parametrize(("section", "key"), PLACES)
def test_a_value_gives_a_card_or_a_refusal(write: Write, section: str, key: str) -> None:
    for value in VALUES:
        try:
            card = find_card(str(write(section, key, value)))
        except UsageError as error:
            assert len(str(error)) < 1_500
            continue
        assert len(card.license + card.origin + card.tag + card.sha256) <= 4 * MAX_TEXT_LENGTH
        for name in card.label_names:
            assert len(name.encode()) <= MAX_NAME_BYTES and len(name.splitlines()) <= 1


def use(folder: Path, target: Path) -> None:
    """Do with a model what predict, evaluate and export do with its config, but for the fresh process."""
    predictor = finetune.load(folder, device="cpu", workers=1)
    prediction = predictor.predict(Image.new("RGB", (40, 36), "red"))
    assert len(prediction.probabilities) == len(predictor.classes) == predictor.card.num_classes
    for format in FORMATS:
        rows = PredictionRows(predictor.classes, format)
        content = (rows.header() + rows.line("a.jpg", prediction.values)).decode()
        if format == "csv":  # no two columns have one name
            assert len(next(csv.DictReader(content.splitlines()))) == 3 + len(predictor.classes)
    write_companions(target, predictor.card, Interface())
    assert (target / "labels.txt").read_text().splitlines() == list(predictor.classes)
    write_text(target / "README.md", build_readme(predictor.card, {}, predictor.card.name))
    write_json(target / "config.json", build_config(predictor.card, predictor.network))
    again = find_card(str(target))
    assert again.label_names == predictor.card.label_names
    assert again.preprocessing.to_timm() == predictor.card.preprocessing.to_timm()


def use_or_refuse(folder: Path, target: Path) -> None:
    try:
        use(folder, target)
    except FinetuneError as error:
        assert error.exit_code in (ExitCode.USAGE, ExitCode.ENVIRONMENT), error
        assert len(str(error)) < 3 * MOST_TEXT


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 4)
@given(st.sampled_from(PLACES), st.sampled_from(VALUES))
def test_a_model_works_or_is_refused(
    write: Write, tmp_path: Path, place: tuple[str, str], value: Any
) -> None:
    use_or_refuse(write(*place, value), tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(PLACES), json_values)
def test_any_value_gives_a_card_or_a_refusal(write: Write, place: tuple[str, str], value: Any) -> None:
    try:
        find_card(str(write(*place, value)))
    except UsageError as error:
        assert len(str(error)) < 1_500


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("pretrained_cfg", "crop_pct", 1e-9),
        ("pretrained_cfg", "crop_pct", 1e-4),
        ("pretrained_cfg", "mean", [1e308] * 3),
        ("pretrained_cfg", "std", [1e-300] * 3),
        ("", "label_names", "0123456789"),
    ],
)
def test_values_that_would_end_in_a_bug(write: Write, section: str, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=key):
        find_card(str(write(section, key, value)))


def test_a_tiny_crop_is_no_crop_of_a_recipe_either(cli: Cli, tiny: Path, image_folder: Path) -> None:
    result = cli("run", "-b", tiny, "-d", image_folder, "--set", "input.crop_pct=1e-9")
    assert result.exit_code == ExitCode.USAGE
    assert "`input.crop_pct` is 1e-09; it must be a number of at least 0.1 and at most 1" in result.stderr


@pytest.mark.parametrize(("key", "bounds"), [("crop_pct", CROPS), ("mean", MEANS), ("std", STDS)])
def test_a_recipe_allows_what_a_model_may_hold(write: Write, key: str, bounds: tuple[float, float]) -> None:
    """Or a run would end with a model that cannot be read again."""
    for value, beyond in zip(bounds, (-INFINITY, INFINITY), strict=True):
        for one, is_allowed in ((value, True), (math.nextafter(value, beyond), False)):
            given = one if key == "crop_pct" else [one] * 3
            with nullcontext() if is_allowed else pytest.raises(UsageError, match=key):
                load_recipe(None, {f"input.{key}": given})
            with nullcontext() if is_allowed else pytest.raises(UsageError, match=key):
                find_card(str(write("pretrained_cfg", key, given)))


# --- label names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_halves_of_a_character_are_labels(write: Write, cli: Cli, tmp_path: Path, command: str) -> None:
    folder = write("", "label_names", ["\ud800", "\udfff\x1b\n", "x" * 4_000_000, *"cdefghi"])
    data = draw_folder(tmp_path / "data" / "val", {"c": 2, "d": 2}).parent
    given = (data,) if command == "predict" else ("--data", data)
    result = cli(command, folder, *given, "-o", tmp_path / "out.csv", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    written = tmp_path / "out.csv" if command == "predict" else tmp_path / "out.csv" / "predictions.csv"
    with written.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))[-10:]
    assert header[:2] == ["prob_\\ud800", "prob_\\udfff\\x1b\\n"]
    assert header[2] == f"prob_{'x' * 252}..."


@given(st.text(st.characters(codec=None), max_size=300))
def test_names_of_classes_that_can_be_trained_stay(name: str) -> None:
    """Any other becomes one line of valid text, and stays what it became."""
    known = read_name(name)
    assert known == read_name(known) and len(known.encode()) <= MAX_NAME_BYTES
    assert name_fault(known) in (None, "is empty", "is a path, not a name")
    if name == printable(name) and name_fault(name) is None:
        assert known == name


def test_the_longest_name_is_that_of_a_class() -> None:
    assert MAX_NAME_BYTES == NAME_BYTES
    assert read_name("\u8702" * 85) == "\u8702" * 85
    assert read_name("\u8702" * 86) == "\u8702" * 84 + "..."
    assert read_label_names({"label_names": {"1": "b", "0": 7}}) == ("7", "b")


def test_a_model_of_our_own_keeps_its_names(tiny: Path, tmp_path: Path) -> None:
    """Names that training allows come back unchanged, and are the same labels for ``head: keep``."""
    names = (
        "a",
        "a ",
        "a  b",
        "a\u00a0b",
        "\u202eb",
        "\u3000x",
        "=1+1",
        "\U0001f41d" * 63,
        "a (0)",
        "x" * 255,
    )
    assert all(name_fault(name) is None for name in names)
    torch.manual_seed(0)
    backbone = load_backbone(find_card(str(tiny)), classes=names)
    export_model(backbone, backbone.network, tmp_path / "model", {})
    card = find_card(str(tmp_path / "model"))
    assert card.label_names == names
    check_same_labels(card, names)
    use(tmp_path / "model", tmp_path)
