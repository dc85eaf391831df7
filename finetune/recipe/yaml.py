"""YAML as recipes use it: mappings, lists, text, numbers, true, false and null.

The values follow YAML 1.2's core schema, so ``no`` and ``2024-05-01`` are text and ``1e-3`` is a number.
Tags, anchors and aliases are refused and nesting is limited: so no file can run code, or take much more
memory than its own size.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.representer import SafeRepresenter

DEEPEST = 8
"""Largest depth of nesting; a recipe needs three levels."""
LONGEST_NUMBER = 100
"""Largest number of characters of a number; Python refuses to print integers of more than 4,300 digits."""

_SCALARS: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"|~|null|Null|NULL"), lambda _: None),
    (re.compile(r"true|True|TRUE"), lambda _: True),
    (re.compile(r"false|False|FALSE"), lambda _: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda _: math.nan),
)
"""The core schema (YAML 1.2.2, section 10.3.2): the first pattern that matches counts; all else is text."""


def read_scalar(text: str) -> Any:
    """Return the value of an unquoted YAML scalar."""
    if len(text) > LONGEST_NUMBER:
        return text
    return next((convert(text) for pattern, convert in _SCALARS if pattern.fullmatch(text)), text)


def read_yaml(text: str) -> Any:
    """Return the value of a YAML document, None for an empty one.

    Raises:
        ValueError: the text is not YAML, or uses a feature that is refused; the message names the line.
    """
    try:
        events = YAML(typ="safe", pure=True).parse(text)
        value = _read_document(events)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return value


def _read_document(events: Iterator[Any]) -> Any:
    value, found = None, False
    for event in events:
        if isinstance(event, DocumentStartEvent):
            _require(not found, event, "a second document begins; a recipe is one")
            found = True
            value = _read_value(next(events), events, depth=1)
        elif isinstance(event, StreamEndEvent):
            break
    return value


def _read_value(event: Any, events: Iterator[Any], depth: int) -> Any:
    _require(not isinstance(event, AliasEvent), event, "aliases (`*name`) have no place in a recipe")
    _require(event.anchor is None, event, "anchors (`&name`) have no place in a recipe")
    _require(event.tag is None, event, "tags (`!name`) have no place in a recipe")
    _require(depth <= DEEPEST, event, f"more than {DEEPEST} levels of nesting have no place in a recipe")
    if isinstance(event, MappingStartEvent):
        return _read_mapping(events, depth)
    if isinstance(event, SequenceStartEvent):
        return list(_read_items(events, depth))
    return read_scalar(event.value) if event.style is None else event.value


def _read_items(events: Iterator[Any], depth: int) -> Iterator[Any]:
    while not isinstance(event := next(events), SequenceEndEvent):
        yield _read_value(event, events, depth + 1)


def _read_mapping(events: Iterator[Any], depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    while not isinstance(event := next(events), MappingEndEvent):
        _require(isinstance(event, ScalarEvent), event, "a key must be a word")
        _require(event.value not in values, event, f"the key {event.value!r} is given twice")
        values[event.value] = _read_value(next(events), events, depth + 1)
    return values


def _require(holds: bool, event: Any, problem: str) -> None:
    if not holds:
        raise ValueError(f"line {event.start_mark.line + 1}: {problem}")


# --- writing -------------------------------------------------------------------------------------


class _Representer(SafeRepresenter):  # type: ignore[misc]
    """Writes text with unprintable characters, such as Unicode line separators, quoted and escaped."""

    def represent_str(self, data: str) -> Any:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def write_yaml(values: Mapping[str, Any]) -> str:
    """Return a document that :func:`read_yaml` reads back to equal values."""
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 2**16  # a folded line cannot keep every character beside the fold
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(values, buffer)
    return buffer.getvalue()
