"""The sections of a recipe: every key with its type, bounds, default and meaning.

``docs/recipe.md``, the messages about mistakes and a sweep of the tests are generated from these
declarations, so a new key needs only its line here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from finetune.recipe.validators import check_ascending, check_strategy_name, list_strategy_names
from finetune.strategies import STRATEGIES, starts_random
from finetune.targets import ClassWeights, Monitor, TargetKind

Auto = Literal["auto"]
Runtime = Literal["torch", "onnxruntime"]
HeadChoice = Literal["replace", "keep", "drop_fc"]
Resize = Literal["crop", "squash", "pad"]
Augmentation = Literal["none", "shift", "light", "medium", "heavy"]
Optimizer = Literal["sgd", "adamw"]
Precision = Literal["float32", "bfloat16", "float16"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_ColumnName = Annotated[str, Field(min_length=1, max_length=200)]
_Side = Annotated[int, Field(ge=16, le=4096)]
_CropPct = Annotated[float, Field(ge=0.1, le=1)]
_Mean = Annotated[float, Field(ge=-1_000_000, le=1_000_000)]
_Std = Annotated[float, Field(ge=1e-6, le=1_000_000)]
# The bounds of pretrained.config, so that a model can be read again with its preprocessing.


class Section(BaseModel):
    """A part of a recipe: its keys are known, and its values have their very types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BackboneSettings(Section):
    """The network, and where its weights come from."""

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
    offline: bool = Field(False, description="do not use the network; the weights must be on this machine")


class DataSettings(Section):
    """Where the images are, and how the validation split is made if the data has none."""

    path: str | None = Field(
        None,
        description="a folder with train/ and val/ (and test/), a folder of class folders, a .zip, "
        ".tar or .tar.gz of either, a CSV with columns of paths, labels and splits, or `sample:digits`: "
        "handwritten digits that come with the installation",
    )
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of each class that becomes the validation split if the data has none",
    )
    workers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="number of processes that decode images; 0 decodes in the training process"
    )
    follow_links: bool = Field(False, description="follow symbolic links that lead out of the data folder")
    group_by: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None,
        description="keeps images that belong together (a patient, a burst, a video) in one split: the "
        "column of the CSV that names the group, or a regular expression whose first group (else whole "
        "match) in the path does",
    )
    folds: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        None,
        description="number of folds for cross-validation: all images except test are divided into so many "
        "folds, and each is the validation split once; null: no cross-validation",
    )
    fold: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="which fold is the validation split, from 1; the other folds are the training split"
    )
    path_column: _ColumnName | None = Field(
        None, description="the column of a CSV that holds the paths; null: by its name and its cells"
    )
    label_column: _ColumnName | None = Field(
        None, description="the column of a CSV that holds the labels; null: by its name"
    )
    target: TargetKind | Auto = Field(
        "auto",
        description="what the labels are: single (a class an image), multi (several classes or none: a CSV "
        "with a column `labels` such as `cat|dog`, or a column of 0 and 1 for each class), number (a CSV "
        "with a column `value`); auto: by the columns and cells of the CSV",
    )
    label_separator: Annotated[str, Field(min_length=1, max_length=3)] | None = Field(
        None, description="what separates the labels of an image in a CSV; null: `|` or `;`, whichever occurs"
    )
    split_column: _ColumnName | None = Field(
        None,
        description="the column of a CSV that holds the splits; null: by its name and its cells; none: no "
        "column does",
    )
    image_root: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="the folder that the paths in a CSV are relative to, itself relative to its folder; "
        "null: the CSV's folder",
    )
    suffix: Annotated[str, Field(min_length=1, max_length=20)] | None = Field(
        None, description="ending of the files' names that the paths in a CSV leave out, such as .jpg"
    )
    allow_leaks: bool = Field(
        False, description="only warn if exact copies of an image are in two splits, instead of refusing"
    )


class InputSettings(Section):
    """How an image becomes a tensor, for training, evaluation and the exported model alike."""

    img_size: _Side | tuple[_Side, _Side] | Auto = Field(
        "auto", description="size in pixels: one side, or height and width; auto: that of the weights"
    )
    crop_pct: _CropPct | Auto = Field(
        "auto",
        description="share of the resized side that the centre crop keeps; auto: the weights' own, 1 with a "
        "resize of squash or pad",
    )
    resize: Resize | Auto = Field(
        "auto",
        description="how images get the aspect ratio of the input, in training and evaluation: crop cuts off "
        "the ends, squash changes the aspect ratio, pad adds borders of the mean colour",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | Auto = Field(
        "auto", description="resampling filter"
    )
    channels: Literal["rgb", "grey", "array"] | Annotated[int, Field(ge=1, le=16)] | Auto = Field(
        "auto",
        description="what images become: rgb of 8 bits; grey, or a number of channels, in full depth and "
        "standardised; array: the input of a network of arrays, as it is; auto: what the network takes, and "
        "of a network of RGB rgb, or for arrays (.npy) the number of their channels",
    )
    mean: tuple[_Mean, ...] | Auto = Field(
        "auto",
        description="subtracted from each channel: of RGB in [0, 1], of other channels in the numbers of the "
        "files; auto: that of the weights for RGB, else measured on the training images",
    )
    std: tuple[_Std, ...] | Auto = Field("auto", description="each channel is divided by it; auto: as mean")
    augmentation: Augmentation = Field(
        "light",
        description="augmentation of training images; none: the evaluation view, shift: moved by up to an "
        "eighth, and flip (networks for CIFAR), light: random crop and flip, medium: light with colour "
        "jitter and TrivialAugment, heavy: RandAugment, small crops and random erasing",
    )


class StrategySettings(Section):
    """What learns, and with which learning rate relative to the base learning rate."""

    name: Annotated[str, AfterValidator(check_strategy_name)] = Field(
        "top",
        description="what is trained; "
        + "; ".join(f"{name}: {strategy.description}" for name, strategy in STRATEGIES.items())
        + "; auto: chosen from evidence (`finetune advise`)",
        json_schema_extra=lambda schema: schema.update(enum=[*list_strategy_names()]),
    )
    head: HeadChoice | Literal["extend"] = Field(
        "replace",
        description="replace: a new linear classifier; keep: the network's own classifier, for the same "
        "labels; extend: a new one that begins with the network's own rows for the classes that it knows; "
        "drop_fc: a new one that also replaces the fully connected layers before it (VGG, AlexNet)",
    )
    top_stages: int = Field(1, ge=1, description="number of stages before the head that count as the top")
    head_factor: float = Field(
        1.0, gt=0, description="learning rate of the head, as a multiple of training.lr"
    )
    top_factor: float = Field(
        0.1, gt=0, description="learning rate of the top stages, as a multiple of training.lr"
    )
    body_factor: float = Field(
        0.01,
        gt=0,
        description="learning rate of everything below the top, as a multiple of training.lr (full)",
    )
    norm: Literal["train", "eval"] | Auto = Field(
        "auto",
        description="mode of normalisation layers in trained stages; eval keeps their running statistics; "
        "auto: eval for pretrained weights, train for random ones. In frozen stages it is always eval",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto",
        description="dropout probability before a new classifier; in the networks of docs/networks.md the "
        "probability at the places of their papers (in fc6 and fc7, between mlpconvs, inside blocks); auto: "
        "for these networks the published one, or that of the run they come from, and 0 for all others. "
        "head=keep keeps the network's own",
    )
    features: str | None = Field(
        None,
        min_length=1,
        description="for freeze: a regularised linear classifier on these features, solved to its optimum "
        "instead of trained for epochs; last, best (one stage, by leave-one-out), all (all stages) or a "
        "layer's name",
    )
    probe_first: bool = Field(
        False,
        description="for top and full: the head starts as the linear classifier of `features: last` "
        "(arXiv:2202.10054)",
    )
    floor: str | None = Field(
        None,
        min_length=1,
        description="for top and full: the linear classifier on these features (as in `features`) becomes "
        "the result if training does not beat it on validation",
    )

    @property
    def starts_random(self) -> bool:
        """Whether training starts from random weights, so that pretrained ones play no part."""
        return starts_random(self.name)

    @property
    def norm_mode(self) -> Literal["train", "eval"]:
        """``norm``, or what ``auto`` stands for (docs/strategies.md has the measurements)."""
        if self.norm != "auto":
            return self.norm
        return "train" if self.starts_random else "eval"


class TrainingSettings(Section):
    """The training loop."""

    epochs: int = Field(10, ge=1, description="number of passes over the training images")
    batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto",
        description="images per step; auto: 16 below 1,000 images, 32 below 10,000, else 64, halved until it "
        "fits on the GPU",
    )
    microbatch: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="images that go through the network at a time; gradients are accumulated over the batch; "
        "null: the whole batch, or on a CPU as many as fit its caches, if that is exact (no BatchNorm in "
        "train mode and no dropout)",
    )
    optimizer: Optimizer = Field("sgd", description="adamw suits transformers")
    lr: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="base learning rate, that of a new head; auto: 0.01 for sgd, 0.001 for adamw"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    nesterov: bool = Field(
        False,
        description="Nesterov's form of sgd's momentum: the step goes along the gradient plus momentum times "
        "the new velocity",
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay; biases and normalisation parameters get none"
    )
    bias_lr_factor: float = Field(
        1.0,
        gt=0,
        description="factor on the learning rate of what gets no weight decay (biases, normalisation "
        "parameters); 2 in the files of AlexNet's time",
    )
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up to the full learning rate")
    schedule: Literal["constant", "cosine", "step", "plateau"] = Field(
        "cosine",
        description="schedule of the learning rate; cosine: to zero at the last step; step: times decay_rate "
        "every decay_epochs; plateau: times decay_rate after decay_epochs without improvement",
    )
    decay_epochs: int = Field(3, ge=1, description="for the step and plateau schedules")
    decay_rate: float = Field(0.1, gt=0, lt=1, description="for the step and plateau schedules")
    milestones: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], AfterValidator(check_ascending)
    ] = Field(
        (),
        description="shares of the run after which the step schedule decays, instead of every decay_epochs; "
        "[0.5, 0.75]: after 10 and 15 of 20 epochs",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="label smoothing (arXiv:1512.00567); 0.1 is usual"
    )
    huber_delta: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of a number as target: an error beyond this many standard deviations of the training "
        "labels counts linearly and not by its square (Huber loss), so that a few wrong labels do not rule; "
        "1 is usual; null: never",
    )
    mixup: float = Field(0.0, ge=0, description="alpha of mixup (arXiv:1710.09412); 0: off, 0.2 is usual")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix (arXiv:1905.04899); 0: off, 1.0 is usual")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest norm of the whole gradient; null: off"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of a moving average of the weights, which is then evaluated; null: off"
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after this many epochs without improvement; null: never"
    )
    keep_epochs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="epochs, from 1, after which the trained weights are kept, each time in a file of that "
        "size, for `finetune explain evolution`",
    )
    monitor: Monitor = Field(
        "score",
        description="validation metric that selects the best epoch: score (accuracy; mean average precision "
        "of several labels; R squared of a number; at equal scores the lower loss wins), or loss; last: the "
        "last epoch counts, and validation images choose nothing (neither patience nor plateau then acts)",
    )
    class_weights: ClassWeights = Field(
        "none", description="balanced weights the loss by inverse class frequency, mean 1"
    )
    precision: Precision | Auto = Field(
        "auto",
        description="auto: bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU",
    )
    sync_batch_norm: bool = Field(
        False,
        description="with several GPUs, BatchNorm uses the statistics of the whole batch instead of those of "
        "each GPU's share",
    )
    compile: bool = Field(
        False,
        description="torch.compile the network for training (not if its frozen trunk is cut off): costs a "
        "minute at the start, gives faster steps on a GPU",
    )
    channels_last: bool | Auto = Field(
        "auto", description="memory layout; auto: on for convolutional networks (twice as fast on a CPU)"
    )


class CacheSettings(Section):
    """What is cached so that nothing is computed twice. `cache: off` caches nothing."""

    trunk: bool = Field(
        True,
        description="cache the output of the frozen trunk if that saves time and fits (freeze and top): the "
        "trunk runs once for each image and view",
    )
    pictures: bool = Field(True, description="cache decoded images if they fit: each is decoded once")
    views: Annotated[int, Field(ge=1, le=1000)] | Auto = Field(
        "auto",
        description="number of random views of each training image that the trunk sees, used in turn by the "
        f"epochs; auto: {', '.join(f'{s.views} for {s.name}' for s in STRATEGIES.values() if s.views > 1)}, "
        "but one for every 2.5 epochs at most, since more save nothing in this run; 1 without augmentation",
    )
    dtype: Precision = Field(
        "float32",
        description="precision of the cached features; bfloat16 and float16 take half of the space and are "
        "not exact",
    )
    max_gb: float = Field(
        20.0, gt=0, description="largest size of the whole cache; the least recently used files are removed"
    )


class AdviseSettings(Section):
    """How `strategy.name: auto` decides."""

    verify: bool = Field(
        False,
        description="also train the last stage briefly on cached features, and choose between it and the "
        "linear classifier by cross-validation",
    )


class TrackingSettings(Section):
    """Experiment trackers (docs/tracking.md). No result depends on them."""

    to: tuple[TrackerName, ...] = Field(
        (), description="experiment trackers that get the recipe, epochs and metrics; none by default"
    )
