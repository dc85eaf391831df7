"""Where the frozen trunk ends, and whether keeping what it gives is worth the room.

In ``freeze`` and ``top`` the stages under those that learn are constant: what they make of an image is the
same in every epoch. So the network is cut where the learning begins, and the trunk runs once for each
image and view. The best cut saves the most work, and carries the fewest numbers of those that save as much.
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
from finetune.training.freeze import set_train_mode
from finetune.training.plan import Plan
from pretrained.graph.cuts import Cut, Trace, find_cuts, trace_calls
from pretrained.graph.split import SplitNetwork, split_at

MIN_SAVING = 0.3
"""Smallest share of the forward pass's multiplications that a cut must save."""
MAX_TRIED_CUTS = 12
"""Cuts that are tried before training falls back to the whole network. The first one nearly always works."""


@dataclass(frozen=True)
class SplitChoice:
    """The cut that was chosen, or the reason why there is none.

    Attributes:
        split: the network as a frozen trunk and the rest; None if every epoch runs the whole network.
        reason: message for the user about this choice; empty if there is nothing to report.
    """

    split: SplitNetwork | None
    reason: str


def find_reason_against(recipe: Recipe, plan: Plan) -> str | None:
    """Say why no trunk is to be kept, before anything is tried.

    Returns:
        None where nothing speaks against it; no words where it was not asked for, or nothing is frozen.
    """
    if not recipe.cache.trunk or not plan.frozen:
        return ""
    if recipe.training.mixup or recipe.training.cutmix:
        return "every epoch runs the whole network: mixup and cutmix mix images, not features"
    return None


def choose_split(
    network: nn.Module,
    plan: Plan,
    input_size: tuple[int, int, int],
    placement: Placement,
    precision: Precision,
    find_obstacle: Callable[[Cut], str],
) -> SplitChoice:
    """Cut a network above everything that learns.

    Args:
        network: on its device; left as it was.
        plan: what learns.
        input_size: (C, H, W) of the images.
        placement: device and layout of the images.
        precision: of the forward pass.
        find_obstacle: says why what a cut carries has no room; nothing where it has.
    """
    trained = {name for row in plan.trained for name in row.stage.parameters}
    try:
        trace = trace_calls(network, input_size)
    except UsageError as error:
        return SplitChoice(None, f"every epoch runs the whole network, which cannot be cut: {error.found}")
    cuts = find_cuts(trace, trained)
    if not cuts:
        return SplitChoice(
            None, "every epoch runs the whole network: it cannot be cut below the stages that learn"
        )
    if cuts[0].share < MIN_SAVING:
        return SplitChoice(
            None,
            f"every epoch runs the whole network: the frozen trunk is {cuts[0].share:.0%} of the work",
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
) -> SplitChoice:
    """Take the first cut that has room and holds."""
    obstacles: list[str] = []
    num_tried = 0
    for cut in cuts:
        if cut.share < MIN_SAVING or num_tried == MAX_TRIED_CUTS:
            break
        if obstacle := find_obstacle(cut):
            obstacles.append(f"the features at {cut.name} take {obstacle}")
            continue
        num_tried += 1
        if split := split_at(network, trace, cut, images, to_train_mode):
            reason = f"cut at {cut.name}, which saves {cut.share:.0%} of the forward pass"
            return SplitChoice(split, reason + (f" ({obstacles[0]})" if obstacles else ""))
    why = (
        obstacles[0] if obstacles else f"none of {num_tried} cuts reproduces the output of the whole network"
    )
    return SplitChoice(None, f"every epoch runs the whole network: {why}")


# --- Batches of kept rows, as training takes them ---


class FeatureLoader:
    """Batches of kept rows: a :class:`finetune.data.feed.Feed` whose images are rows (B, D).

    Args:
        views: rows (N, D) of each view; epoch by epoch the next one is taken.
        samples: their images.
        batch_size: rows a batch.
        placement: device of the batches.
        seed: of the order.
        shuffle: a new order every epoch; otherwise that of ``samples``.
        distributed: processes that share the batches.
    """

    def __init__(
        self,
        views: Sequence[Rows],
        samples: Sequence[Sample],
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
        self._labels = torch.tensor([sample.label for sample in self.samples])

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
            images, labels = self._place(rows[indices]), self._place(self._labels[indices])
            self.wait_seconds += time.perf_counter() - began
            yield Batch(images, labels, indices, {})

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(len(self.samples), self.batch_size, self.seed if self.shuffle else None, epoch)

    def _place(self, tensor: Tensor) -> Tensor:
        device = self.placement.device
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)
