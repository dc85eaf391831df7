"""The batches of a run: decoded images, or what the frozen trunk makes of them, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

from finetune.data.dataset import Dataset, Sample
from finetune.data.dataset import Split as Part
from finetune.data.feed import BatchLoader
from finetune.data.image_cache import ImageCache, keep_images
from finetune.data.loader import ImageLoader
from finetune.data.transforms import Transform, build_eval_transform, build_train_transform
from finetune.errors import DataError, DiskError, InternalError
from finetune.features.extraction import describe_source, digest_of
from finetune.features.rows import Rows
from finetune.features.store import FORMAT, KeptRows, RowSpec, compute_batch_size, describe_images, row_bytes
from finetune.run.setup import Ready
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.device import release_memory
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.training.trunk import Choice, FeatureLoader, choose_split, find_reason_against
from pretrained.graph.cuts import Cut
from pretrained.graph.split import Split

FEW = 8
"""Images that figures and model are compared on: through the whole network, however large batches are."""


@dataclass(frozen=True)
class DataLoaders:
    """Batches of each part of a data set.

    Attributes:
        feeds: what training and figures take.
        images: the same samples as images.
        split: the network in two parts, where the feeds hold what the trunk gave.
    """

    loaders: Mapping[Part, BatchLoader]
    images: Mapping[Part, ImageLoader]
    split: Split | None


@dataclass(frozen=True)
class Source:
    """What batches are made from.

    Attributes:
        ready: recipe, backbone and plan; the network is on its device.
        dataset: the usable images.
        digests: sha256 of each image, by path.
        frozen: sha256 of each frozen tensor.
        distributed: processes that share the work.
    """

    ready: Ready
    dataset: Dataset
    digests: Mapping[str, str]
    frozen: Mapping[str, str]
    distributed: Distributed = SINGLE_PROCESS

    @property
    def parts(self) -> list[Part]:
        """The parts that have images."""
        every: tuple[Part, ...] = ("train", "val", "test")
        return [part for part in every if self.dataset.of(part)]

    @property
    def num_views(self) -> int:
        """Views of each training image that a trunk would see."""
        views, epochs = self.ready.recipe.cache.views, self.ready.recipe.training.epochs
        assert views != "auto"
        return min(views, epochs)

    def passes(self) -> Iterator[tuple[Part, int]]:
        """Yield every part and view that a trunk would see."""
        for part in self.parts:
            for view in range(self.num_views if part == "train" else 1):
                yield part, view

    def facts(self) -> dict[str, Any]:
        """Return what all features depend on, but for the cut."""
        recipe, card = self.ready.recipe, self.ready.backbone.card
        precision = recipe.training.precision
        assert precision != "auto"
        return describe_source(card, self.ready.placement, precision, recipe.deterministic) | {
            "head": card.head,
            "weights": digest_of(self.frozen),
        }

    def view_facts(self, part: Part, view: int) -> dict[str, Any]:
        """Return what the features of one view depend on beside."""
        augmentation = self.ready.recipe.input.augmentation if part == "train" else "none"
        return {"augmentation": augmentation, "view": view}

    def digests_of(self, part: Part) -> list[str]:
        """Return the sha256 of each image of a part, in order."""
        return [self.digests[sample.path] for sample in self.dataset.of(part)]

    def check_unchanged(self, samples: Sequence[Sample]) -> None:
        """Refuse to keep features of images that are not what they were when the run began.

        Raises:
            DataError: one was changed. One that has vanished was read before.
        """
        for sample in samples:
            with suppress(OSError), self.dataset.file(sample).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.digests[sample.path]:
                    fix = "Leave the images alone while a run begins, and start again."
                    raise DataError(f"reading {sample.path}", f"{sample.path} was changed meanwhile", fix)


@contextmanager
def open_loaders(source: Source, folder: RunFolder, display: Display) -> Iterator[DataLoaders]:
    """Give the batches of a run while the block runs."""
    cache_dir = FeatureCacheDir(source.ready.recipe.cache.max_gb * 1e9)
    with ExitStack() as stack:
        factory = LoaderFactory(source, cache_dir, display, stack)
        choice = _choose_together(source, cache_dir, folder)
        if choice.words:
            display.say(f"trunk: {choice.words}")
        loaders = None
        if choice.split is not None:
            loaders, fault = _try_to_keep(source, factory, choice.split)
            if fault is not None:
                choice = Choice(None, source.distributed.share(partial(_describe_failure, fault, folder)))
                display.warn(choice.words)
        split = choice.split
        if choice.words and source.distributed.is_main:
            folder.write_trunk(_describe(choice))
        # Beside kept features, images are only looked at to compare: starting processes would take longer.
        images = {part: factory.loader(part, here=loaders is not None) for part in source.parts}
        yield DataLoaders(loaders or images, images, split)


@dataclass(frozen=True)
class LoaderFactory:
    """Makes loaders that are closed with the stack.

    Attributes:
        source: what they load.
        shelf: where decoded images are kept.
        display: shows progress.
        stack: ends them.
    """

    source: Source
    cache_dir: FeatureCacheDir
    display: Display
    stack: ExitStack

    @cached_property
    def warn(self) -> Callable[[str], None]:
        """Says the same thing once."""
        return cache(self.display.warn)

    def loader(self, part: Part, here: bool) -> ImageLoader:
        """Return batches of a part as training and figures take them; ``here`` decodes in this process."""
        recipe = self.source.ready.recipe
        batch_size = recipe.training.batch_size
        assert batch_size != "auto"
        passes = 1 if part == "test" or here else recipe.training.epochs
        size = min(batch_size, FEW) if here else batch_size
        return self._build(part, size, recipe.seed, passes, part == "train", here, self.source.distributed)

    def loader_for_trunk(self, part: Part, batch_size: int, passes: int) -> ImageLoader:
        """Return batches for the trunk. Views have a seed of their own: a run with another one finds them."""
        return self._build(part, batch_size, 0, passes, False, False, self.source.distributed.machine)

    def _build(
        self,
        part: Part,
        batch_size: int,
        seed: int,
        passes: int,
        shuffle: bool,
        here: bool,
        distributed: Distributed,
    ) -> ImageLoader:
        source, ready = self.source, self.source.ready
        workers = ready.recipe.data.workers
        assert workers != "auto"
        transform = _transform(source, part)
        loader = ImageLoader(
            source.dataset,
            source.dataset.of(part),
            transform,
            batch_size=batch_size,
            placement=ready.placement,
            workers=0 if here else workers,
            seed=seed,
            shuffle=shuffle,
            warn=self.warn,
            images=None if here else self._images(part, transform, passes),
            most_workers=ready.most_workers,
            distributed=distributed,
        )
        self.stack.callback(loader.close)
        return loader

    def _images(self, part: Part, transform: Transform, passes: int) -> ImageCache | None:
        source = self.source
        if not source.ready.recipe.cache.pictures:
            return None
        samples = source.dataset.of(part)
        images = keep_images(
            source.dataset, samples, source.digests, transform, self.cache_dir, self.display, passes
        )
        if images is not None:
            self.stack.callback(images.close)
        return images


def _transform(source: Source, part: Part) -> Transform:
    preprocessing = source.ready.backbone.card.preprocessing
    if part == "train":
        return build_train_transform(preprocessing, source.ready.recipe.input.augmentation)
    return build_eval_transform(preprocessing)


# --- the trunk -----------------------------------------------------------------------------------


def _choose_together(source: Source, cache_dir: FeatureCacheDir, folder: RunFolder) -> Choice:
    """Let the main process choose, and every other one cut at the same place."""
    before = RunReader(folder, tolerant=True).trunk
    own = _choose(source, cache_dir, before) if source.distributed.is_main else Choice(None, "")
    said = source.distributed.share(lambda: _describe(own))
    choice = own if source.distributed.is_main else _choose(source, cache_dir, said)
    if _describe(choice)["cut"] != said["cut"]:
        asked = f"cutting the network at {said['cut']}, as the main process does"
        raise InternalError(asked, choice.words, "Please report this with the backbone's name.")
    return choice


def _describe(choice: Choice) -> dict[str, Any]:
    return {"cut": choice.split.cut.name if choice.split else None, "reason": choice.words}


def _choose(source: Source, cache_dir: FeatureCacheDir, before: Mapping[str, Any]) -> Choice:
    """Cut the network, at the place that an earlier attempt took where there was one."""
    ready = source.ready
    reason = find_reason_against(ready.recipe, ready.plan)
    if reason is None and any(sample.path not in source.digests for sample in source.dataset.samples):
        reason = "every epoch runs the whole network: some images are lost"
    if reason is not None:
        return Choice(None, reason)
    if before and before.get("cut") is None:
        return Choice(None, str(before.get("reason", "")))
    precision = ready.recipe.training.precision
    assert precision != "auto"
    return choose_split(
        ready.backbone.network,
        ready.plan,
        ready.backbone.card.preprocessing.input_size,
        ready.placement,
        precision,
        partial(_find_obstacle, source, cache_dir, before.get("cut")),
    )


def _find_obstacle(source: Source, cache_dir: FeatureCacheDir, before: str | None, cut: Cut) -> str:
    """Say why a cut's features cannot be kept; nothing where they can, or are there already."""
    if before is not None:
        return "" if cut.name == before else f"no part in this run, which was cut at {before} before"
    each = row_bytes(cut.numel, source.ready.recipe.cache.dtype)
    total = sum(len(source.dataset.of(part)) for part, _ in source.passes()) * each
    obstacle = cache_dir.find_obstacle(total)
    return f"{total / 1e9:.1f} GB, {obstacle}" if obstacle else ""


def _describe_failure(error: DataError | OSError, folder: RunFolder) -> str:
    """Say why features cannot be kept; a run that has learnt from them must not go on without.

    Raises:
        DiskError: it has.
    """
    found = error.found if isinstance(error, DataError) else error.strerror or str(error)
    if RunReader(folder, tolerant=True).trunk.get("cut") is not None:
        fix = "Make room for them (`finetune cache clear`), and give the same command again."
        raise DiskError(f"going on with {folder.path}, which learns from kept features", found, fix)
    return f"features cannot be kept ({found}); every epoch runs the whole network"


def _try_to_keep(
    source: Source, factory: LoaderFactory, split: Split
) -> tuple[dict[Part, BatchLoader] | None, DataError | OSError | None]:
    """Return feeds of features, or why there are none: for all processes alike."""
    loaders, fault = None, None
    try:
        loaders = _keep(source, factory, split)
    except (DataError, OSError) as error:
        fault = error
    source.distributed.wait()  # a machine may take much longer than another
    fault = next((one for one in source.distributed.collect(fault) if one is not None), None)
    return (loaders, None) if fault is None else (None, fault)


def _keep(source: Source, factory: LoaderFactory, split: Split) -> dict[Part, BatchLoader]:
    """Run the trunk over what is not kept yet.

    Raises:
        DataError: an image cannot be read any more, or has changed.
        OSError: the features cannot be written, and are too many for the memory.
    """
    recipe = source.ready.recipe
    precision, batch_size = recipe.training.precision, recipe.training.batch_size
    assert precision != "auto" and batch_size != "auto"
    device = source.ready.placement.device
    kept = KeptRows(
        cache_dir=factory.cache_dir,
        device=device,
        batch_size=compute_batch_size(device, source.ready.backbone.card.preprocessing.input_size),
        precision=precision,
        dtype=recipe.cache.dtype,
        display=factory.display,
        check_unchanged=source.check_unchanged,
        distributed=source.distributed.machine,
    )
    source.ready.backbone.network.eval()
    release_memory()  # of checking images and trying cuts; decoding processes are copies of this one
    try:
        views = {part: _rows_of(source, kept, factory, split, part) for part in source.parts}
    except BaseException:
        kept.close()  # others may need the files, and wait for them
        raise
    factory.stack.callback(kept.close)
    release_memory()
    _say_kept(source, kept, split)
    return {
        part: FeatureLoader(
            rows,
            source.dataset.of(part),
            batch_size=batch_size,
            placement=source.ready.placement,
            seed=recipe.seed,
            shuffle=part == "train",
            distributed=source.distributed,
        )
        for part, rows in views.items()
    }


def _rows_of(source: Source, kept: KeptRows, factory: LoaderFactory, split: Split, part: Part) -> list[Rows]:
    """Return the rows of each view of a part."""
    views = [view for other, view in source.passes() if other == part]
    open_loader = cache(partial(factory.loader_for_trunk, part, kept.batch_size, len(views)))
    facts = {
        "kind": "trunk",
        "format": FORMAT,
        "cut": split.cut.name,
        "numel": split.packing.numel,
        "dtype": kept.dtype,
        "batch_size": kept.batch_size,
        **source.facts(),
    }
    images = describe_images(source.digests_of(part))
    rows = []
    for view in views:
        place = RowSpec(facts | source.view_facts(part, view) | images, split.packing.numel)
        which = f"{part}, view {view + 1} of {len(views)}" if len(views) > 1 else part
        rows += kept.rows([place], lambda _: split.trunk, open_loader, view, f"running the trunk ({which})")
    return rows


def _say_kept(source: Source, kept: KeptRows, split: Split) -> None:
    each = row_bytes(split.packing.numel, kept.dtype)
    total = kept.num_computed + kept.num_found
    views = f"{source.num_views} views of each training image, " if source.num_views > 1 else ""
    found = f", {kept.num_found:,} of them found from before" if kept.num_found else ""
    kept.display.say(
        f"features kept: {views}{total:,} in all, {each / 1e3:,.0f} KB each, {total * each / 1e6:,.0f} MB"
        f"{found}"
    )
