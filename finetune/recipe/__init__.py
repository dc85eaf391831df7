"""The recipe: everything a run depends on, as one strictly validated object that YAML can hold.

A recipe comes from a file (or the defaults), is overridden by dotted keys from the command line, and is
validated as a whole: for unknown keys the nearest known one is suggested, and all mistakes are reported at
once. Values may be ``"auto"``; :func:`resolve_recipe` returns a *new* recipe without ``"auto"``, which is
saved with the run.

::

    text -> plain values -> overrides applied -> Recipe -> resolved Recipe
            reading         reading              schema    resolve          (mistakes: error messages)
"""

from finetune.recipe.changes import Change, changed_keys
from finetune.recipe.json_schema import LANGUAGE_SERVER_LINE, build_schema
from finetune.recipe.reading import (
    find_recipe,
    load_recipe,
    merge_override,
    parse_assignments,
    read_recipe,
    shipped_recipes,
)
from finetune.recipe.resolve import (
    BASE_LRS,
    AutoValues,
    ResolvedRecipe,
    ResolvedTraining,
    compute_batch_size,
    compute_views,
    resolve_recipe,
)
from finetune.recipe.schema import Recipe, flatten
from finetune.recipe.sections import (
    Augmentation,
    Auto,
    BackboneSettings,
    CacheSettings,
    DataSettings,
    HeadChoice,
    InputSettings,
    Precision,
    Runtime,
    StrategySettings,
    TrackerName,
    TrainingSettings,
)

__all__ = [
    "BASE_LRS",
    "LANGUAGE_SERVER_LINE",
    "Augmentation",
    "Auto",
    "AutoValues",
    "BackboneSettings",
    "CacheSettings",
    "Change",
    "DataSettings",
    "HeadChoice",
    "InputSettings",
    "Precision",
    "Recipe",
    "ResolvedRecipe",
    "ResolvedTraining",
    "Runtime",
    "StrategySettings",
    "TrackerName",
    "TrainingSettings",
    "build_schema",
    "changed_keys",
    "compute_batch_size",
    "compute_views",
    "find_recipe",
    "flatten",
    "load_recipe",
    "merge_override",
    "parse_assignments",
    "read_recipe",
    "resolve_recipe",
    "shipped_recipes",
]
