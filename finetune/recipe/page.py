"""Generate ``docs/recipe.md`` from the schema: ``python -m finetune.recipe.page docs/recipe.md``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from finetune.recipe.mistakes import describe_values, list_fields
from finetune.recipe.schema import SECTIONS, Recipe, flatten

COMMAND = "python -m finetune.recipe.page docs/recipe.md"

_OPENING = f"""\
<!-- Generated from finetune/recipe/sections.py by `{COMMAND}`; do not edit. -->

# The recipe

A recipe is a YAML file with everything a run depends on. Every key has a default, so a recipe holds only the
keys whose values differ:

```yaml
# finetune run --recipe mine.yaml --data ./photos
backbone:
  name: resnet50
strategy:
  name: full
training:
  lr: 0.003
```

- `finetune recipes` lists the shipped recipes; `finetune recipes show top > mine.yaml` is a good start.
- `finetune recipes schema > recipe.schema.json` beside your recipes makes editors with a YAML language server
  complete keys and mark mistakes: shipped recipes begin with a line that names this file.
- On the command line `--set training.lr=0.003` sets any key and overrides the file; the most used keys also
  have flags (`--lr 0.003`). Two different values for one key are refused.
- `auto` is decided when the run starts, from the data, the backbone and the machine. The run folder's
  `recipe.yaml` holds the decisions: `finetune run --recipe runs/ants/recipe.yaml` repeats the run.
- Misspelled keys, wrong types and values out of bounds are refused before anything else happens, all in one
  message.
- Values follow YAML 1.2: `true` and `false` (`no` is text), numbers such as `1e-3`, `null`, text. Tags,
  anchors and aliases are refused. A section without keys counts as absent.
"""


def build_page() -> str:
    """Return the page: an introduction, the keys without a section, and one table for each section."""
    defaults = dict(flatten(Recipe().to_dict()))
    rows = {key: _row(key, info, defaults[key]) for key, info in list_fields()}
    lone = [row for key, row in rows.items() if "." not in key]
    parts = [_OPENING, _table("Without a section", "Written at the top level of the file.", lone)]
    for name, section in SECTIONS.items():
        inside = [row for key, row in rows.items() if key.startswith(f"{name}.")]
        parts.append(_table(f"`{name}`", (section.__doc__ or "").strip(), inside))
    return "\n".join(parts)


def _table(title: str, sentence: str, rows: list[str]) -> str:
    head = ["| key | values | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", sentence, "", *head, *rows, ""])


def _row(key: str, info: FieldInfo, default: Any) -> str:
    name = key.rpartition(".")[2]
    cells = [f"`{name}`", describe_values(info), f"`{_yaml(default)}`", info.description or ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(build_page(), encoding="utf-8")
