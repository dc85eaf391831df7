"""Find a recipe, read it, and lay the words of the command line over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.errors import UsageError, suggest
from finetune.recipe.mistakes import explain
from finetune.recipe.plain_yaml import read_scalar, read_yaml
from finetune.recipe.schema import SECTIONS, Recipe, flatten

LARGEST_FILE = 2**16
"""Bytes. A recipe is a page; a file of more is something else, named by mistake."""


def load_recipe(source: str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and lay the overrides over it.

    Args:
        source: name of a shipped recipe, path of a YAML file, or None for the defaults.
        overrides: dotted keys and their values, such as ``{"training.lr": 0.01}``.

    Raises:
        UsageError: no such recipe, not YAML, or a recipe that does not hold; all mistakes in one message.
    """
    values = {} if source is None else read_recipe(source)
    for key, value in flatten(overrides or {}):
        set_dotted(values, key, value)
    try:
        return validate(values)
    except ValidationError as error:
        raise explain(error, values, source) from None


def validate(values: dict[str, Any]) -> Recipe:
    """Return the recipe that plain values make. YAML knows lists only; mean and std are tuples of three."""
    if values.get("cache") == "off":
        values = values | {"cache": {"trunk": False, "pictures": False}}
    return Recipe.model_validate(_tuples(values))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in place. A section that is a value by mistake stays, to be told as one."""
    section, dot, inner = key.partition(".")
    if not dot:
        values[key] = value
    elif isinstance(values.setdefault(section, {}), dict):
        values[section][inner] = value


# --- files ---------------------------------------------------------------------------------------


def read_recipe(source: str) -> dict[str, Any]:
    """Return the raw values of a shipped recipe or a file (see :func:`load_recipe` for the errors).

    A section that is null (its keys are all commented out) counts as left out.
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
        UsageError: neither exists, or the file cannot be read as text.
    """
    shipped = shipped_recipes()
    return shipped[source] if source in shipped else _read_file(source, shipped)


def _read_file(source: str, shipped: Iterable[str]) -> str:
    asked, fix = f"--recipe {source}", "Name a YAML file, or a shipped recipe (`finetune recipes`)."
    try:
        with Path(source).open("rb") as file:
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
        UsageError: no ``=``, a list or quoted text that does not end, or the same key twice.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text}", "there is no `=`", "Write --set section.key=value.")
        merge_override(values, key.strip(), _parse_value(text, value.strip()))
    return values


def _parse_value(text: str, value: str) -> Any:
    """Only brackets and quotes need YAML: elsewhere ``#``, ``:`` and ``*`` are letters of a file name."""
    if not value.startswith(("[", '"', "'")):
        return read_scalar(value)
    try:
        return read_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {text}", f"the value is not valid YAML: {error}", "Quote it.") from None


def merge_override(values: dict[str, Any], key: str, value: Any) -> None:
    """Add an override, refusing two different values for one key.

    Raises:
        UsageError: the key is there already with another value.
    """
    if key in values and values[key] != value:
        raise UsageError(f"{key}={value}", f"{key}={values[key]} was given as well", "Give it once.")
    values[key] = value
