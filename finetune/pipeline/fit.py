"""Fit the network of a run: train it by epochs, or solve a linear classifier to its optimum.

::

    strategy.features        a linear classifier is solved on cached features, without epochs
    strategy.probe_first     the head is initialised with a solved classifier before training
    strategy.floor           a solved classifier that replaces training if it is better on validation
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from finetune.data.loader import ImageLoader
from finetune.errors import DataError
from finetune.evaluation.predictions import Predictions
from finetune.features.network import place_network
from finetune.pipeline.batches import DataLoaders, open_loaders
from finetune.pipeline.context import FitContext
from finetune.pipeline.image_loaders import FEW, LoaderFactory
from finetune.pipeline.linear_head import (
    LinearHead,
    build_solved,
    fill_head,
    find_plain_head,
    solve_head,
)
from finetune.pipeline.results import describe_solution, describe_training, evaluate
from finetune.pipeline.setup import reload_backbone
from finetune.recipe import StrategySettings
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.system.device import Precision
from finetune.targets import METRIC_NAMES
from finetune.training.checkpoint import CheckpointStore
from finetune.training.ddp import synchronize_batch_norm
from finetune.training.freeze import check_frozen, digest_frozen, frozen_tensors
from finetune.training.optim import find_odd_state, has_other_optimizer
from finetune.training.recovery import drop_optimizer, restart_epoch
from finetune.training.standardize import are_moments
from finetune.training.state import Checkpoint, find_misfit
from finetune.training.task import Task
from finetune.training.trainer import Trainer
from pretrained.backbone import Backbone


@dataclass(frozen=True)
class FitResult:
    """A fitted network and its predictions.

    Attributes:
        backbone: fitted network and its card.
        predictions: uncalibrated predictions on the evaluated split (test, or val if there is no test split).
        val: predictions on the validation split; None if that is the evaluated split.
        images: (B, 3, H, W) first images of the evaluated split, on the device.
        precision: precision of the forward pass that gave the predictions.
        dtype: precision of the cached features that gave the predictions.
        facts: entries for ``metrics.json``.
    """

    backbone: Backbone
    predictions: Predictions
    val: Predictions | None
    images: Tensor
    precision: Precision
    dtype: Precision
    facts: Mapping[str, Any]


def fit_network(context: FitContext) -> FitResult:
    """Solve or train, as the strategy says; every rank calls this."""
    setup, strategy = context.setup, context.setup.recipe.strategy
    if strategy.features is not None:
        digests = digest_frozen(setup.backbone.network, setup.plan)
        solved = _hand_over(context, _solve(context, strategy.features), setup.backbone)
        check_frozen(setup.backbone.network, setup.plan, digests)
        return solved
    solutions = {choice: _solve(context, choice) for choice in _choices(strategy)}
    floor = solutions.get(strategy.floor or "")
    trained, val = _train(context, solutions["last"] if strategy.probe_first else None)
    if floor is None or _beats(val, floor.predictions["val"]):
        return trained
    context.display.say(
        f"validation {METRIC_NAMES[val.target.score]} is {val.score:.4f} after training, and "
        f"{floor.predictions['val'].score:.4f} for {floor.description}: the linear classifier is taken"
    )
    backbone = reload_backbone(setup, context.dataset.classes, context.distributed)
    place_network(backbone.network, setup.placement)
    return _hand_over(context, floor, backbone)


def _choices(strategy: StrategySettings) -> list[str]:
    """Return the feature choices that need a solved classifier beside training, without duplicates."""
    asked = ["last" if strategy.probe_first else None, strategy.floor]
    return list(dict.fromkeys(choice for choice in asked if choice is not None))


def _beats(trained: Predictions, floor: Predictions) -> bool:
    return (trained.score, -trained.loss) > (floor.score, -floor.loss)


# --- solved --------------------------------------------------------------------------------------


def _solve(context: FitContext, choice: str) -> LinearHead:
    with context.clock.phase("solve"):
        solution = solve_head(context, choice)
    val = solution.predictions["val"]
    name = METRIC_NAMES[val.target.score]
    context.display.say(f"{solution.description}: validation {name} {val.score:.4f}")
    return solution


def _hand_over(context: FitContext, solution: LinearHead, backbone: Backbone) -> FitResult:
    """Build the result from a solved classifier on a pretrained backbone."""
    setup = replace(context.setup, backbone=backbone)
    dataset, part = context.dataset, context.dataset.eval_split
    solved = build_solved(setup, solution)

    with ExitStack() as stack:
        factory = LoaderFactory(replace(context, setup=setup), stack, FeatureCacheDir())
        images = _take_first_images(context, factory.loader(part, here=True))
    return FitResult(
        solved,
        solution.predictions[part],
        solution.predictions["val"] if part != "val" else None,
        images,
        precision="float32",
        dtype="float32",
        facts=describe_solution(setup, dataset, solution),
    )


def _take_first_images(context: FitContext, loader: ImageLoader) -> Tensor:
    """Return the first images of a loader on the device; they are the same on every rank."""

    def take() -> Tensor:
        return next(loader.batches()).images[:FEW].cpu()

    return context.distributed.share(take).to(context.setup.placement.device)


# --- trained -------------------------------------------------------------------------------------


def _train(context: FitContext, first: LinearHead | None) -> tuple[FitResult, Predictions]:
    """Train by epochs, and evaluate the network of the best one.

    Args:
        context: the running attempt.
        first: solved classifier that initialises the head; None for a random head.

    Returns:
        The result of the run, and the predictions on the validation split.
    """
    setup, dataset, clock, distributed = context.setup, context.dataset, context.clock, context.distributed
    network, recipe = setup.backbone.network, setup.recipe
    part = dataset.eval_split
    digests = digest_frozen(network, setup.plan)
    with ExitStack() as stack:
        with clock.phase("trunk"):
            loaders = stack.enter_context(open_loaders(context, digests))
        keeps_head = recipe.strategy.head in ("keep", "extend") or _start_head(network, first)
        trainer = _build_trainer(context, loaders)
        with clock.phase("measure"):
            # Random features are not worth measuring.
            trainer.standardize_head(keep=keeps_head, measure=not recipe.strategy.starts_random)
        if recipe.training.sync_batch_norm and distributed.size > 1:
            synchronize_batch_norm(network)  # after rank 0 measured the features alone
        distributed.wait()  # machines may differ in speed
        with clock.phase("train"), context.stop.gently():
            trainer.fit()
        if distributed.is_main:
            context.claim.check_owner()
        check_frozen(trainer.eval_network, setup.plan, digests)
        with clock.phase("evaluate"):
            of_best = trainer.predictions  # already computed during training
            tested = of_best if part == "val" else evaluate(trainer, loaders.batches[part], context.display)
        images = _take_first_images(context, loaders.images[part])
    result = FitResult(
        replace(setup.backbone, network=trainer.eval_network),
        tested,
        of_best if part != "val" else None,
        images,
        precision=trainer.precision,
        dtype=recipe.cache.dtype,
        facts=describe_training(dataset, trainer.progress, recipe.training.monitor),
    )
    return result, of_best


def _start_head(network: nn.Module, first: LinearHead | None) -> bool:
    """Initialise the head with a solved classifier; return False if it has no layer of that shape."""
    head = find_plain_head(network, first) if first is not None else None
    if head is None or first is None:
        return False
    fill_head(head, first)
    return True


def _build_trainer(context: FitContext, loaders: DataLoaders) -> Trainer:
    setup, settings, dataset = context.setup, context.setup.recipe.training, context.dataset
    precision = settings.precision
    train = loaders.batches["train"]
    labels, weights = dataset.encode(dataset.of("train")), settings.class_weights
    loss = dataset.target.build_loss(
        labels, dataset.num_classes, weights, settings.label_smoothing, settings.huber_delta
    )
    task = Task(
        setup.backbone.network,
        setup.plan,
        loss.to(setup.placement.device),
        train=train,
        val=loaders.batches["val"],
        num_classes=dataset.num_classes,
        cut_network=loaders.cut_network,
    )
    store = CheckpointStore(context.folder.checkpoints, context.claim.attempt, context.claim.check_owner)
    return Trainer(
        task,
        settings,
        precision=precision,
        seed=setup.recipe.seed,
        folder=context.folder,
        store=store,
        start=context.distributed.share(lambda: _find_start(context, store, train.num_batches())),
        display=context.display,
        stop_asked=lambda: context.stop.asked,
        on_history=context.on_history,
        distributed=context.distributed,
    )


def _find_start(context: FitContext, store: CheckpointStore, steps: int) -> Checkpoint | None:
    """Return the checkpoint to resume from, moved to the start of its epoch if anything changed since.

    Raises:
        DataError: its tensors are not those of this training.
    """
    store.clean()
    start = store.load(context.display.warn)
    if start is None and context.claim.attempt > 1:
        context.display.say("there is no checkpoint yet: training starts from the beginning")
    if start is None:
        return None
    # Compare these too: after a kill between the two writes, `changed` is false on the next attempt.
    is_other = has_other_optimizer(start, context.setup.recipe.training)
    if is_other:
        name = context.setup.recipe.training.optimizer
        context.display.warn(f"the checkpoint holds the state of another optimizer: {name} starts afresh")
        start = drop_optimizer(start)
    _check_fits(context, start)
    if context.changed or is_other or start.now.progress.steps_per_epoch != steps:
        start = restart_epoch(start, steps)
        store.save(start)  # the next attempt sees no change, and must not resume inside the epoch
    return start


def _check_fits(context: FitContext, start: Checkpoint) -> None:
    """Refuse a checkpoint of other tensors: only its bytes were compared with their sha256."""
    setup = context.setup
    network, has_average = setup.backbone.network, setup.recipe.training.ema_decay is not None
    found = find_misfit(start, network, frozen_tensors(network, setup.plan), has_average)
    if not found and (name := find_odd_state(start, network)):
        found = f"the optimizer's tensor {name[:100]} of its checkpoint does not fit this network"
    if not found and not are_moments(network, start.now.under("moments.")):
        found = "its checkpoint holds means and deviations of features that do not fit this classifier"
    if found:
        fix = "Restore the checkpoints from a backup, or start a new run with another --output."
        raise DataError(f"resuming {context.folder.path}", found, fix)
