"""The group of all commands: what the parser refuses is shown with the value that was given.

Typer writes these messages itself, so their text is sanitised here and not in :mod:`finetune.cli.output`.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from finetune.errors import sanitize

_KINDS = {"float_parsing": "a number", "int_parsing": "a whole number", "int_from_float": "a whole number"}
"""What a value should be, by pydantic's name of the mistake."""


class ValueShowingGroup(TyperGroup):
    """Typer's group, which shows the value of an option that is refused: Typer names only the option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what stands before the command, and sanitise the message of a refusal."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            complete_message(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command, add the value to the message of a refusal, and sanitise it."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            complete_message(error)
            raise


def complete_message(error: Exception) -> None:
    """Add the given value to the message of the parser's error, and sanitise it; other errors stay."""
    _add_value(error)
    message = getattr(error, "message", None)
    if hasattr(error, "format_message") and isinstance(message, str):
        error.message = sanitize(message)  # type: ignore[attr-defined]


def _add_value(error: Exception) -> None:
    read_mistakes = getattr(error.__cause__, "errors", None)
    if not hasattr(error, "format_message") or not callable(read_mistakes):
        return
    mistake = read_mistakes()[0]
    value, kind = mistake["input"], _KINDS.get(mistake["type"])
    reason = str(mistake["msg"]).removeprefix("Value error, ").replace("Input should", "it should")
    if kind:
        message = f"{value!r} is not {kind}{_suggest_point(value)}"
    else:
        message = reason if repr(value) in reason else f"{value!r}: {reason}"
    error.message = message  # type: ignore[attr-defined]


def _suggest_point(value: object) -> str:
    """Return how to write a number with a decimal comma; empty for any other text."""
    text = str(value)
    with_point = text.replace(",", ".")
    try:
        float(with_point)
    except ValueError:
        return ""
    return f"; write {with_point}" if text.count(",") == 1 else ""
