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

from finetune.cache.shelf import Shelf
from finetune.data.sample import Dataset
from finetune.evaluation.predict import Predictions
from finetune.job.attempt import Job
from finetune.job.feeds import FEW, Feeds, Maker, Source, open_feeds
from finetune.job.figures import describe_solution, describe_training, evaluate
from finetune.job.prepare import Ready, place_network, reload_backbone
from finetune.job.solve import Solution, build_solved, fill_head, find_plain_head, solve_head
from finetune.runtime import Precision
from finetune.strategy.freeze import check_frozen, digest_frozen
from finetune.training.checkpoint import CheckpointStore
from finetune.training.optimizer import build_loss
from finetune.training.recovery import restart_epoch
from finetune.training.task import Task
from finetune.training.trainer import Trainer
from pretrained.backbone import Backbone


@dataclass(frozen=True)
class Fitted:
    """A network that is done, and what it says.

    Attributes:
        backbone: network and card, as they are handed over.
        predictions: of the judged part, uncalibrated.
        val: of the validation part, where that is another one.
        images: (B, 3, H, W) its first pictures.
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


def fit_network(job: Job, dataset: Dataset, changed: bool) -> Fitted:
    """Solve, or train, as the strategy says.

    Args:
        job: with the network on its device.
        dataset: the usable images.
        changed: something is otherwise than it was in an earlier attempt, and allowed to be.
    """
    strategy = job.ready.recipe.strategy
    if strategy.features is not None:
        network, plan = job.ready.backbone.network, job.ready.plan
        digests = digest_frozen(network, plan)
        solved = _hand_over(job, dataset, _solve(job, dataset, strategy.features), job.ready)
        check_frozen(network, plan, digests)
        return solved
    first = _solve(job, dataset, "last") if strategy.probe_first else None
    floor = first if strategy.floor == "last" else None
    if floor is None and strategy.floor is not None:
        floor = _solve(job, dataset, strategy.floor)
    trained, val = _train(job, dataset, changed, first)
    if floor is None or _beats(val, floor.predictions["val"]):
        return trained
    gave = f"training gave {val.accuracy:.4f} on validation, and {floor.words} gave"
    job.display.say(f"{gave} {floor.predictions['val'].accuracy:.4f}: the classifier is handed over")
    ready = replace(job.ready, backbone=reload_backbone(job.ready, dataset))
    place_network(ready.backbone.network, ready.placement)
    return _hand_over(job, dataset, floor, ready)


def _beats(trained: Predictions, floor: Predictions) -> bool:
    return (trained.accuracy, -trained.loss) > (floor.accuracy, -floor.loss)


# --- solved --------------------------------------------------------------------------------------


def _solve(job: Job, dataset: Dataset, choice: str) -> Solution:
    with job.clock.phase("solve"):
        digests = job.comparison.checked.digests
        solution = solve_head(job.ready, dataset, digests, choice, job.display)
    accuracy = solution.predictions["val"].accuracy
    job.display.say(f"{solution.words}: {accuracy:.4f} on validation")
    return solution


def _hand_over(job: Job, dataset: Dataset, solution: Solution, ready: Ready) -> Fitted:
    part = dataset.judged_split
    backbone = build_solved(ready, solution)
    with ExitStack() as stack:
        source = Source(ready, dataset, job.comparison.checked.digests, {})
        loader = Maker(source, Shelf(), job.display, stack).loader(part, here=True)
        images = next(loader.batches()).images[:FEW].clone()
    facts = describe_solution(ready, dataset, solution)
    val = solution.predictions["val"] if part != "val" else None
    return Fitted(backbone, solution.predictions[part], val, images, "float32", "float32", facts)


# --- trained -------------------------------------------------------------------------------------


def _train(job: Job, dataset: Dataset, changed: bool, first: Solution | None) -> tuple[Fitted, Predictions]:
    """Train by epochs; return what is judged, and what was said of validation images."""
    ready, display, clock = job.ready, job.display, job.clock
    network, plan, recipe = ready.backbone.network, ready.plan, ready.recipe
    digests = digest_frozen(network, plan)
    source = Source(ready, dataset, job.comparison.checked.digests, digests)
    with ExitStack() as stack:
        with clock.phase("trunk"):
            feeds = stack.enter_context(open_feeds(source, job.folder, display))
        keeps = recipe.strategy.head == "keep" or _start_head(network, first)
        trainer = _build_trainer(job, dataset, feeds, changed)
        with clock.phase("measure"):
            if recipe.strategy.name != "scratch":  # random features are not worth measuring
                trainer.standardize_head(keep=keeps)
        with clock.phase("train"), job.stop.gently():
            progress = trainer.fit()
        job.claim.check_owner()
        check_frozen(trainer.judged, plan, digests)
        with clock.phase("evaluate"):
            part = dataset.judged_split
            of_best = trainer.predictions  # nothing is computed twice
            predictions = of_best if part == "val" else evaluate(trainer, feeds.feeds[part], display)
            images = next(feeds.pictures[part].batches()).images[:FEW].clone()
    backbone = replace(ready.backbone, network=trainer.judged)
    facts = describe_training(dataset, progress)
    val = of_best if part != "val" else None
    fitted = Fitted(backbone, predictions, val, images, trainer.precision, recipe.cache.dtype, facts)
    return fitted, of_best


def _start_head(network: nn.Module, first: Solution | None) -> bool:
    """Let the head begin as a linear classifier that was solved; false where it cannot hold one."""
    head = find_plain_head(network, first) if first is not None else None
    if head is None or first is None:
        return False
    fill_head(head, first)
    return True


def _build_trainer(job: Job, dataset: Dataset, feeds: Feeds, changed: bool) -> Trainer:
    ready, settings = job.ready, job.ready.recipe.training
    precision = settings.precision
    assert precision != "auto"
    loss = build_loss(settings, dataset.counts("train")).to(ready.placement.device)
    train, val = feeds.feeds["train"], feeds.feeds["val"]
    task = Task(ready.backbone.network, ready.plan, loss, train, val, dataset.num_classes, feeds.split)
    store = CheckpointStore(job.folder.checkpoints, job.claim.attempt, job.claim.check_owner)
    start = store.load(job.display.warn)
    if start is None and job.claim.attempt > 1:
        job.display.say("no checkpoint was written before: training begins anew")
    steps = train.num_batches()
    # Steps as well: after a kill in between, the next attempt finds nothing changed.
    if start is not None and (changed or start.now.progress.steps_per_epoch != steps):
        start = restart_epoch(start, steps)
        store.save(start)  # the next attempt finds nothing changed, and must not go on inside of an epoch
    return Trainer(
        task,
        settings,
        precision=precision,
        seed=ready.recipe.seed,
        folder=job.folder,
        store=store,
        start=start,
        display=job.display,
        stop_asked=lambda: job.stop.asked,
        on_history=job.trackers.log_epochs,
    )
