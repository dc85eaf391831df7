"""From a plan to a network with figures: trained by epochs, or a linear classifier solved to its optimum.

::

    strategy.features        solved on kept features, no epochs
    strategy.probe_first     the head begins as that solution
    strategy.floor           a solution that training must beat on validation, or it is handed over instead
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from finetune.data.loader import ImageLoader
from finetune.evaluation.predictions import Predictions
from finetune.features.network import place_network
from finetune.pipeline.batches import FEW, DataLoaders, LoaderFactory, open_loaders
from finetune.pipeline.context import FitContext
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
from finetune.targets import build_loss
from finetune.training.checkpoint import CheckpointStore
from finetune.training.ddp import synchronize_batch_norm
from finetune.training.freeze import check_frozen, digest_frozen
from finetune.training.recovery import restart_epoch
from finetune.training.state import Checkpoint
from finetune.training.task import Task
from finetune.training.trainer import Trainer
from pretrained.backbone import Backbone


@dataclass(frozen=True)
class FitResult:
    """A network that is done, and what it says.

    Attributes:
        backbone: network and card, as they are handed over.
        predictions: of the judged part, uncalibrated.
        val: of the validation part, where that is another one.
        images: (B, 3, H, W) its first images, on the device.
        precision: of the forward pass that the predictions come from.
        dtype: of the features that they come from.
        facts: for ``metrics.json``.
    """

    backbone: Backbone
    predictions: Predictions
    val: Predictions | None
    images: Tensor
    precision: Precision
    dtype: Precision
    facts: Mapping[str, Any]


def fit_network(context: FitContext) -> FitResult:
    """Solve, or train, as the strategy says: in every process alike."""
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
    gave = f"training gave {val.accuracy:.4f} on validation, and {floor.words} gave"
    context.display.say(f"{gave} {floor.predictions['val'].accuracy:.4f}: the classifier is handed over")
    backbone = reload_backbone(setup, context.dataset.classes, context.distributed)
    place_network(backbone.network, setup.placement)
    return _hand_over(context, floor, backbone)


def _choices(strategy: StrategySettings) -> list[str]:
    """Return the features that a linear classifier is solved on beside training, without repetition."""
    asked = ["last" if strategy.probe_first else None, strategy.floor]
    return list(dict.fromkeys(choice for choice in asked if choice is not None))


def _beats(trained: Predictions, floor: Predictions) -> bool:
    return (trained.accuracy, -trained.loss) > (floor.accuracy, -floor.loss)


# --- solved --------------------------------------------------------------------------------------


def _solve(context: FitContext, choice: str) -> LinearHead:
    with context.clock.phase("solve"):
        solution = solve_head(context, choice)
    accuracy = solution.predictions["val"].accuracy
    context.display.say(f"{solution.words}: {accuracy:.4f} on validation")
    return solution


def _hand_over(context: FitContext, solution: LinearHead, backbone: Backbone) -> FitResult:
    """Put a solution on a pretrained backbone."""
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
    """Return the first images of a loader on the device, the same ones in every process."""

    def take() -> Tensor:
        return next(loader.batches()).images[:FEW].cpu()

    return context.distributed.share(take).to(context.setup.placement.device)


# --- trained -------------------------------------------------------------------------------------


def _train(context: FitContext, first: LinearHead | None) -> tuple[FitResult, Predictions]:
    """Train by epochs, and evaluate the network of the best one.

    Args:
        context: of the run.
        first: that the head begins as.

    Returns:
        What is handed over, and the predictions on the validation split.
    """
    setup, dataset, clock, distributed = context.setup, context.dataset, context.clock, context.distributed
    network, recipe = setup.backbone.network, setup.recipe
    part = dataset.eval_split
    digests = digest_frozen(network, setup.plan)
    with ExitStack() as stack:
        with clock.phase("trunk"):
            loaders = stack.enter_context(open_loaders(context, digests))
        keeps_head = recipe.strategy.head == "keep" or _start_head(network, first)
        trainer = _build_trainer(context, loaders)
        with clock.phase("measure"):
            if not recipe.strategy.starts_random:  # random features are not worth measuring
                trainer.standardize_head(keep=keeps_head)
        if recipe.training.sync_batch_norm and distributed.size > 1:
            synchronize_batch_norm(network)  # not before features are measured by one
        distributed.wait()  # one machine may have been faster
        with clock.phase("train"), context.stop.gently():
            trainer.fit()
        if distributed.is_main:
            context.claim.check_owner()
        check_frozen(trainer.judged, setup.plan, digests)
        with clock.phase("evaluate"):
            of_best = trainer.predictions  # nothing is computed twice
            judged = of_best if part == "val" else evaluate(trainer, loaders.batches[part], context.display)
        images = _take_first_images(context, loaders.images[part])
    result = FitResult(
        replace(setup.backbone, network=trainer.judged),
        judged,
        of_best if part != "val" else None,
        images,
        precision=trainer.precision,
        dtype=recipe.cache.dtype,
        facts=describe_training(dataset, trainer.progress),
    )
    return result, of_best


def _start_head(network: nn.Module, first: LinearHead | None) -> bool:
    """Let the head begin as a linear classifier that was solved; false where it cannot hold one."""
    head = find_plain_head(network, first) if first is not None else None
    if head is None or first is None:
        return False
    fill_head(head, first)
    return True


def _build_trainer(context: FitContext, loaders: DataLoaders) -> Trainer:
    setup, settings, dataset = context.setup, context.setup.recipe.training, context.dataset
    precision = settings.precision
    assert precision != "auto"
    counts, train = dataset.counts("train"), loaders.batches["train"]
    loss = build_loss(counts, settings.class_weights, settings.label_smoothing)
    task = Task(
        setup.backbone.network,
        setup.plan,
        loss.to(setup.placement.device),
        train=train,
        val=loaders.batches["val"],
        num_classes=dataset.num_classes,
        split=loaders.split,
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
    """Return where an earlier attempt was; at the start of an epoch where anything has changed since."""
    start = store.load(context.display.warn)
    if start is None and context.claim.attempt > 1:
        context.display.say("no checkpoint was written before: training begins anew")
    # Steps as well: after a kill in between, the next attempt finds nothing changed.
    if start is not None and (context.changed or start.now.progress.steps_per_epoch != steps):
        start = restart_epoch(start, steps)
        store.save(start)  # the next attempt finds nothing changed, and must not go on inside of an epoch
    return start
