"""The frozen trunk: where to cut the network, and batches of the trunk's cached features.

With ``freeze`` and ``top`` the stages below the trained ones are constant, so their output for an image is
the same in every epoch. The network is cut below the trained stages, and the trunk runs once for each image
and view. The best cut saves the most work; of equal ones, it has the fewest features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, Placement, plan_epoch, take_share
from finetune.errors import UsageError
from finetune.features.rows import Rows
from finetune.recipe import Recipe
from finetune.system.device import Precision
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.forward import autocast
from finetune.targets import Target
from finetune.training.freeze import set_train_mode
from finetune.training.plan import Plan
from pretrained.graph.cut_network import CutNetwork, cut_at
from pretrained.graph.cuts import Cut, Trace, find_cuts, trace_calls

MIN_SAVING = 0.3
"""Smallest share of the forward pass's multiplications that a cut must save."""
MAX_TRIED_CUTS = 12
"""Cuts that are tried before training falls back to the whole network. The first one nearly always works."""


@dataclass(frozen=True)
class CutChoice:
    """The cut that was chosen, or the reason why there is none.

    Attributes:
        cut_network: the network as a frozen trunk and the rest; None if every epoch runs the whole network.
        reason: message for the user about this choice; empty if there is nothing to report.
    """

    cut_network: CutNetwork | None
    reason: str


def find_reason_against(recipe: Recipe, plan: Plan) -> str | None:
    """Return why the network is not to be cut, before any cut is tried.

    Returns:
        None if a cut may be tried; an empty text if the recipe turns it off or no stage is frozen.
    """
    if not recipe.cache.trunk or not plan.frozen:
        return ""
    if recipe.training.mixup or recipe.training.cutmix:
        return "every epoch runs the whole network: mixup and cutmix mix images, not features"
    return None


def choose_cut(
    network: nn.Module,
    plan: Plan,
    input_size: tuple[int, int, int],
    placement: Placement,
    precision: Precision,
    find_obstacle: Callable[[Cut], str],
) -> CutChoice:
    """Cut a network below all trained stages.

    Args:
        network: network on its device; it is not changed.
        plan: which stages learn.
        input_size: (C, H, W) of the images.
        placement: device and memory layout of the images.
        precision: precision of the forward pass.
        find_obstacle: returns why a cut's features cannot be cached; an empty text if they can.
    """
    trained = {name for row in plan.trained for name in row.stage.parameters}
    try:
        trace = trace_calls(network, input_size)
    except UsageError as error:
        return CutChoice(None, f"every epoch runs the whole network, which cannot be cut: {error.found}")
    cuts = find_cuts(trace, trained)
    if not cuts:
        return CutChoice(
            None, "every epoch runs the whole network: it cannot be cut below the stages that learn"
        )
    if cuts[0].share < MIN_SAVING:
        return CutChoice(
            None,
            f"every epoch runs the whole network: the frozen trunk is {cuts[0].share:.0%} of the work",
        )
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    images = images.to(placement.device, memory_format=placement.memory_format)
    with autocast(placement.device, precision):
        return _try(
            network, trace, cuts, images, precision, partial(set_train_mode, network, plan), find_obstacle
        )


def _try(
    network: nn.Module,
    trace: Trace,
    cuts: Iterable[Cut],
    images: torch.Tensor,
    precision: Precision,
    to_train_mode: Callable[[], None],
    find_obstacle: Callable[[Cut], str],
) -> CutChoice:
    """Take the first cut whose features can be cached and whose output equals that of the whole network."""
    obstacles: list[str] = []
    num_tried = 0
    for cut in cuts:
        if cut.share < MIN_SAVING or num_tried == MAX_TRIED_CUTS:
            break
        if obstacle := find_obstacle(cut):
            obstacles.append(f"the features at {cut.name} take {obstacle}")
            continue
        num_tried += 1
        if cut_network := cut_at(network, trace, cut, images, to_train_mode):
            reason = f"cut at {cut.name}, which saves {cut.share:.0%} of the forward pass"
            return CutChoice(cut_network, reason + (f" ({obstacles[0]})" if obstacles else ""))
    why = (
        obstacles[0]
        if obstacles
        else f"none of {num_tried} cuts reproduces the output of the whole network in {precision}"
    )
    return CutChoice(None, f"every epoch runs the whole network: {why}")


# --- Batches of cached features ---


class FeatureLoader:
    """Batches of cached features: a :class:`finetune.data.feed.BatchLoader` whose images are rows (B, D).

    Args:
        views: features (N, D) of each view; each epoch takes the next view.
        samples: samples of the rows, N.
        labels: their labels, (N, ...), as :meth:`finetune.targets.Target.encode` gives them.
        target: what the labels are.
        batch_size: rows per batch.
        placement: device of the batches.
        seed: seed of the order.
        shuffle: shuffle every epoch; otherwise keep the order of ``samples``.
        distributed: ranks that share the batches.
    """

    def __init__(
        self,
        views: Sequence[Rows],
        samples: Sequence[Sample],
        labels: Tensor,
        target: Target,
        *,
        batch_size: int,
        placement: Placement,
        seed: int,
        shuffle: bool,
        distributed: Distributed = SINGLE_PROCESS,
    ) -> None:
        self.views, self.samples = tuple(views), tuple(samples)
        self.batch_size, self.placement = batch_size, placement
        self.seed, self.shuffle, self.distributed = seed, shuffle, distributed
        self.wait_seconds = 0.0
        self.input_size: tuple[int, int, int] | None = None
        self.labels, self.target = labels, target

    def num_batches(self, epoch: int = 0) -> int:
        """Return how many batches a pass has."""
        return len(self._plan(epoch))

    def batches(
        self, epoch: int = 0, start: int = 0, stop: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from number ``start`` up to ``stop``."""
        rows = self.views[epoch % len(self.views)]
        self.wait_seconds = 0.0
        plan = self._plan(epoch)[start:stop]
        for batch in plan if whole else take_share(plan, self.distributed, self.shuffle):
            began = time.perf_counter()
            indices = torch.tensor(batch, dtype=torch.int64)
            images, labels = self._place(rows[indices]), self._place(self.labels[indices])
            self.wait_seconds += time.perf_counter() - began
            yield Batch(images, labels, indices, {})

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(len(self.samples), self.batch_size, self.seed if self.shuffle else None, epoch)

    def _place(self, tensor: Tensor) -> Tensor:
        device = self.placement.device
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)
