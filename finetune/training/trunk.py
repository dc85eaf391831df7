"""Where the frozen trunk ends, and whether keeping what it gives is worth the room.

In ``freeze`` and ``top`` the stages under those that learn are constant: what they make of a picture is the
same in every epoch. So the network is cut where the learning begins, and the trunk runs once for each
picture and view. The best cut saves the most work, and carries the fewest numbers of those that save as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from finetune.data.loader import Placement
from finetune.errors import UsageError
from finetune.evaluation.predict import autocast
from finetune.recipe import Recipe
from finetune.runtime import Precision
from finetune.strategy.freeze import set_train_mode
from finetune.strategy.matrix import Plan
from pretrained.graph.cuts import Cut, Trace, find_cuts, trace_calls
from pretrained.graph.split import Split, split_at

LEAST_SHARE = 0.3
"""Of the forward's multiplications that a cut must save."""
MOST_TRIES = 12
"""Cuts that are tried before the plain loop is taken. Nearly always the first one holds."""


@dataclass(frozen=True)
class Choice:
    """The cut that was chosen, or why there is none.

    Attributes:
        split: the network in two parts; None trains through the whole network.
        words: what was chosen and why, for people; empty where there is nothing to say.
    """

    split: Split | None
    words: str


def find_reason_against(recipe: Recipe, plan: Plan) -> str | None:
    """Say why no trunk is to be kept, before anything is tried.

    Returns:
        None where nothing speaks against it; no words where it was not asked for, or nothing is frozen.
    """
    if not recipe.cache.trunk or not plan.frozen:
        return ""
    if recipe.training.mixup or recipe.training.cutmix:
        return "every epoch runs the whole network: mixup and cutmix mix pictures, not features"
    return None


def choose_split(
    network: nn.Module,
    plan: Plan,
    input_size: tuple[int, int, int],
    placement: Placement,
    precision: Precision,
    find_obstacle: Callable[[Cut], str],
) -> Choice:
    """Cut a network above everything that learns.

    Args:
        network: on its device; left as it was.
        plan: what learns.
        input_size: (C, H, W) of the pictures.
        placement: device and layout of the pictures.
        precision: of the forward pass.
        find_obstacle: says why what a cut carries has no room; nothing where it has.
    """
    trained = {name for row in plan.trained for name in row.stage.parameters}
    try:
        trace = trace_calls(network, input_size)
    except UsageError as error:
        return Choice(None, f"every epoch runs the whole network, which cannot be cut: {error.found}")
    cuts = find_cuts(trace, trained)
    if not cuts:
        return Choice(None, "every epoch runs the whole network: it has no place to be cut above what learns")
    if cuts[0].share < LEAST_SHARE:
        return Choice(
            None, f"every epoch runs the whole network: its trunk is only {cuts[0].share:.0%} of the work"
        )
    layout = torch.channels_last if placement.channels_last else torch.contiguous_format
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    images = images.to(placement.device, memory_format=layout)
    with autocast(placement.device, precision):
        return _try(network, trace, cuts, images, partial(set_train_mode, network, plan), find_obstacle)


def _try(
    network: nn.Module,
    trace: Trace,
    cuts: Iterable[Cut],
    images: torch.Tensor,
    to_train_mode: Callable[[], None],
    find_obstacle: Callable[[Cut], str],
) -> Choice:
    """Take the first cut that has room and holds."""
    obstacles: list[str] = []
    tries = 0
    for cut in cuts:
        if cut.share < LEAST_SHARE or tries == MOST_TRIES:
            break
        if obstacle := find_obstacle(cut):
            obstacles.append(f"the features at {cut.name} take {obstacle}")
            continue
        tries += 1
        if split := split_at(network, trace, cut, images, to_train_mode):
            words = f"cut at {cut.name}, which saves {cut.share:.0%} of the forward"
            return Choice(split, words + (f" ({obstacles[0]})" if obstacles else ""))
    why = obstacles[0] if obstacles else f"none of {tries} cuts gives what the whole network gives"
    return Choice(None, f"every epoch runs the whole network: {why}")
