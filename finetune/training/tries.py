"""The gradient of a step, tried again with smaller parts of the batch while memory runs out."""

from __future__ import annotations

import torch

from finetune.data.loader import Batch
from finetune.display import Display
from finetune.errors import LostProcessError
from finetune.memory import is_out_of_memory, release_memory
from finetune.runtime import seed_everything
from finetune.training.gradient import Gradient, KeptBuffers, describe_parts, halve_or_refuse, least_part
from finetune.training.parallel import REHEARSALS, Share, waits_in_forward
from finetune.training.progress import Progress
from finetune.training.task import Task
from finetune.world import World


class Tries:
    """Computes gradients of one training.

    Several processes wait for each other while gradients are added up, so that one that runs out of memory
    there takes all of them with it. So they rehearse steps alone, and agree on the size of the parts; but not
    where they wait for each other in the forward pass too (SyncBatchNorm).

    Args:
        task: network, loss and data.
        gradient: of one batch.
        optimizer: whose weights learn.
        seed: of the random numbers of every step.
        world: the processes.
        display: told of smaller parts.
    """

    def __init__(
        self,
        task: Task,
        gradient: Gradient,
        optimizer: torch.optim.Optimizer,
        seed: int,
        world: World,
        display: Display,
    ) -> None:
        self.task, self.gradient, self.optimizer, self.seed = task, gradient, optimizer, seed
        self.world, self.display = world, display
        self._rehearsals = REHEARSALS if gradient.replicas is not None else 0

    def compute(self, share: Share, progress: Progress, buffers: KeptBuffers) -> torch.Tensor:
        """Return the loss, with the gradient in place.

        Args:
            share: of the batch, which is this process's.
            progress: whose microbatch may become smaller.
            buffers: kept before the step.

        Raises:
            EnvironmentFaultError: one image at a time is too much for the memory.
            LostProcessError: memory ran out in this process while others waited for it.
        """
        batch, replicas = share.batch, self.gradient.replicas
        if not len(batch.labels):
            batch = self._stand_in(batch)
        if replicas is not None and waits_in_forward(self.task.network):
            self._rehearsals = 0
            replicas.connect(has_unused=True)
        while self._rehearsals:
            self._rehearse(batch, share, progress, buffers)
        while True:
            found = self._try(batch, share, progress)
            if not isinstance(found, str):
                return found
            if replicas is not None:
                asked, fix = f"training, step {progress.step + 1}", "Start it again, or lower --batch-size."
                raise LostProcessError(asked, f"memory ran out while others waited ({found})", fix)
            buffers.give_back()
            self._halve(progress, len(batch.labels), found)

    def _try(self, batch: Batch, share: Share, progress: Progress, alone: bool = False) -> torch.Tensor | str:
        """Return the loss, or what ran out."""
        own = (self.world.rank,) if self.world.rank else ()  # each process draws masks of its own
        seed_everything(self.seed, "step", progress.step, *own)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self.world.translated():
                return self.gradient.compute(batch, progress.microbatch, share.factor, alone)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = " ".join(str(error).split())[:200] or "there is no memory left"
        # Outside of the except block: its traceback would keep every activation alive.
        self.optimizer.zero_grad(set_to_none=True)
        release_memory()
        return found

    def _halve(self, progress: Progress, batch_size: int, found: str) -> None:
        now = min(progress.microbatch or batch_size, batch_size)
        progress.microbatch = halve_or_refuse(self.task.network, now, found)
        self.display.warn(describe_parts(self.task.network, progress, batch_size))

    # --- among several processes -----------------------------------------------------------------

    def _rehearse(self, batch: Batch, share: Share, progress: Progress, buffers: KeptBuffers) -> None:
        """Make the step alone and undo it; where memory ran out in any process, all halve their parts."""
        replicas = self.gradient.replicas
        assert replicas is not None
        found = self._try(batch, share, progress, alone=True)
        learning = (weight for group in self.optimizer.param_groups for weight in group["params"])
        has_unused = any(weight.grad is None for weight in learning)
        buffers.give_back()
        self.optimizer.zero_grad(set_to_none=True)
        said = [text for text in self.world.collect(found if isinstance(found, str) else "") if text]
        if said:
            self._rehearsals = REHEARSALS
            self._halve(progress, -(-share.num_images // self.world.size), said[0])
            return
        replicas.connect(self.world.any(has_unused))
        self._rehearsals -= 1

    def _stand_in(self, batch: Batch) -> Batch:
        """Return zeros to go through the network where a process has no image: all must add up gradients."""
        shape = self.task.train.input_size or batch.images.shape[1:]
        device, number = batch.images.device, least_part(self.task.network)
        images = torch.zeros(number, *shape, device=device)
        labels = torch.zeros(number, dtype=torch.int64, device=device)
        return Batch(images, labels, labels, batch.lost)
