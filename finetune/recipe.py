"""The recipe: everything a run depends on, in one strict, described, YAML-shaped object.

A recipe comes from a file (or the defaults below), is overridden by dotted keys from the command
line, and is validated as a whole: unknown keys are refused with the nearest right one, and all
mistakes are told at once. Values may be ``"auto"``; :func:`resolve_recipe` returns a *new* recipe
in which none is, and that one is saved with the run.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.errors import UsageError, suggest

Auto = Literal["auto"]
StrategyName = Literal["freeze", "top", "full", "scratch"]
HeadChoice = Literal["replace", "keep", "drop_fc"]
Augmentation = Literal["none", "light", "medium", "heavy"]
Precision = Literal["float32", "bfloat16", "float16"]

BASE_RATES = {"sgd": 0.01, "adamw": 0.001}
"""Rate of a new head when ``training.lr`` is auto. SGD: the lectures' example (0.01 for the head,
0.001 for the top, 0.0001 below). AdamW normalises its steps, and a tenth of that is its usual base
(Loshchilov and Hutter, arXiv:1711.05101)."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BackboneSettings(_Section):
    """Which network, and where its weights come from."""

    name: str | None = Field(
        None,
        description="a timm or torchvision name, `timm/NAME`, `torchvision/NAME`, `hf-hub:ORG/NAME`, "
        "`local-dir:PATH`, or the folder of a finished run",
    )
    weights: str | None = Field(
        None,
        description="a .safetensors or .pth file, or a folder that holds one; null takes the weights "
        "that belong to the name, from the cache or by download",
    )
    offline: bool = Field(False, description="never ask the network; weights must be on this machine")


class DataSettings(_Section):
    """Where the pictures are, and how the validation part is made when the folder has none."""

    path: str | None = Field(
        None,
        description="a folder with train/ and val/ (and test/), a folder of class folders, or a CSV "
        "with the columns path,label[,split]",
    )
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of each class kept for validation when the data has no validation part",
    )
    workers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="processes that decode images; 0 decodes in the training process"
    )


class InputSettings(_Section):
    """How a picture becomes a tensor: the same for training, evaluation and the exported model."""

    img_size: Annotated[int, Field(ge=16, le=4096)] | Auto = Field(
        "auto", description="height and width in pixels; auto: what the weights were trained at"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | Auto = Field(
        "auto", description="share of the resized short side that the centre crop keeps"
    )
    crop_mode: Literal["center", "squash", "border"] | Auto = Field(
        "auto", description="center crops, squash changes the aspect ratio, border pads"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | Auto = Field(
        "auto", description="resampling filter"
    )
    mean: tuple[float, float, float] | Auto = Field(
        "auto", description="subtracted from each channel of an RGB image in [0, 1]"
    )
    std: tuple[float, float, float] | Auto = Field("auto", description="each channel is divided by it")
    augmentation: Augmentation = Field(
        "light",
        description="of training images; none: the evaluation view, light: crop and flip, "
        "medium: and colour and TrivialAugment, heavy: RandAugment, small crops and random erasing",
    )


class StrategySettings(_Section):
    """What learns, and how fast relative to the base rate."""

    name: StrategyName = Field("top", description="freeze, top, full or scratch")
    head: HeadChoice = Field(
        "replace",
        description="replace: a new linear classifier; keep: the network's own, for the same labels; "
        "drop_fc: also drop the fully connected layers under it (VGG, AlexNet)",
    )
    top_stages: int = Field(1, ge=1, description="stages under the head that count as the top")
    head_factor: float = Field(1.0, gt=0, description="rate of the head, as a multiple of training.lr")
    top_factor: float = Field(0.1, gt=0, description="rate of the top stages")
    body_factor: float = Field(0.01, gt=0, description="rate of everything below the top (full)")
    norm: Literal["train", "eval"] = Field(
        "train",
        description="mode of normalisation layers in trained stages; eval keeps their statistics "
        "(advised under 16 images a batch). In frozen stages it is always eval",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="before a new classifier")


class TrainingSettings(_Section):
    """The loop."""

    epochs: int = Field(10, ge=1, description="passes over the training images")
    batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="images per step; auto: 16 below 1,000 images, 32 below 10,000, else 64"
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (with momentum) or adamw")
    lr: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="base rate, which the new head gets; auto: 0.01 for sgd, 0.001 for adamw"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(1e-4, ge=0, description="of weights; biases and norm parameters get none")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up to the full rate")
    schedule: Literal["constant", "cosine", "step", "plateau"] = Field(
        "cosine",
        description="cosine: to zero at the last step; step: times decay_rate every decay_epochs; "
        "plateau: times decay_rate after decay_epochs without improvement",
    )
    decay_epochs: int = Field(3, ge=1, description="of the step and plateau schedules")
    decay_rate: float = Field(0.1, gt=0, lt=1, description="of the step and plateau schedules")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="arXiv:1512.00567; 0.1 is usual")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup (arXiv:1710.09412); 0 is off, 0.2 usual")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix (arXiv:1905.04899); 0 is off, 1.0 usual")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest norm of the whole gradient; null: off"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an average of the weights, which is then judged; null: off"
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after this many epochs without improvement; null: never"
    )
    monitor: Literal["accuracy", "loss"] = Field(
        "accuracy", description="validation figure that chooses the best epoch (accuracy ties go to the loss)"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced weighs the loss by inverse class frequency, mean 1"
    )
    precision: Precision | Auto = Field(
        "auto", description="auto: bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU"
    )
    channels_last: bool | Auto = Field(
        "auto", description="memory layout; auto: on for convolutional networks (twice as fast on a CPU)"
    )


class Recipe(_Section):
    """A complete description of one run."""

    backbone: BackboneSettings = Field(default_factory=BackboneSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    input: InputSettings = Field(default_factory=InputSettings)
    strategy: StrategySettings = Field(default_factory=StrategySettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    seed: int = Field(0, ge=0, lt=2**63, description="of the split, the order, the views and the new head")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dicts, as YAML and JSON take them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
        buffer = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump(self.to_dict(), buffer)
        return buffer.getvalue()

    def auto_keys(self) -> tuple[str, ...]:
        """Return the dotted keys that are still ``"auto"``."""
        return tuple(key for key, value in flatten(self.to_dict()) if value == "auto")


# --- reading -------------------------------------------------------------------------------------


def load_recipe(source: str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and lay the overrides over it.

    Args:
        source: name of a shipped recipe, path of a YAML file, or None for the defaults.
        overrides: dotted keys and their values, such as ``{"training.lr": 0.01}``.

    Raises:
        UsageError: no such recipe, not YAML, or a recipe that does not hold; all mistakes in one message.
    """
    values = read_recipe(source) if source else {}
    for key, value in (overrides or {}).items():
        _set_dotted(values, key, value)
    try:
        return _validate(values)
    except ValidationError as error:
        raise _explain(error, source) from None


def _validate(values: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(_tuples(values))


def _tuples(value: Any) -> Any:
    """YAML knows lists only; the schema's mean and std are tuples of three."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def read_recipe(source: str) -> dict[str, Any]:
    """Return the raw values of a shipped recipe or a file (see :func:`load_recipe` for the errors)."""
    asked = f"--recipe {source}"
    text = find_recipe(source)
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UsageError(asked, f"it is not valid YAML: {_one_line(error)}", "Correct the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(asked, "it is not a mapping of sections", "See `finetune recipes show top`.")
    return values


def find_recipe(source: str) -> str:
    """Return the text of a shipped recipe by name, or of a file by path.

    Raises:
        UsageError: neither exists, or the file cannot be read as text.
    """
    shipped = shipped_recipes()
    if source in shipped:
        return shipped[source]
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = f"no such file, and no shipped recipe of that name{suggest(source, shipped)}"
        fix = f"Shipped recipes: {', '.join(shipped)}."
        raise UsageError(f"--recipe {source}", found, fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe {source}", f"it cannot be read: {error}", "Name a YAML file.") from None


def shipped_recipes() -> dict[str, str]:
    """Return ``{name: YAML text}`` of the recipes that come with the package, in alphabetical order."""
    folder = resources.files("recipes")
    files = (item for item in folder.iterdir() if item.name.endswith(".yaml"))
    return {item.name[:-5]: item.read_text(encoding="utf-8") for item in sorted(files, key=lambda f: f.name)}


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``section.key=value`` strings; values are YAML scalars or lists.

    Raises:
        UsageError: no ``=``, or the same key twice.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text}", "there is no `=`", "Write --set section.key=value.")
        merge_override(values, key.strip(), _parse_scalar(text, value))
    return values


def merge_override(values: dict[str, Any], key: str, value: Any) -> None:
    """Add an override, refusing two different values for one key.

    Raises:
        UsageError: the key is there already with another value.
    """
    if key in values and values[key] != value:
        raise UsageError(f"{key}={value}", f"{key}={values[key]} was given as well", "Give it once.")
    values[key] = value


def _parse_scalar(text: str, value: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise UsageError(f"--set {text}", "the value is not valid YAML", "Quote the value.") from None


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[last] = value


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


# --- explaining ----------------------------------------------------------------------------------


def _explain(error: ValidationError, source: str | None) -> UsageError:
    lines = [_explain_one(item) for item in error.errors(include_url=False)]
    unique = list(dict.fromkeys(lines))  # a union reports once a branch
    found = unique[0] if len(unique) == 1 else "\n".join(["", *(f"  - {line}" for line in unique)])
    asked = f"recipe {source}" if source else "recipe"
    return UsageError(asked, found, "Correct it; docs/recipe.md describes every key.")


def _explain_one(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"there is no `{'.'.join(location)}`{_nearest_key(location)}"
    location = _schema_part(location)
    key = ".".join(location)
    if item["type"] in {"model_type", "dict_type"}:
        return f"`{key}` is a section, not a value"
    value = item["input"]
    return f"`{key}` is {value!r}; it must be {_expected(item, location)}"


def _schema_part(location: list[str]) -> list[str]:
    """Cut off what pydantic adds below a field: the tried branch of a union, an index in a tuple."""
    for size in range(len(location), 0, -1):
        if _field_info(location[:size]) is not None:
            return location[:size]
    return location


_SYNONYMS = {
    "learning_rate": "training.lr",
    "batch": "training.batch_size",
    "num_workers": "data.workers",
    "opt": "training.optimizer",
    "sched": "training.schedule",
    "scheduler": "training.schedule",
    "model": "backbone.name",
    "smoothing": "training.label_smoothing",
    "amp": "training.precision",
}
"""Other tools' names for our keys, which no spelling distance finds."""


def _nearest_key(location: list[str]) -> str:
    if location[-1] in _SYNONYMS:
        return f"; did you mean `{_SYNONYMS[location[-1]]}`?"
    known = [key for key, _ in flatten(Recipe().to_dict())]
    same_name = [key for key in known if key.rsplit(".", 1)[-1] == location[-1]]
    if same_name:
        return f"; did you mean `{same_name[0]}`?"
    section = ".".join(location[:-1])
    inside = [key for key in known if key.rpartition(".")[0] == section]
    candidates = {key.rsplit(".", 1)[-1]: key for key in [*known, *inside]}
    if len(location) == 1:
        candidates |= {name: name for name in Recipe.model_fields}
    near = suggest(location[-1], candidates)
    for name, full in candidates.items():
        near = near.replace(f"'{name}'", f"`{full}`")
    return near


def _expected(item: Any, location: list[str]) -> str:
    """Say what a key takes, in the schema's own words: choices, bounds, type, auto."""
    info = _field_info(location)
    if info is None:
        return str(item["msg"])
    choices = [choice for choice in _branches(info.annotation) if isinstance(choice, str)]
    options = [text for branch in _branches(info.annotation) if (text := _describe(branch, info.metadata))]
    near = suggest(str(item["input"]), choices) if isinstance(item["input"], str) else ""
    return f"{' or '.join([*options, *choices])}{near}"


_KINDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[float, float, float]: "three numbers",
    type(None): "null",
}
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def _branches(annotation: Any) -> list[Any]:
    """Flatten a union of types, annotated types and literals; a literal's branch is its value."""
    if hasattr(annotation, "__metadata__") or annotation in _KINDS or not get_args(annotation):
        return [annotation]
    return [branch for part in get_args(annotation) for branch in _branches(part)]


def _describe(branch: Any, metadata: Iterable[Any]) -> str:
    if hasattr(branch, "__metadata__"):
        return _describe(branch.__origin__, branch.__metadata__[0].metadata)
    if branch not in _KINDS:
        return ""
    bounds = [
        f"{word} {getattr(meta, name)}"
        for meta in metadata
        for name, word in _BOUNDS.items()
        if hasattr(meta, name)
    ]
    return " ".join([_KINDS[branch], " and ".join(bounds)]).strip()


def _field_info(location: list[str]) -> Any:
    model: Any = Recipe
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return None
        model = field.annotation
    return model.model_fields.get(location[-1])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- auto, then certainty ------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the machine, the backbone and the data decide where the recipe says ``"auto"``."""

    device: str
    precision: Precision
    channels_last: bool
    workers: int
    num_train: int
    preprocessing: Mapping[str, Any]


def resolve_recipe(recipe: Recipe, facts: Facts) -> Recipe:
    """Return a new recipe without any ``"auto"``."""
    decided = {
        "device": facts.device,
        "data.workers": facts.workers,
        "training.batch_size": compute_batch_size(facts.num_train),
        "training.lr": BASE_RATES[recipe.training.optimizer],
        "training.precision": facts.precision,
        "training.channels_last": facts.channels_last,
        **{f"input.{key}": value for key, value in facts.preprocessing.items()},
    }
    values = recipe.to_dict()
    for key in recipe.auto_keys():
        _set_dotted(values, key, decided[key])
    _set_dotted(values, "device", facts.device)  # "cuda" becomes "cuda:0": nothing is left to guess
    return _validate(values)


def compute_batch_size(num_train: int) -> int:
    """Return images per step: small sets need small batches, or an epoch is a handful of steps."""
    if num_train < 1_000:
        return 16
    return 32 if num_train < 10_000 else 64


def changed_keys(one: Recipe, other: Recipe) -> list[str]:
    """Return one line per dotted key whose values differ."""
    left, right = dict(flatten(one.to_dict())), dict(flatten(other.to_dict()))
    return [f"{key}: {left.get(key)!r} -> {right.get(key)!r}" for key in left if left[key] != right.get(key)]
