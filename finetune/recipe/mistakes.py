"""Describe all mistakes of a recipe at once: the key, its value, what it must be, the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from reprlib import Repr
from typing import Any, Literal, get_args, get_origin

from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo

from finetune.errors import UsageError, find_nearest, suggest
from finetune.recipe.schema import SECTIONS, Recipe
from finetune.recipe.validators import (
    check_ascending,
    check_duration,
    check_strategy_name,
    list_strategy_names,
)

MOST = 50
"""Largest number of mistakes that are described; a file with more is hardly a recipe."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")

_SYNONYMS = {
    "backbone.name": ("model", "model name", "arch", "architecture", "network", "net"),
    "backbone.weights": ("pretrained", "checkpoint", "ckpt", "resume", "pretrained path"),
    "data.path": ("dataset", "data dir", "root", "train dir", "folder"),
    "data.val_fraction": ("val split", "validation split", "test size"),
    "data.workers": ("num workers", "jobs"),
    "input.img_size": ("resolution", "input size", "size", "crop size"),
    "input.resize": ("crop mode", "resize mode", "aspect ratio"),
    "input.augmentation": ("transforms", "aa", "auto augment"),
    "strategy.name": ("freeze", "finetune", "mode"),
    "strategy.dropout": ("drop", "drop rate"),
    "training.epochs": ("max epochs", "num train epochs"),
    "training.batch_size": ("batch", "bs"),
    "training.optimizer": ("opt", "solver"),
    "training.lr": ("learning rate", "base lr", "base rate", "rate"),
    "training.weight_decay": ("wd", "l2"),
    "training.warmup_epochs": ("warmup", "warmup steps"),
    "training.schedule": ("sched", "scheduler", "lr scheduler", "lr schedule"),
    "training.decay_epochs": ("step size",),
    "training.decay_rate": ("gamma",),
    "training.label_smoothing": ("smoothing",),
    "training.huber_delta": ("huber", "delta", "smooth l1"),
    "training.clip_grad": ("grad clip", "max grad norm", "gradient clip val"),
    "training.ema_decay": ("ema", "model ema", "model ema decay"),
    "training.patience": ("early stopping", "early stopping patience"),
    "training.precision": ("amp", "dtype", "fp16", "bf16", "mixed precision"),
    "seed": ("random state", "random seed", "manual seed"),
    "device": ("gpu", "gpus", "accelerator", "cuda"),
}
"""Names that other tools use for these keys, which a spelling distance would not find."""


def explain(error: ValidationError, values: Mapping[str, Any], source: str | None) -> UsageError:
    """Return an error that lists every mistake of a recipe.

    Args:
        error: the error of pydantic.
        values: values of the recipe, overrides included.
        source: name or path of the recipe, None for the defaults.
    """
    items = error.errors()
    lines = [_explain_one([str(part) for part in item["loc"]], item["type"], values) for item in items[:MOST]]
    unique = list(dict.fromkeys(lines))  # pydantic reports a union once per member
    number = f"{len(unique)} mistakes" if len(items) <= MOST else f"more than {len(unique)} mistakes"
    found = unique[0] if len(unique) == 1 else "\n".join([number, *(f"  - {line}" for line in unique)])
    asked = "recipe" if source is None else f"recipe {source}"
    return UsageError(asked, found, "Correct it; docs/recipe.md describes every key.")


def _explain_one(location: list[str], kind: str, values: Mapping[str, Any]) -> str:
    fields = dict(list_fields())
    key = next((key for size in (1, 2) if (key := ".".join(location[:size])) in fields), None)
    if key is None and kind == "string_unicode":
        location, kind = [*location, _find_undecoded(values, location)], "extra_forbidden"
    if kind == "extra_forbidden":
        return f"there is no `{_printable('.'.join(location))}`{_nearest_key(location)}"
    if key is None:
        return f"`{location[0]}` is a section, not a value"
    value: Any = values
    for part in key.split("."):
        value = value[part]
    choices = list_choices(fields[key])
    near = suggest(value, choices) if isinstance(value, str) else ""
    return f"`{key}` is {_shown(value)}; it must be {describe_values(fields[key])}{near}"


def _find_undecoded(values: Any, location: list[str]) -> str:
    """Return the key with a lone surrogate, for which pydantic names only the section.

    Bytes of a command line that are not UTF-8 become lone surrogates, as does ``"\\ud83d"`` in a file.
    """
    for part in location:
        values = values[part]
    return next(str(key) for key in values if _SURROGATE.search(key))


# --- showing -------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """Return a value as YAML writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to print numbers of more than 4,300 digits
        return "a number of thousands of digits"


def _printable(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else _shown(key)


# --- the nearest valid key -----------------------------------------------------------------------


def _nearest_key(location: list[str]) -> str:
    dotted = ".".join(location)
    known = {key: key.rpartition(".")[2] for key, _ in list_fields()}
    if dotted in known:  # `training.lr: 0.1` as one key of a file
        section, _, name = dotted.partition(".")
        return f"; write `{name}` inside `{section}`"
    keys = _find_synonym(location[-1]) or _find_same_name(location[-1], known) or _find_near(location, known)
    return f"; did you mean {join_or([f'`{key}`' for key in keys])}?" if keys else ""


def _plain(word: str) -> str:
    """Return a name without case and punctuation: ``learningRate`` and ``learning-rate`` become equal."""
    return re.sub(r"[^a-z0-9]", "", word.lower())


def _find_synonym(word: str) -> list[str]:
    return [key for key, names in _SYNONYMS.items() if _plain(word) in map(_plain, names)]


def _find_same_name(word: str, known: Mapping[str, str]) -> list[str]:
    return [key for key, name in known.items() if _plain(name) == _plain(word)]


def _find_near(location: list[str], known: Mapping[str, str]) -> list[str]:
    """Return the keys of the nearest spelling, own section first; a single word may name a section too."""
    section = location[0] if len(location) > 1 else ""
    ordered = sorted(known, key=lambda key: key.rpartition(".")[0] != section)
    names = [*(SECTIONS if not section else ()), *(known[key] for key in ordered)]
    near = find_nearest(location[-1].lower(), names)
    return [name if name in SECTIONS and not section else _first(ordered, known, name) for name in near]


def _first(keys: list[str], known: Mapping[str, str], name: str) -> str:
    return next(key for key in keys if known[key] == name)


# --- the values that a key accepts, described for docs/recipe.md and for error messages -----------

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
    """Return the literal values a key accepts, such as ``sgd`` and ``adamw``."""
    if _has_validator(info.metadata, check_strategy_name):
        return list_strategy_names()
    return [choice for branch in _branches(info.annotation) for choice in _literals(branch)]


def _has_validator(metadata: Iterable[Any], function: Callable[..., Any]) -> bool:
    return any(isinstance(item, AfterValidator) and item.func is function for item in metadata)


def describe_values(info: FieldInfo) -> str:
    """Return a description of the values a key accepts, such as ``a number above 0 or auto``."""
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


def _literals(branch: Any) -> tuple[str, ...]:
    return get_args(branch) if get_origin(branch) is Literal else ()


def _describe(branch: Any, bounds: Iterable[Any]) -> tuple[str, ...]:
    if _is_annotated(branch) and _has_validator(branch.__metadata__, check_duration):
        return ("a duration of at least a second, such as 90s, 10m or 1h",)
    if _is_annotated(branch):
        return _describe(branch.__origin__, branch.__metadata__[0].metadata)
    if get_origin(branch) is tuple:
        inner = get_args(branch)
        if inner[-1] is ...:
            items = join_or(_literals(inner[0]) or _describe(inner[0], ()))
            order = "ascending " if _has_validator(bounds, check_ascending) else ""
            plural = items.replace("a whole number", "whole numbers").replace("a number", "numbers")
            return (f"a list of {order}{plural}",)
        (item,) = _describe(inner[0], ())
        number = {2: "two", 3: "three"}[len(inner)]
        return (re.sub("^a (whole )?number", rf"{number} \1numbers", item),)
    limits = [
        f"{word} {getattr(at, name)}" for at in bounds for name, word in _BOUNDS.items() if hasattr(at, name)
    ]
    if not limits or branch not in _KINDS:
        return _KINDS.get(branch, ())
    (kind,) = _KINDS[branch]
    joined = " and ".join(limits)
    return (f"{kind} of {joined}" if joined.startswith("at") else f"{kind} {joined}",)
