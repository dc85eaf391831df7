"""What the other processes of a run do: the main one checks, claims and writes, and all of them fit.

::

    main process     recipe -> data checked -> folder claimed -.-> fit_network -> figures, model, report
    other processes  wait ------------------------------------ '-> help_fit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.data.dataset import Dataset
from finetune.features.network import place_network
from finetune.recipe import Recipe
from finetune.run.context import Clock, Work
from finetune.run.fit import help_fit
from finetune.run.setup import prepare_help
from finetune.runs.claim import Claim
from finetune.runs.outcome import translated_errors
from finetune.system.display import SilentDisplay
from finetune.system.distributed import Distributed
from finetune.system.signals import StopSignal
from finetune.training.ddp import share_weights
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


def share_work(work: Work | None, distributed: Distributed) -> None:
    """Tell the other processes what to help with, and give them the weights; None: there is nothing to do."""
    if distributed.size == 1:
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
    distributed.share(lambda: orders)
    if work is not None:
        share_weights(work.ready.backbone.network, distributed)


def help_run(distributed: Distributed) -> None:
    """Wait for the main process of a run, and do this process's part of the work.

    Raises:
        FinetuneError: this process or another one has failed.
    """
    with StopSignal() as stop, translated_errors(distributed=distributed):
        with stop.gently():  # the main process may be asked as well, and then says so
            orders: _Orders | None = distributed.receive()
        if orders is None:
            return
        ready = prepare_help(orders.recipe, orders.dataset, orders.card, orders.most_workers, distributed)
        share_weights(ready.backbone.network, distributed)
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
                distributed=distributed,
            )
        )
