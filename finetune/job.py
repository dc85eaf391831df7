"""The main job: from a recipe to a finished run.

::

    recipe -> dataset -> backbone -> plan -> training -> figures -> exported model
              checked     loaded     shown   drawn       written    proved by loading it again
"""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.data.check import check_bad, check_images
from finetune.data.discover import discover
from finetune.data.loader import Loader, Placement
from finetune.data.sample import Dataset, Split
from finetune.data.transforms import Transform, build_eval_transform, build_train_transform
from finetune.display import Display, SilentDisplay
from finetune.errors import (
    EnvironmentFaultError,
    FinetuneError,
    InternalError,
    InterruptedRunError,
    UsageError,
)
from finetune.evaluation.metrics import compute_confusion, compute_metrics
from finetune.evaluation.predict import Predictions, predict
from finetune.export.folder import export_model, measure_round_trip
from finetune.recipe import Facts, Recipe, StrategySettings, resolve_recipe
from finetune.runs.files import disk_error, write_csv, write_json, write_text
from finetune.runs.folder import RunFolder, claim_folder, outcome_of
from finetune.runtime import (
    describe_environment,
    resolve_device,
    resolve_precision,
    resolve_threads,
    resolve_workers,
    seed_everything,
)
from finetune.stopping import StopSignal
from finetune.strategy.freeze import check_frozen, digest_frozen
from finetune.strategy.matrix import PLAN_COLUMNS, Plan, build_plan
from finetune.training.checkpoint import Progress
from finetune.training.optimizer import build_loss
from finetune.training.trainer import Task, Trainer
from pretrained.backbone import Backbone, load_backbone
from pretrained.catalog import Card, Preprocessing, find_card

ROUND_TRIP_TOLERANCE = 1e-3
"""Largest difference in a probability between the trained network and its exported copy (layouts differ)."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its ``metrics.json``."""

    folder: RunFolder
    metrics: dict[str, Any]


@dataclass
class _Clock:
    """Seconds by phase, from a clock that never jumps."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - began, 3)


@dataclass(frozen=True)
class _Ready:
    """Everything that is decided before the output folder is taken."""

    recipe: Recipe
    dataset: Dataset
    backbone: Backbone
    placement: Placement


def run(recipe: Recipe, output: Path | None = None, display: Display | None = None) -> Run:
    """Fine-tune as a recipe says, and leave everything in a folder.

    Args:
        recipe: its "auto" values are decided here, and saved.
        output: the run folder; by default ``runs/<time>-<backbone>-<strategy>``. A folder that holds this
            very run goes on where it stopped.
        display: what the user sees; nothing by default.

    Returns:
        The run, finished.

    Raises:
        FinetuneError: every refusal and failure, with its exit code (docs/errors.md).
    """
    display = display or SilentDisplay()
    clock = _Clock()
    with StopSignal() as stop, _translated_errors():
        with clock.phase("load"):
            ready = _prepare(recipe, display)
        folder, finished = claim_folder(output or default_output(ready.recipe), ready.recipe)
        if finished:
            display.say(f"{folder.path} holds this run already, finished: nothing to do")
            return Run(folder, _read_metrics(folder))
        display.log_to(folder.log)
        with _recorded_outcome(folder, display):
            return _carry_out(ready, folder, display, clock, stop)


def default_output(recipe: Recipe) -> Path:
    """Return ``runs/<time>-<backbone>-<strategy>``."""
    name = find_card(recipe.backbone.name or "").architecture
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{recipe.strategy.name}"


# --- errors become outcomes ----------------------------------------------------------------------


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Everything that can end a run becomes a FinetuneError with a reason and a remedy."""
    try:
        yield
    except KeyboardInterrupt:
        found = "it was interrupted before or after training"
        raise InterruptedRunError("the run", found, "Give the same command again.") from None
    except torch.OutOfMemoryError as error:
        found = " ".join(str(error).split())[:200]
        fix = "Halve --batch-size, or lower --img-size."
        raise EnvironmentFaultError("training on the GPU", found, fix) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise disk_error(Path(error.filename or "."), error) from None


@contextmanager
def _recorded_outcome(folder: RunFolder, display: Display) -> Iterator[None]:
    """Write ``outcome.json`` for every end, and the traceback of an unforeseen one to the log."""
    folder.write_outcome("running", "the run is going on, or was killed")
    try:
        with _translated_errors():
            yield
    except FinetuneError as error:
        _write_failure(folder, error)
        raise
    except Exception as error:
        display.note(traceback.format_exc())
        fix = f"This is our fault: please report it with {folder.log}."
        internal = InternalError("the run", _last_line(error), fix)
        _write_failure(folder, internal)
        raise internal from error
    folder.write_outcome("done", "finished")


def _last_line(error: Exception) -> str:
    """An error from a decoding process carries its whole traceback; its last line says what it was."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"


def _write_failure(folder: RunFolder, error: FinetuneError) -> None:
    with suppress(FinetuneError):  # the disk may be what failed
        folder.write_outcome(*outcome_of(error))


def _read_metrics(folder: RunFolder) -> dict[str, Any]:
    import json

    metrics: dict[str, Any] = json.loads(folder.metrics.read_text(encoding="utf-8"))
    return metrics


# --- before the folder is taken ------------------------------------------------------------------


def _prepare(recipe: Recipe, display: Display) -> _Ready:
    name, data = _required(recipe)
    device = resolve_device(recipe.device)
    torch.set_num_threads(resolve_threads())
    dataset = discover(Path(data), recipe.data.val_fraction, recipe.seed)
    card = find_card(name)
    card = card.with_input(_preprocessing(recipe, card))
    backbone = _load_backbone(recipe, card, dataset, display)
    facts = Facts(
        device=str(device),
        precision=resolve_precision(device),
        channels_last=is_convolutional(backbone.network),
        workers=resolve_workers(device),
        num_train=len(dataset.of("train")),
        preprocessing=card.preprocessing.to_dict(),
    )
    resolved = resolve_recipe(_with_absolute_paths(recipe), facts)
    return _Ready(resolved, dataset, backbone, Placement(device, bool(resolved.training.channels_last)))


def _required(recipe: Recipe) -> tuple[str, str]:
    name, data = recipe.backbone.name, recipe.data.path
    if not name:
        raise UsageError(
            "finetune run", "no backbone was named", "Add --backbone NAME (see `finetune backbones`)."
        )
    if not data:
        raise UsageError("finetune run", "no data was named", "Add --data FOLDER.")
    return name, data


def _preprocessing(recipe: Recipe, card: Card) -> Preprocessing:
    """The card's own, except where the recipe says otherwise."""
    own = card.preprocessing.to_dict()
    asked = {key: value for key, value in dict(recipe.input).items() if key in own and value != "auto"}
    return Preprocessing(**own | asked)


def _load_backbone(recipe: Recipe, card: Card, dataset: Dataset, display: Display) -> Backbone:
    seed_everything(recipe.seed, "head")
    backbone = load_backbone(
        card,
        classes=dataset.classes,
        head=recipe.strategy.head,
        dropout=recipe.strategy.dropout,
        weights=recipe.backbone.weights,
        offline=recipe.backbone.offline,
        pretrained=recipe.strategy.name != "scratch",
    )
    display.say(f"backbone {backbone.card.name}: {backbone.match}")
    return backbone


def is_convolutional(network: nn.Module) -> bool:
    """Return whether convolutions hold most of a network's weights: those gain from channels-last memory."""
    total = sum(parameter.numel() for parameter in network.parameters())
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return 2 * sum(layer.weight.numel() for layer in layers) > total


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the saved recipe mean the same from any folder."""
    name, weights, data = recipe.backbone.name, recipe.backbone.weights, recipe.data.path
    backbone = {
        "name": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "weights": str(Path(weights).resolve()) if weights else None,
    }
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "data": recipe.data.model_copy(update={"path": str(Path(data or "").resolve())}),
        }
    )


# --- the run itself ------------------------------------------------------------------------------


def _carry_out(ready: _Ready, folder: RunFolder, display: Display, clock: _Clock, stop: StopSignal) -> Run:
    display.note(f"finetune: {ready.recipe.to_dict()}")
    with clock.phase("check"):
        dataset = _check_data(ready.dataset, folder, display)
    network = _place(ready.backbone.network, ready.placement)
    plan = _show_plan(ready, folder, display)
    write_json(folder.environment, describe_environment(ready.placement.device))
    loaders = _build_loaders(ready, dataset)
    trainer = _build_trainer(ready, dataset, network, plan, loaders, folder, display, stop)
    digests = digest_frozen(network, plan)
    with clock.phase("train"), stop.gently():
        if learns_new_head(ready.recipe.strategy):
            trainer.standardize_head()
        progress = trainer.fit()
    check_frozen(trainer.judged, plan, digests)
    with clock.phase("evaluate"):
        predictions = _evaluate(trainer, loaders, display)
    metrics = _metrics(ready, dataset, predictions, progress)
    _write_figures(folder, dataset, predictions, metrics)
    with clock.phase("export"):
        _export(ready, trainer.judged, folder, metrics, loaders["val"])
    metrics["seconds"] = clock.seconds | {"total": round(sum(clock.seconds.values()), 3)}
    write_json(folder.metrics, metrics)
    _say_result(display, folder, metrics)
    return Run(folder, metrics)


def learns_new_head(strategy: StrategySettings) -> bool:
    """Return whether a new classifier learns on features that are worth something from the start."""
    return strategy.head != "keep" and strategy.name != "scratch"


def _check_data(dataset: Dataset, folder: RunFolder, display: Display) -> Dataset:
    """Decode every image once, refuse what cannot be stood behind, and record the split."""
    for warning in dataset.warnings:
        display.warn(warning)
    with display.track("checking images", len(dataset.samples)) as advance:
        bad = check_images(dataset, on_progress=lambda _: advance(1, ""))
    if bad:
        rows = [(image.path, image.split, image.reason) for image in bad]
        write_csv(folder.bad_images, rows, ("path", "split", "reason"))
        for image in bad[:10]:
            display.warn(f"{image.path} cannot be read: {image.reason}")
    dataset = check_bad(dataset, bad)
    write_text(folder.classes, "".join(f"{name}\n" for name in dataset.classes))
    split = [(sample.path, dataset.classes[sample.label], sample.split) for sample in dataset.samples]
    write_csv(folder.split, split, ("path", "label", "split"))
    display.say(_data_sentence(dataset))
    return dataset


def _data_sentence(dataset: Dataset) -> str:
    splits: tuple[Split, ...] = ("train", "val", "test")
    parts = ", ".join(f"{len(dataset.of(split))} {split}" for split in splits if dataset.of(split))
    counts = dataset.counts("train")
    return (
        f"data {dataset.root}: {dataset.num_classes} classes, {parts}; {min(counts)} to {max(counts)} a class"
    )


def _place(network: nn.Module, placement: Placement) -> nn.Module:
    layout = torch.channels_last if placement.channels_last else torch.preserve_format
    return network.to(placement.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _show_plan(ready: _Ready, folder: RunFolder, display: Display) -> Plan:
    rate = ready.recipe.training.lr
    assert not isinstance(rate, str)
    plan = build_plan(ready.backbone.network, ready.backbone.stages, ready.recipe.strategy, rate)
    write_csv(folder.plan, [row.cells() for row in plan.rows], PLAN_COLUMNS)
    display.table(PLAN_COLUMNS, plan_cells(plan), numbers=("parameters", "rate"))
    return plan


def plan_cells(plan: Plan) -> list[list[str]]:
    """Return a plan as a table of text for people."""
    return [
        [
            row.group,
            row.stage.name,
            f"{row.num_parameters:,}",
            "yes" if row.trained else "-",
            f"{row.rate:g}",
            row.norm,
        ]
        for row in plan.rows
    ]


def _build_loaders(ready: _Ready, dataset: Dataset) -> dict[Split, Loader]:
    preprocessing = ready.backbone.card.preprocessing
    view = build_eval_transform(preprocessing)
    random_view = build_train_transform(preprocessing, ready.recipe.input.augmentation)
    loaders: dict[Split, Loader] = {
        "train": _loader(ready, dataset, "train", random_view),
        "val": _loader(ready, dataset, "val", view),
    }
    if dataset.of("test"):
        loaders["test"] = _loader(ready, dataset, "test", view)
    return loaders


def _loader(ready: _Ready, dataset: Dataset, split: Split, transform: Transform) -> Loader:
    recipe = ready.recipe
    batch_size, workers = recipe.training.batch_size, recipe.data.workers
    assert not isinstance(batch_size, str) and not isinstance(workers, str)
    return Loader(
        dataset,
        dataset.of(split),
        transform,
        batch_size=batch_size,
        placement=ready.placement,
        workers=workers,
        seed=recipe.seed,
        shuffle=split == "train",
    )


def _build_trainer(
    ready: _Ready,
    dataset: Dataset,
    network: nn.Module,
    plan: Plan,
    loaders: dict[Split, Loader],
    folder: RunFolder,
    display: Display,
    stop: StopSignal,
) -> Trainer:
    settings = ready.recipe.training
    precision = settings.precision
    assert precision != "auto"
    loss = build_loss(settings, dataset.counts("train")).to(ready.placement.device)
    task = Task(network, plan, loss, loaders["train"], loaders["val"], dataset.num_classes)
    return Trainer(
        task,
        settings,
        precision=precision,
        seed=ready.recipe.seed,
        folder=folder,
        display=display,
        stop_asked=lambda: stop.asked,
    )


# --- figures and files ---------------------------------------------------------------------------


def _evaluate(trainer: Trainer, loaders: dict[Split, Loader], display: Display) -> Predictions:
    loader = loaders.get("test", loaders["val"])
    with display.track("evaluating", len(loader.samples)) as advance:
        return predict(trainer.judged, loader, trainer.precision, lambda done: advance(done, ""))


def _metrics(ready: _Ready, dataset: Dataset, predictions: Predictions, progress: Progress) -> dict[str, Any]:
    split: Split = "test" if dataset.of("test") else "val"
    images = sum(row["seconds"] * row["images_per_second"] for row in progress.history)
    seconds = sum(row["seconds"] for row in progress.history)
    return compute_metrics(predictions, dataset.classes) | {
        "split": split,
        "split_chose_checkpoint": split == "val",
        "val_accuracy": progress.best["accuracy"],
        "val_loss": progress.best["loss"],
        "best_epoch": progress.best_epoch + 1,
        "epochs": progress.epoch,
        "images_per_second": round(images / seconds, 2),
        "backbone": ready.backbone.card.name,
        "strategy": ready.recipe.strategy.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.of("train")),
    }


def _write_figures(
    folder: RunFolder, dataset: Dataset, predictions: Predictions, metrics: dict[str, Any]
) -> None:
    samples, classes = dataset.of(metrics["split"]), dataset.classes
    confidence, predicted = predictions.probabilities.max(dim=1)
    rows = [
        (sample.path, classes[sample.label], classes[guess], sure, *probabilities)
        for sample, guess, sure, probabilities in zip(
            samples, predicted.tolist(), confidence.tolist(), predictions.probabilities.tolist(), strict=True
        )
    ]
    columns = ("path", "label", "predicted", "confidence", *(f"prob_{name}" for name in classes))
    write_csv(folder.predictions, rows, columns)
    confusion = compute_confusion(predictions).tolist()
    table = [(name, *counts) for name, counts in zip(classes, confusion, strict=True)]
    write_csv(folder.confusion_matrix, table, ("label", *classes))


def _export(
    ready: _Ready, network: nn.Module, folder: RunFolder, metrics: dict[str, Any], val: Loader
) -> None:
    export_model(ready.backbone, network, folder.model, metrics)
    images = next(val.batches()).images
    difference = measure_round_trip(network, folder.model, images)
    if difference > ROUND_TRIP_TOLERANCE:
        found = f"loaded again, its probabilities differ by up to {difference:.2g}"
        fix = "Do not use it; please report this with the backbone's name."
        raise InternalError(f"exporting {folder.model}", found, fix)


def _say_result(display: Display, folder: RunFolder, metrics: dict[str, Any]) -> None:
    chosen = " (which also chose the epoch)" if metrics["split_chose_checkpoint"] else ""
    display.say(
        f"accuracy {metrics['accuracy']:.4f}, balanced {metrics['balanced_accuracy']:.4f}, macro F1 "
        f"{metrics['f1_macro']:.4f} on {metrics['num_samples']} {metrics['split']} images{chosen}; "
        f"best epoch {metrics['best_epoch']} of {metrics['epochs']}, {metrics['seconds']['total']:.0f} s",
        style="bold",
    )
    display.say(f"run {folder.path}  model {folder.model}")
