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

from finetune.evaluation.predictions import Predictions
from finetune.features.network import place_network
from finetune.recipe import StrategySettings
from finetune.run.batches import FEW, DataLoaders, LoaderFactory, Source, open_loaders
from finetune.run.context import Work
from finetune.run.linear_head import (
    LinearHead,
    build_solved,
    fill_head,
    find_plain_head,
    open_solvable,
    solve_head,
)
from finetune.run.results import describe_solution, describe_training, evaluate
from finetune.run.setup import Ready, reload_backbone
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.strategies import starts_random
from finetune.system.device import Precision
from finetune.targets import build_loss
from finetune.training.checkpoint import CheckpointStore
from finetune.training.ddp import share_weights, synchronize_batch_norm
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
        images: (B, 3, H, W) its first images.
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


def fit_network(work: Work) -> FitResult:
    """Solve, or train, as the strategy says: in the main process, while the others :func:`help_fit`."""
    strategy = work.ready.recipe.strategy
    if strategy.features is not None:
        network, plan = work.ready.backbone.network, work.ready.plan
        digests = digest_frozen(network, plan)
        solved = _hand_over(work, _solve(work, strategy.features), work.ready)
        check_frozen(network, plan, digests)
        return solved
    solutions = {choice: _solve(work, choice) for choice in _choices(strategy)}
    floor = solutions.get(strategy.floor or "")
    trained, val = _train(work, solutions["last"] if strategy.probe_first else None)
    if floor is None or _beats(val, floor.predictions["val"]):
        return trained
    gave = f"training gave {val.accuracy:.4f} on validation, and {floor.words} gave"
    work.display.say(f"{gave} {floor.predictions['val'].accuracy:.4f}: the classifier is handed over")
    ready = replace(work.ready, backbone=reload_backbone(work.ready, work.dataset))
    place_network(ready.backbone.network, ready.placement)
    return _hand_over(work, floor, ready)


def help_fit(work: Work) -> None:
    """Do what the other processes of a run do while the main one runs :func:`fit_network`."""
    strategy = work.ready.recipe.strategy
    for choice in _choices(strategy) if strategy.features is None else [strategy.features]:
        with open_solvable(work, choice):
            pass
    if strategy.features is None:
        with ExitStack() as stack:
            _train_together(work, None, stack)


def _choices(strategy: StrategySettings) -> list[str]:
    """Return the features that a linear classifier is solved on beside training, without repetition."""
    asked = ["last" if strategy.probe_first else None, strategy.floor]
    return list(dict.fromkeys(choice for choice in asked if choice is not None))


def _beats(trained: Predictions, floor: Predictions) -> bool:
    return (trained.accuracy, -trained.loss) > (floor.accuracy, -floor.loss)


# --- solved --------------------------------------------------------------------------------------


def _solve(work: Work, choice: str) -> LinearHead:
    with work.clock.phase("solve"):
        solution = solve_head(work, choice)
    accuracy = solution.predictions["val"].accuracy
    work.display.say(f"{solution.words}: {accuracy:.4f} on validation")
    return solution


def _hand_over(work: Work, solution: LinearHead, ready: Ready) -> FitResult:
    dataset = work.dataset
    part = dataset.judged_split
    backbone = build_solved(ready, solution)
    with ExitStack() as stack:
        source = Source(ready, dataset, work.digests, {})
        loader = LoaderFactory(source, FeatureCacheDir(), work.display, stack).loader(part, here=True)
        images = next(loader.batches()).images[:FEW].clone()
    facts = describe_solution(ready, dataset, solution)
    val = solution.predictions["val"] if part != "val" else None
    return FitResult(backbone, solution.predictions[part], val, images, "float32", "float32", facts)


# --- trained -------------------------------------------------------------------------------------


def _train(work: Work, first: LinearHead | None) -> tuple[FitResult, Predictions]:
    """Train by epochs; return what is judged, and what was said of validation images."""
    ready, dataset = work.ready, work.dataset
    with ExitStack() as stack:
        trainer, loaders, predictions = _train_together(work, first, stack)
        of_best = trainer.predictions  # nothing is computed twice
        images = next(loaders.images[dataset.judged_split].batches()).images[:FEW].clone()
    backbone = replace(ready.backbone, network=trainer.judged)
    facts = describe_training(dataset, trainer.progress)
    val = of_best if dataset.judged_split != "val" else None
    dtype = ready.recipe.cache.dtype
    return FitResult(backbone, predictions, val, images, trainer.precision, dtype, facts), of_best


def _train_together(
    work: Work, first: LinearHead | None, stack: ExitStack
) -> tuple[Trainer, DataLoaders, Predictions]:
    """Train and judge, in every process; the trainer ends at its best, and predicts the judged part."""
    ready, clock, distributed = work.ready, work.clock, work.distributed
    network, plan, recipe = ready.backbone.network, ready.plan, ready.recipe
    digests = digest_frozen(network, plan)
    source = Source(ready, work.dataset, work.digests, digests, distributed)
    with clock.phase("trunk"):
        loaders = stack.enter_context(open_loaders(source, work.folder, work.display))
    keeps = distributed.share(lambda: recipe.strategy.head == "keep" or _start_head(network, first))
    if recipe.strategy.probe_first:  # the main process has solved the head
        share_weights(network, distributed)
    trainer = _build_trainer(work, loaders)
    with clock.phase("measure"):
        if not starts_random(recipe.strategy.name):  # random features are not worth measuring
            trainer.standardize_head(keep=keeps)
    if recipe.training.sync_batch_norm and distributed.size > 1:
        synchronize_batch_norm(network)  # not before features are measured by one
    distributed.wait()  # one machine may have been faster
    with clock.phase("train"), work.stop.gently():
        trainer.fit()
    if distributed.is_main:
        work.claim.check_owner()
    check_frozen(trainer.judged, plan, digests)
    with clock.phase("evaluate"):
        part = work.dataset.judged_split
        of_best = trainer.predictions
        judged = of_best if part == "val" else evaluate(trainer, loaders.loaders[part], work.display)
    return trainer, loaders, judged


def _start_head(network: nn.Module, first: LinearHead | None) -> bool:
    """Let the head begin as a linear classifier that was solved; false where it cannot hold one."""
    head = find_plain_head(network, first) if first is not None else None
    if head is None or first is None:
        return False
    fill_head(head, first)
    return True


def _build_trainer(work: Work, loaders: DataLoaders) -> Trainer:
    ready, settings = work.ready, work.ready.recipe.training
    precision = settings.precision
    assert precision != "auto"
    counts = work.dataset.counts("train")
    loss = build_loss(counts, settings.class_weights, settings.label_smoothing).to(ready.placement.device)
    train, val = loaders.loaders["train"], loaders.loaders["val"]
    task = Task(ready.backbone.network, ready.plan, loss, train, val, work.dataset.num_classes, loaders.split)
    store = CheckpointStore(work.folder.checkpoints, work.claim.attempt, work.claim.check_owner)
    return Trainer(
        task,
        settings,
        precision=precision,
        seed=ready.recipe.seed,
        folder=work.folder,
        store=store,
        start=work.distributed.share(lambda: _find_start(work, store, train.num_batches())),
        display=work.display,
        stop_asked=lambda: work.stop.asked,
        on_history=work.on_history,
        distributed=work.distributed,
    )


def _find_start(work: Work, store: CheckpointStore, steps: int) -> Checkpoint | None:
    """Return where an earlier attempt was; at the start of an epoch where anything has changed since."""
    start = store.load(work.display.warn)
    if start is None and work.claim.attempt > 1:
        work.display.say("no checkpoint was written before: training begins anew")
    # Steps as well: after a kill in between, the next attempt finds nothing changed.
    if start is not None and (work.changed or start.now.progress.steps_per_epoch != steps):
        start = restart_epoch(start, steps)
        store.save(start)  # the next attempt finds nothing changed, and must not go on inside of an epoch
    return start
