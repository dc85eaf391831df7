"""``finetune recipes``: list and show the recipes that come with the package, and print their schema."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.output import handled_errors, print_json, print_line, print_text

app = typer.Typer(help="List and show the shipped recipes.", invoke_without_command=True)


@app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes, each with its first sentence."""
    if context.invoked_subcommand is not None:
        return
    with handled_errors():
        from finetune.recipe import shipped_recipes

        recipes = shipped_recipes()
        width = max(map(len, recipes))
        for name, text in recipes.items():
            print_line(f"{name:<{width}}  {text.splitlines()[1].lstrip('# ')}")


@app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")]) -> None:
    """Print a recipe; save it to a file to change it."""
    with handled_errors():
        from finetune.recipe import find_recipe

        print_text(find_recipe(name))


@app.command("schema")
def show_schema() -> None:
    """Print the JSON Schema of recipes, for editors; save it beside them as recipe.schema.json."""
    with handled_errors():
        from finetune.recipe import build_schema

        print_json(build_schema(), indent=2)
