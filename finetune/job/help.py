"""What the other processes of a run do: the main one checks, claims and writes, and all of them fit.

::

    main process     recipe -> data checked -> folder claimed -.-> fit_network -> figures, model, report
    other processes  wait ------------------------------------ '-> help_fit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.data.sample import Dataset
from finetune.display import SilentDisplay
from finetune.job.attempt import Clock, Work
from finetune.job.fit import help_fit
from finetune.job.outcome import translated_errors
from finetune.job.prepare import place_network, prepare_help
from finetune.recipe import Recipe
from finetune.runs.claim import Claim
from finetune.stopping import StopSignal
from finetune.training.parallel import share_weights
from finetune.world import World
from pretrained.catalog import Card


@dataclass(frozen=True)
class _Orders:
    """What the main process has decided; the rest follows from it."""

    recipe: Recipe
    dataset: Dataset
    digests: Mapping[str, str]
    changed: bool
    claim: Claim
    card: Card
    most_workers: int


def share_work(work: Work | None, world: World) -> None:
    """Tell the other processes what to help with, and give them the weights; None: there is nothing to do."""
    if world.size == 1:
        return
    orders = None
    if work is not None:
        ready = work.ready
        orders = _Orders(
            ready.recipe,
            work.dataset,
            work.digests,
            work.changed,
            work.claim,
            ready.source_card,
            ready.most_workers,
        )
    world.share(lambda: orders)
    if work is not None:
        share_weights(work.ready.backbone.network, world)


def help_run(world: World) -> None:
    """Wait for the main process of a run, and do this process's part of the work.

    Raises:
        FinetuneError: this process or another one has failed.
    """
    with StopSignal() as stop, translated_errors(world=world):
        with stop.gently():  # the main process may be asked as well, and then says so
            orders: _Orders | None = world.receive()
        if orders is None:
            return
        ready = prepare_help(orders.recipe, orders.dataset, orders.card, orders.most_workers, world)
        share_weights(ready.backbone.network, world)
        place_network(ready.backbone.network, ready.placement)
        help_fit(
            Work(
                ready,
                orders.dataset,
                orders.digests,
                orders.changed,
                orders.claim,
                SilentDisplay(),
                Clock(),
                stop,
                world=world,
            )
        )
