"""Loaders of a run's images, for training, evaluation and the frozen trunk."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

from finetune.data.dataset import Split
from finetune.data.image_cache import ImageCache, keep_images
from finetune.data.loader import ImageLoader
from finetune.data.transforms import Transform, build_eval_transform, build_train_transform
from finetune.pipeline.context import FitContext
from finetune.pipeline.setup import RunSetup
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.system.device import resolve_most_workers
from finetune.system.distributed import Distributed

FEW = 8
"""Number of images on which the exported network is compared with the metrics' predictions."""


class LoaderFactory:
    """Makes image loaders that the stack closes.

    Args:
        context: the running attempt.
        stack: exit stack that closes the loaders.
        cache_dir: folder of cached images; by default as the recipe says.
    """

    def __init__(
        self, context: FitContext, stack: ExitStack, cache_dir: FeatureCacheDir | None = None
    ) -> None:
        self.context, self.stack = context, stack
        self.cache_dir = cache_dir or FeatureCacheDir(context.setup.recipe.cache.max_gb * 1e9)
        self._warn = cache(context.display.warn)  # says the same thing once

    def loader(self, split: Split, here: bool) -> ImageLoader:
        """Return batches as training and evaluation take them; ``here`` decodes in this process."""
        recipe = self.context.setup.recipe
        batch_size = recipe.training.batch_size
        return self._build(
            split,
            batch_size=min(batch_size, FEW) if here else batch_size,
            seed=recipe.seed,
            passes=0 if here else 1 if split == "test" else recipe.training.epochs,
            shuffle=split == "train",
            persistent=split != "test",
            distributed=self.context.distributed,
        )

    def loader_for_trunk(self, split: Split, batch_size: int, passes: int) -> ImageLoader:
        """Return batches for the trunk. Views have a seed of their own: a run with another one finds them."""
        distributed = self.context.distributed.machine
        return self._build(
            split,
            batch_size=batch_size,
            seed=0,
            passes=passes,
            shuffle=False,
            persistent=False,  # they would wait until training, which needs none, has ended
            distributed=distributed,
        )

    def _build(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        passes: int,
        shuffle: bool,
        persistent: bool,
        distributed: Distributed,
    ) -> ImageLoader:
        """Return a loader; one of no passes decodes here, and keeps no image."""
        setup, dataset = self.context.setup, self.context.dataset
        workers = setup.recipe.data.workers
        transform = _build_transform(setup, split)
        # Batches of the trunk are larger than those of training, for which the setup's number was chosen.
        batch_bytes = batch_size * setup.backbone.card.preprocessing.view_bytes
        room = resolve_most_workers(batch_bytes, self.context.distributed.machine.size)
        loader = ImageLoader(
            dataset,
            dataset.of(split),
            transform,
            batch_size=batch_size,
            placement=setup.placement,
            workers=workers if passes else 0,
            seed=seed,
            shuffle=shuffle,
            warn=self._warn,
            images=self._keep_images(split, transform, passes) if passes else None,
            max_workers=min(setup.max_workers, room),
            persistent=persistent,
            distributed=distributed,
        )
        self.stack.callback(loader.close)
        return loader

    def _keep_images(self, split: Split, transform: Transform, passes: int) -> ImageCache | None:
        context = self.context
        if not context.setup.recipe.cache.pictures:
            return None
        kept = keep_images(
            context.dataset,
            context.dataset.of(split),
            context.dataset.digests,
            transform=transform,
            cache_dir=self.cache_dir,
            display=context.display,
            passes=passes,
        )
        if kept is not None:
            self.stack.callback(kept.close)
        return kept


def _build_transform(setup: RunSetup, split: Split) -> Transform:
    preprocessing = setup.backbone.card.preprocessing
    if split == "train":
        return build_train_transform(preprocessing, setup.recipe.input.augmentation)
    return build_eval_transform(preprocessing)
