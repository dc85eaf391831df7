"""The JSON Schema of a recipe, with which editors complete keys and mark mistakes."""

from __future__ import annotations

from typing import Any

from finetune.recipe.schema import SECTIONS, Recipe

FILE = "recipe.schema.json"
"""Its name beside a recipe."""
LANGUAGE_SERVER_LINE = f"# yaml-language-server: $schema={FILE}"
"""First line of a recipe, which tells an editor with the YAML language server where the schema is."""


def build_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12). A section may be empty, and ``cache: off`` turns off the cache."""
    schema = Recipe.model_json_schema()
    for name in SECTIONS:
        section = schema["properties"][name]
        choices = [{"$ref": section["$ref"]}, {"type": "null"}]
        if name == "cache":
            choices.append({"const": "off"})
        schema["properties"][name] = {"anyOf": choices}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
