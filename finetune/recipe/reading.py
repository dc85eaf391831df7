"""Find a recipe, read it, and apply the overrides of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.errors import UsageError, suggest
from finetune.recipe.mistakes import explain
from finetune.recipe.schema import SECTIONS, Recipe, flatten
from finetune.recipe.yaml import LONGEST_NUMBER, read_scalar, read_yaml
from finetune.system.regular_files import open_regular

LARGEST_FILE = 2**16
"""Largest recipe in bytes; a larger file is probably not a recipe."""

_SIZE = re.compile(r"(\d{1,9})[xX](\d{1,9})")
_CROP_MODES = {"center": "crop", "squash": "squash", "border": "pad", "auto": "auto"}


def load_recipe(source: Recipe | str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a recipe, the name of a shipped one, the path of a YAML file, or None for the defaults.
        overrides: dotted keys and their values, such as ``{"training.lr": 0.01}``.

    Raises:
        UsageError: there is no such recipe, it is not YAML, or it is invalid; all mistakes in one message.
    """
    if isinstance(source, Recipe):
        values, name = source.to_dict(), None
    else:
        values, name = {} if source is None else read_recipe(source), source
    given = dict(flatten(overrides or {}))
    if given.get("training.monitor") == "accuracy":  # of recipes until 0.1
        given["training.monitor"] = "score"
    if given.get("input.crop_mode") in _CROP_MODES:  # of recipes until 0.1
        given["input.resize"] = _CROP_MODES[given.pop("input.crop_mode")]
    _forget_statistics(values, given)
    for key, value in given.items():
        set_dotted(values, key, value)
    return read_values(values, name)


def _forget_statistics(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Drop mean and deviation of other channels than the overrides ask for, in place."""
    section, channels = values.get("input"), overrides.get("input.channels")
    if isinstance(section, dict) and channels not in (None, section.get("channels")):
        for key in ("mean", "std"):
            section.pop(key, None)


def read_values(values: dict[str, Any], name: str | None = None) -> Recipe:
    """Return the recipe of plain values, as JSON or YAML gives them.

    Args:
        values: sections and keys.
        name: where they come from, for the message.

    Raises:
        UsageError: they are invalid; all mistakes in one message.
    """
    try:
        return validate(values)
    except ValidationError as error:
        raise explain(error, values, name) from None


def validate(values: dict[str, Any]) -> Recipe:
    """Return the recipe of plain values; lists, the only sequences of YAML, become tuples."""
    if values.get("cache") == "off":
        values = values | {"cache": {"trunk": False, "pictures": False}}
    section, training = values.get("input"), values.get("training")
    if isinstance(section, dict):
        values = values | {"input": _translate_input(section)}
    if isinstance(training, dict) and training.get("monitor") == "accuracy":  # of recipes until 0.1
        values = values | {"training": training | {"monitor": "score"}}
    return Recipe.model_validate(_as_in_yaml(values))


def _translate_input(section: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``input`` with ``224x448`` as two numbers, and without the ``crop_mode`` of 0.1."""
    found = _SIZE.fullmatch(size) if isinstance(size := section.get("img_size"), str) else None
    if found is not None:
        height, width = int(found[1]), int(found[2])
        section = section | {"img_size": height if height == width else (height, width)}
    if section.get("crop_mode") in _CROP_MODES:
        others = {key: value for key, value in section.items() if key != "crop_mode"}
        section = {"resize": _CROP_MODES[section["crop_mode"]]} | others
    return section


def _as_in_yaml(value: Any) -> Any:
    """Return a plain value as a recipe file would give it, so that a valid recipe can be saved."""
    if isinstance(value, dict):
        return {key: _as_in_yaml(item) for key, item in value.items()}
    if isinstance(value, int) and abs(value) >= 10**LONGEST_NUMBER:
        return hex(value)  # text, which no key accepts as a number; decimal text has a limit of its own
    return tuple(value) if isinstance(value, list) else value


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in place. A section that is a plain value stays; validation reports it later."""
    section, dot, inner = key.partition(".")
    if not dot:
        values[key] = value
    elif isinstance(values.setdefault(section, {}), dict):
        values[section][inner] = value


# --- files ---------------------------------------------------------------------------------------


def read_recipe(source: str) -> dict[str, Any]:
    """Return the raw values of a shipped recipe or a file (see :func:`load_recipe` for the errors).

    A section that is null (all its keys are commented out) counts as absent.
    """
    asked = f"--recipe {source}"
    text = find_recipe(source)
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise UsageError(asked, f"its YAML is refused: {error}", "Correct the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(asked, "it is not a mapping of sections", "See `finetune recipes show top`.")
    return {key: value for key, value in values.items() if value is not None or key not in SECTIONS}


def find_recipe(source: str) -> str:
    """Return the text of a shipped recipe by name, or of a file by path.

    Raises:
        UsageError: there is neither, or the file cannot be read as text.
    """
    shipped = shipped_recipes()
    return shipped[source] if source in shipped else _read_file(source, shipped)


def _read_file(source: str, shipped: Iterable[str]) -> str:
    asked, fix = f"--recipe {source}", "Name a YAML file, or a shipped recipe (`finetune recipes`)."
    try:
        with open_regular(Path(source)) as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        found = f"no such file, and no shipped recipe of that name{suggest(source, shipped)}"
        raise UsageError(asked, found, f"Shipped recipes: {', '.join(shipped)}.") from None
    except IsADirectoryError:
        if (Path(source) / "recipe.yaml").is_file():
            fix = f"Take the recipe in it: --recipe {Path(source) / 'recipe.yaml'}"
        raise UsageError(asked, "it is a folder", fix) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UsageError(asked, f"it cannot be read: {getattr(error, 'strerror', error)}", fix) from None
    if len(content) > LARGEST_FILE:
        raise UsageError(asked, f"it is larger than {LARGEST_FILE:,} bytes, and no recipe", fix)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UsageError(asked, "it is not UTF-8 text", fix) from None


def shipped_recipes() -> dict[str, str]:
    """Return ``{name: YAML text}`` of the recipes that come with the package, in alphabetical order."""
    folder = resources.files("recipes")
    files = {
        item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")
    }
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files)}


# --- the command line ----------------------------------------------------------------------------


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``section.key=value`` strings; values are YAML scalars, or lists in brackets.

    Raises:
        UsageError: a string without ``=``, invalid YAML, or two values for one key.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text}", "there is no `=`", "Write --set section.key=value.")
        merge_override(values, key.strip(), _parse_value(text, value.strip()))
    return values


def _parse_value(text: str, value: str) -> Any:
    """Parse a value. Only brackets and quotes are YAML: otherwise ``#``, ``:`` and ``*`` may be in a path."""
    if not value.startswith(("[", '"', "'")):
        return read_scalar(value)
    try:
        return read_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {text}", f"the value is not valid YAML: {error}", "Quote it.") from None


def merge_override(values: dict[str, Any], key: str, value: Any) -> None:
    """Add an override in place.

    Raises:
        UsageError: the key already has another value.
    """
    if key in values and values[key] != value:
        raise UsageError(f"{key}={value}", f"{key}={values[key]} was given as well", "Give it once.")
    values[key] = value
