"""Commands that take ``--set``: a flag that does not exist, but is a key of the recipe, names it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class RecipeCommand(TyperCommand):
    """A command whose further settings are keys of the recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an unknown flag with the name of a recipe key is answered with ``--set``."""
        try:
            return super().parse_args(ctx, args)
        except Exception as failure:  # Typer may bundle its own Click, so the class is unknown
            error: Any = failure
            flag = str(getattr(error, "option_name", ""))
            if keys := _find_keys(flag):
                error.message += ". It is a key of the recipe: " + " or ".join(
                    f"--set {key}=VALUE" for key in keys
                )
                error.possibilities = None
            raise


def _find_keys(flag: str) -> list[str]:
    """Return the keys of the recipe whose last part, or whole, is the name of a flag."""
    from finetune.recipe import Recipe, flatten

    name = flag.lstrip("-").replace("-", "_")
    keys = [key for key, _ in flatten(Recipe().to_dict())]
    return [key for key in keys if name and name in (key, key.rpartition(".")[2])]
