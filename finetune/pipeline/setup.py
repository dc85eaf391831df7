"""Decisions made before the run folder is claimed, so that most refusals leave no files behind."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune.data.channels.depth import ValueRange
from finetune.data.dataset import Dataset
from finetune.data.loader import Placement
from finetune.data.samples import check_sample, is_sample
from finetune.errors import EnvironmentFaultError, UsageError, count
from finetune.features.network import place_network, prepare_machine
from finetune.features.runtime import choose_runtime
from finetune.pipeline.run_inputs import check_target, find_run_inputs, limit_augmentation
from finetune.recipe import AutoValues, Recipe, ResolvedRecipe, compute_batch_size, resolve_recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.strategies import AUTO, find_strategy, join_names
from finetune.system.compiler import check_compiler
from finetune.system.device import (
    Precision,
    find_lack_of_shared_memory,
    resolve_most_workers,
    resolve_precision,
    resolve_workers,
    seed_everything,
)
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.training.batch_size import StepTrial
from finetune.training.ddp import share_weights
from finetune.training.optim import check_optimizer
from finetune.training.plan import Plan, build_plan
from pretrained.backbone import Backbone, load_backbone
from pretrained.catalog import Card
from pretrained.graph.layers import Layers
from pretrained.loading import check_complete
from pretrained.network import is_convolutional


@dataclass(frozen=True)
class RunSetup:
    """What is decided before the run folder is taken.

    Attributes:
        recipe: resolved, without any "auto".
        backbone: with its weights.
        placement: device and layout of images.
        plan: what learns, and how fast.
        max_workers: decoding processes that there may be where their number was left to the program.
        source_card: of the backbone as it was published, at the size of the run's images.
    """

    recipe: ResolvedRecipe
    backbone: Backbone
    placement: Placement
    plan: Plan
    max_workers: int
    source_card: Card

    def with_value_range(self, value_range: ValueRange | None) -> RunSetup:
        """Return the decisions with the range of values of the training images; None keeps the backbone's."""
        if value_range is None:
            return self
        backbone, card = self.backbone.with_value_range(value_range), self.source_card
        return replace(self, backbone=backbone, source_card=card.with_value_range(value_range))


def prepare(
    recipe: Recipe, display: Display, distributed: Distributed = SINGLE_PROCESS
) -> tuple[RunSetup, Dataset]:
    """Find data and backbone, load the weights, and resolve every "auto".

    Rank 0 does the work; the other ranks need neither the weights' file nor a cache.

    Args:
        recipe: recipe that names data and backbone.
        display: progress display.
        distributed: ranks of the run.

    Returns:
        The decisions, and the images that were found.
    """
    device = prepare_machine(recipe, display, distributed)
    if recipe.training.compile:
        check_compiler(device)
    found, card = distributed.share(lambda: find_run_inputs(recipe, display))
    check_target(recipe, found)
    recipe = limit_augmentation(recipe, card, display)
    with display.busy(f"loading {recipe.backbone.name}"):
        backbone = _load_backbone(recipe, card, found.classes, distributed)
    display.say(f"backbone {backbone.card.name}: {backbone.match}")
    for note in backbone.match.notes:
        display.warn(note)
    if backbone.match.missing:
        tensors = count(len(backbone.match.missing), "tensor is", "tensors are")
        display.warn(f"{tensors} missing from the weights: random at first")
    precision = resolve_precision(device, distributed)

    def decide() -> tuple[ResolvedRecipe, int]:
        _check_features(recipe, backbone)
        facts = _collect_facts(recipe, backbone, device, precision, found, distributed)
        resolved = resolve_recipe(_with_absolute_paths(recipe), facts)
        batch_bytes = _batch_bytes(resolved.training.batch_size, backbone, distributed)
        return resolved, _limit_workers(recipe, batch_bytes, device, distributed, display)

    resolved, max_workers = distributed.share(decide)
    placement = Placement(device, bool(resolved.training.channels_last))
    plan = _plan(resolved, backbone)
    _check_frozen(resolved, backbone, plan)
    _check_batch_norm(resolved, device, distributed)
    setup = RunSetup(resolved, backbone, placement, plan, max_workers=max_workers, source_card=card)
    _check_single_images(setup)
    return setup, found


def fit_batches(setup: RunSetup, folder: RunFolder, distributed: Distributed = SINGLE_PROCESS) -> RunSetup:
    """Halve the batch size until a step fits on the device of every rank; an earlier choice is kept.

    The free memory of a shared GPU may change between attempts, but the run must not.
    """
    kept = distributed.share(lambda: _read_batch_size(folder))
    size = kept or min(distributed.collect(open_trial(setup, distributed.size).find_batch_size()))
    training = setup.recipe.training.model_copy(update={"batch_size": size})
    return replace(setup, recipe=setup.recipe.model_copy(update={"training": training}))


def keep_views(setup: RunSetup, folder: RunFolder, distributed: Distributed = SINGLE_PROCESS) -> RunSetup:
    """Take the number of cached views of an earlier attempt: a run that gets more epochs keeps its views."""
    recipe = setup.recipe
    views = distributed.share(lambda: _read_views(folder))
    if views is None or recipe.input.augmentation == "none":
        return setup
    cache = recipe.cache.model_copy(update={"views": views})
    return replace(setup, recipe=recipe.model_copy(update={"cache": cache}))


def keep_channels(setup: RunSetup, folder: RunFolder, distributed: Distributed = SINGLE_PROCESS) -> RunSetup:
    """Take the measured mean and deviation of an earlier attempt: a lost image must not change them."""
    before = distributed.share(lambda: RunReader(folder, tolerant=True).recipe)
    view, own = setup.backbone.card.preprocessing, setup.recipe.input
    if view.kind != "bands" or before is None or before.input.channels != own.channels:
        return setup
    mean, std = before.input.mean, before.input.std
    if mean == "auto" or std == "auto":
        return setup
    view = replace(view, mean=mean, std=std)
    section = own.model_copy(update={"mean": mean, "std": std})
    return replace(
        setup,
        recipe=setup.recipe.model_copy(update={"input": section}),
        backbone=setup.backbone.with_input(view),
        source_card=setup.source_card.with_input(view),
    )


def check_deterministic(setup: RunSetup, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Try a training step if the recipe allows deterministic operations only, before any image is read.

    Raises:
        RuntimeError: torch has no deterministic implementation of an operation; such as the gradient of VGG's
            and AlexNet's adaptive pooling on a GPU.
    """
    if setup.recipe.deterministic and setup.recipe.strategy.features is None:
        distributed.share(open_trial(setup).run_smallest)


def open_trial(setup: RunSetup, num_ranks: int = 1) -> StepTrial:
    """Return trial steps of a run's training."""
    network = place_network(setup.backbone.network, setup.placement)
    input_size = setup.backbone.card.preprocessing.input_size
    return StepTrial(network, setup.plan, input_size, setup.placement, setup.recipe.training, num_ranks)


def _read_batch_size(folder: RunFolder) -> int | None:
    before = RunReader(folder, tolerant=True).recipe  # the claim refuses a damaged one
    size = before.training.batch_size if before is not None else None
    return size if isinstance(size, int) else None


def _read_views(folder: RunFolder) -> int | None:
    before = RunReader(folder, tolerant=True).recipe
    return before.cache.views if before is not None and before.cache.views != "auto" else None


def _collect_facts(
    recipe: Recipe,
    backbone: Backbone,
    device: torch.device,
    precision: Precision,
    dataset: Dataset,
    distributed: Distributed,
) -> AutoValues:
    num_train, training = len(dataset.of("train")), recipe.training
    num_pixels = len(dataset.samples) * math.prod(backbone.card.preprocessing.size)
    in_precision = precision if training.precision == "auto" else training.precision
    batch_size = compute_batch_size(num_train) if training.batch_size == "auto" else training.batch_size
    batch_bytes = _batch_bytes(batch_size, backbone, distributed)
    return AutoValues(
        device=str(device),
        precision=precision,
        channels_last=is_convolutional(backbone.network),
        workers=resolve_workers(device, batch_bytes, distributed.machine.size),
        num_train=num_train,
        preprocessing=backbone.card.preprocessing.to_dict(),
        dropout=backbone.card.dropout,
        runtime=choose_runtime(recipe.runtime, backbone.network, device, in_precision, num_pixels),
        target=dataset.target.kind,
    )


def _limit_workers(
    recipe: Recipe, batch_bytes: int, device: torch.device, distributed: Distributed, display: Display
) -> int:
    """Return the most decoding processes of the program's choice, and warn where they lack shared memory."""
    asked = None if recipe.data.workers == "auto" else recipe.data.workers
    processes = distributed.machine.size
    if lack := find_lack_of_shared_memory(asked, device, batch_bytes, processes):
        display.warn(lack)
    return resolve_most_workers(batch_bytes, processes) if asked is None else 0


def _batch_bytes(batch_size: int, backbone: Backbone, distributed: Distributed) -> int:
    """Bytes of one process's part of a batch, on its way to the device."""
    return math.ceil(batch_size / distributed.size) * backbone.card.preprocessing.view_bytes


def _check_batch_norm(recipe: Recipe, device: torch.device, distributed: Distributed) -> None:
    asked = "training.sync_batch_norm=true"
    if not recipe.training.sync_batch_norm or distributed.size == 1:
        return
    if device.type != "cuda":
        found = "torch synchronises BatchNorm between GPUs only"
        raise EnvironmentFaultError(asked, found, "Leave it out, or use --gpus.")
    if recipe.training.microbatch:
        found = "training.microbatch may give ranks different numbers of microbatches"
        raise UsageError(asked, found, "Drop one of the two.")
    if recipe.strategy.norm_mode == "eval":
        found = "BatchNorm of pretrained stages keeps its running statistics (strategy.norm=eval)"
        raise UsageError(asked, found, "Add --set strategy.norm=train, or drop the key.")


def _check_frozen(recipe: ResolvedRecipe, backbone: Backbone, plan: Plan) -> None:
    """Refuse weights without a tensor of a stage that does not learn, or whose features are used."""
    whole = recipe.strategy.features is not None or recipe.strategy.name == AUTO
    stages = [row.stage for row in (plan.rows if whole else plan.frozen)]
    names = [name for stage in stages for name in (*stage.parameters, *stage.modules)]
    check_complete(backbone.match, names, backbone.card)


def _check_single_images(setup: RunSetup) -> None:
    """Refuse steps of one image with a network that cannot be trained on one.

    Raises:
        UsageError: a BatchNorm in train mode gets features of 1x1.
    """
    training = setup.recipe.training
    asked = {"--batch-size 1": training.batch_size, "training.microbatch=1": training.microbatch}
    single = next((key for key, value in asked.items() if value == 1), None)
    if single is None or setup.recipe.strategy.features is not None:
        return
    if not open_trial(setup).takes_single_images():
        found = (
            "a BatchNorm of this network, in train mode, gets features of 1x1, and one image has no variance"
        )
        frozen = ", or --set strategy.norm=eval, which keeps the statistics of the pretrained network"
        fix = f"Set it to 2 or more{'' if setup.recipe.strategy.starts_random else frozen}."
        raise UsageError(single, found, fix)


def _plan(recipe: ResolvedRecipe, backbone: Backbone) -> Plan:
    lr, epochs = recipe.training.lr, recipe.training.epochs
    return build_plan(backbone.network, backbone.stages, recipe.strategy, lr, epochs)


def check_asked(recipe: Recipe) -> None:
    """Refuse contradictory keys before data and backbone are looked up.

    Raises:
        UsageError: no data was given, or keys exclude each other.
    """
    if not recipe.data.path:
        raise UsageError("finetune run", "no data was named", "Add --data FOLDER, or --data sample:digits.")
    if is_sample(recipe.data.path):
        check_sample(recipe.data.path)
    if recipe.backbone.weights and recipe.strategy.starts_random:
        found = f"--strategy {recipe.strategy.name} starts from random weights"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, "Drop one of the two.")
    check_optimizer(recipe.training)
    if recipe.strategy.name != AUTO:  # which has rules of its own (pipeline/auto.py)
        _check_strategy(recipe)


def _check_strategy(recipe: Recipe) -> None:
    """Refuse keys that belong to another strategy, instead of ignoring them."""
    strategy = recipe.strategy
    kind = find_strategy(strategy.name)
    if strategy.features is not None and not kind.solvable:
        found = f"--strategy {strategy.name} trains the stages that these features come from"
        fix = f"Take --strategy {join_names(accept=lambda one: one.solvable)}."
        raise UsageError(f"strategy.features={strategy.features}", found, fix)
    if strategy.features is not None and strategy.head in ("keep", "extend"):
        found = f"head={strategy.head} keeps the classifier, and features solves a new one"
        raise UsageError(f"strategy.features={strategy.features}", found, "Drop one of the two.")
    given = {"probe_first": strategy.probe_first, "floor": strategy.floor}
    for key, value in given.items():
        if value and not kind.fine_tunes:
            found = f"--strategy {strategy.name} fine-tunes no pretrained stage"
            fix = f"Take --strategy {join_names(accept=lambda one: one.fine_tunes)}."
            raise UsageError(f"strategy.{key}={value}", found, fix)


def _load_backbone(recipe: Recipe, card: Card, classes: Sequence[str], distributed: Distributed) -> Backbone:
    """Load the weights in the main process, and give them to all others."""
    seed_everything(recipe.seed, "head")
    dropout, head = recipe.strategy.dropout, recipe.strategy.head
    backbone = load_backbone(
        card,
        classes=classes,
        head="replace" if head == "extend" else head,
        keeps_rows=head == "extend",
        dropout=None if dropout == "auto" else dropout,
        weights=recipe.backbone.weights,
        offline=recipe.backbone.offline or not distributed.is_main,
        pretrained=not recipe.strategy.starts_random and distributed.is_main,
    )
    share_weights(backbone.network, distributed)
    return backbone


def _check_features(recipe: Recipe, backbone: Backbone) -> None:
    """Refuse features that no linear classifier can be put on, before the output folder is taken."""
    strategy = recipe.strategy
    for key, name in (("features", strategy.features), ("floor", strategy.floor)):
        if name is None or name == "last":
            continue
        if backbone.card.taps:
            found = "the backbone is already a classifier on several stages"
            raise UsageError(f"strategy.{key}={name}", found, "Take last, or the backbone it was built from.")
        if name in ("best", "all"):
            continue
        layers = Layers(backbone.network.eval(), backbone.stages, backbone.card.preprocessing.input_size)
        try:
            chosen = layers.select([name])
        except UsageError as error:
            raise UsageError(f"strategy.{key}={name}", error.found, error.fix) from None
        if any(layers.reads_head(layer) for layer in chosen):
            found = "this layer is the classifier or contains it"
            raise UsageError(f"strategy.{key}={name}", found, "Take last, or a layer before it.")


def reload_backbone(
    setup: RunSetup, classes: Sequence[str], distributed: Distributed = SINGLE_PROCESS
) -> Backbone:
    """Return the backbone as it was before training, in every process."""
    return _load_backbone(setup.recipe, setup.source_card, classes, distributed)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the saved recipe mean the same from any folder."""
    weights, data = recipe.backbone.weights, recipe.data.path
    backbone = {
        "name": _absolute_name(recipe.backbone.name),
        "weights": _absolute(weights) if weights else None,
    }
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "data": recipe.data.model_copy(update={"path": _absolute_data(data or "")}),
        }
    )


def _absolute(path: str) -> str:
    """Without ``..``, and with links as the user knows them."""
    return os.path.abspath(path)  # noqa: PTH100 - Path.resolve follows links


def _absolute_data(path: str) -> str:
    return path if is_sample(path) else _absolute(path)


def _absolute_name(name: str | None) -> str | None:
    if name and name.startswith("local-dir:"):
        return f"local-dir:{_absolute(name.removeprefix('local-dir:'))}"
    return _absolute(name) if name and Path(name).is_dir() else name
