"""What a key takes, in words: the same ones in the documentation and in refusals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from finetune.recipe.schema import SECTIONS, Recipe, check_strategy_name, list_strategy_names

_KINDS: dict[object, tuple[str, ...]] = {
    bool: ("true", "false"),
    int: ("a whole number",),
    float: ("a number",),
    str: ("text",),
    type(None): ("null",),
}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def list_fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of the recipe with its declaration, in order."""
    for name, info in Recipe.model_fields.items():
        if name in SECTIONS:
            yield from ((f"{name}.{key}", inner) for key, inner in SECTIONS[name].model_fields.items())
        else:
            yield name, info


def list_choices(info: FieldInfo) -> list[str]:
    """Return the words a key takes, such as ``sgd`` and ``adamw``."""
    if any(isinstance(one, AfterValidator) and one.func is check_strategy_name for one in info.metadata):
        return list_strategy_names()
    return [choice for branch in _branches(info.annotation) for choice in _words(branch)]


def describe_values(info: FieldInfo) -> str:
    """Say what a key takes, such as ``a number above 0 or auto``."""
    choices = list_choices(info)
    kinds = [kind for branch in _branches(info.annotation) for kind in _describe(branch, info.metadata)]
    return join_or([*(kind for kind in kinds if not choices or kind != "text"), *choices])


def join_or(words: Sequence[str]) -> str:
    """Return ``a, b or c``."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _branches(annotation: Any) -> list[Any]:
    """Return the members of a union, or the annotation itself."""
    single = annotation in _KINDS or get_origin(annotation) in (tuple, Literal) or _is_annotated(annotation)
    return [annotation] if single else [inner for part in get_args(annotation) for inner in _branches(part)]


def _is_annotated(annotation: Any) -> bool:
    return hasattr(annotation, "__metadata__")


def _words(branch: Any) -> tuple[str, ...]:
    return get_args(branch) if get_origin(branch) is Literal else ()


def _describe(branch: Any, bounds: Iterable[Any]) -> tuple[str, ...]:
    if _is_annotated(branch):
        return _describe(branch.__origin__, branch.__metadata__[0].metadata)
    if get_origin(branch) is tuple:
        inner = get_args(branch)
        if inner[-1] is ...:
            return (f"a list of {join_or(_words(inner[0]))}",)
        (one,) = _describe(inner[0], ())
        return (one.replace("a number", "three numbers"),)
    limits = [
        f"{word} {getattr(at, name)}" for at in bounds for name, word in _BOUNDS.items() if hasattr(at, name)
    ]
    if not limits or branch not in _KINDS:
        return _KINDS.get(branch, ())
    (kind,) = _KINDS[branch]
    joined = " and ".join(limits)
    return (f"{kind} of {joined}" if joined.startswith("at") else f"{kind} {joined}",)
