"""Read YAML as a recipe needs it: sections, lists, text, numbers, true, false and null.

These are the values of YAML 1.2's core schema, so ``no`` and ``2024-05-01`` are text and ``1e-3`` is a
number. Tags, anchors and aliases are refused: a recipe has no use for them, and without them, and with
an end to nesting, no file can make the reader run anything, or take more than its own size in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
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

DEEPEST = 8
"""Levels of nesting; a recipe needs three."""
_LONGEST_NUMBER = 100
"""Characters; Python itself refuses to print integers of more than 4,300."""

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
"""The core schema (YAML 1.2.2, section 10.3.2): the first that fits; what none fits is text."""


def read_scalar(text: str) -> Any:
    """Return the value of an unquoted YAML scalar."""
    if len(text) > _LONGEST_NUMBER:
        return text
    return next((convert(text) for pattern, convert in _SCALARS if pattern.fullmatch(text)), text)


def read_yaml(text: str) -> Any:
    """Return the value of a YAML document, None for an empty one.

    Raises:
        ValueError: it is not YAML, or more than a recipe needs; the message says where in one line.
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
