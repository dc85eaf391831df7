"""The schema of a recipe: its sections, and the keys that belong to none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from finetune.recipe.sections import (
    AdviseSettings,
    Auto,
    BackboneSettings,
    CacheSettings,
    DataSettings,
    InputSettings,
    Runtime,
    Section,
    StrategySettings,
    TrackingSettings,
    TrainingSettings,
)
from finetune.recipe.validators import check_duration
from finetune.recipe.yaml import write_yaml


class Recipe(Section):
    """A complete description of one run."""

    backbone: BackboneSettings = Field(default_factory=BackboneSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    input: InputSettings = Field(default_factory=InputSettings)
    strategy: StrategySettings = Field(default_factory=StrategySettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    advise: AdviseSettings = Field(default_factory=AdviseSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    seed: int = Field(
        0, ge=0, lt=2**63, description="random seed of the split, the order, the views and the new head"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    budget: Annotated[str, Field(max_length=20), AfterValidator(check_duration)] | None = Field(
        None,
        description="wall-clock time in which the best backbone, input size and strategy are looked for, and "
        "the model is made (docs/budget.md); a finished run's recipe has null, and what was chosen",
    )
    runtime: Runtime | Auto = Field(
        "auto",
        description="what computes cached features: torch, or onnxruntime on a CPU in float32; auto: "
        "onnxruntime for a convolutional network and at least 200 images of 224 pixels, or as many pixels, "
        "since an export takes one or two seconds",
    )
    deterministic: bool = Field(
        False, description="bit-identical results on a GPU too, with slower kernels; a CPU always gives them"
    )

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dicts, as YAML and JSON take them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML that ``load_recipe`` reads back to an equal recipe."""
        return write_yaml(self.to_dict())

    def auto_keys(self) -> tuple[str, ...]:
        """Return the dotted keys that are still ``"auto"`` (a folder of that name does not count)."""
        values = dict(flatten(self.to_dict()))
        return tuple(key for key, value in flatten(Recipe().to_dict()) if value == values[key] == "auto")


SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation
    for name, info in Recipe.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}
"""Name and schema of each section, in the order of the documentation."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
