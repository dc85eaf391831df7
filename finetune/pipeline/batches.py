"""The batches of a run: decoded images, or cached features of the frozen trunk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from finetune.data.dataset import Dataset, Sample, Split
from finetune.data.feed import BatchLoader
from finetune.data.loader import ImageLoader
from finetune.errors import DataError, DiskError, InternalError
from finetune.features.extraction import describe_source, digest_of
from finetune.features.rows import Rows
from finetune.features.runtime import open_forward
from finetune.features.store import (
    FORMAT,
    Forward,
    KeptRows,
    RowSpec,
    compute_batch_size,
    describe_images,
    row_bytes,
)
from finetune.pipeline.context import FitContext
from finetune.pipeline.image_loaders import LoaderFactory
from finetune.pipeline.setup import RunSetup
from finetune.recipe import ResolvedRecipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.memory import release_memory
from finetune.system.regular_files import open_regular
from finetune.training.trunk import CutChoice, FeatureLoader, choose_cut, find_reason_against
from pretrained.graph.cut_network import CutNetwork
from pretrained.graph.cuts import Cut


@dataclass(frozen=True)
class DataLoaders:
    """Batches of each split.

    Attributes:
        batches: batches for training and evaluation.
        images: the same samples as decoded images.
        cut_network: the network as a trunk and the rest, if the batches hold its features; else None.
    """

    batches: Mapping[Split, BatchLoader]
    images: Mapping[Split, ImageLoader]
    cut_network: CutNetwork | None


@contextmanager
def open_loaders(context: FitContext, frozen: Mapping[str, str]) -> Iterator[DataLoaders]:
    """Open the batches of a run while the block runs, on every rank.

    Args:
        context: the running attempt.
        frozen: sha256 of each frozen tensor, by name.
    """
    with ExitStack() as stack:
        factory = LoaderFactory(context, stack)
        with context.display.busy("looking for a place to cut the network"):
            choice = _choose_together(context, factory.cache_dir)
        if choice.reason:
            context.display.say(f"trunk: {choice.reason}")
        loaders = None
        if choice.cut_network is not None:
            loaders, fault = _try_to_keep(factory, choice.cut_network, frozen)
            if fault is not None:
                words = context.distributed.share(partial(_describe_failure, fault, context.folder))
                choice = CutChoice(None, words)
                context.display.warn(words)
        if choice.reason and context.distributed.is_main:
            context.folder.write_trunk(_describe(choice))
        # Beside kept features, images are only looked at to compare: starting processes would take longer.
        images = {split: factory.loader(split, here=loaders is not None) for split in context.splits}
        yield DataLoaders(loaders or images, images, choice.cut_network)


# --- the trunk -----------------------------------------------------------------------------------


def _num_views(recipe: ResolvedRecipe) -> int:
    """Return how many views of each training image a trunk sees."""
    return min(recipe.cache.views, recipe.training.epochs)


def count_rows(recipe: ResolvedRecipe, dataset: Dataset) -> int:
    """Return how many rows of features a trunk gives: one for each image, and view of a training image."""
    return len(dataset.samples) + (_num_views(recipe) - 1) * len(dataset.of("train"))


def find_lack_of_room(recipe: ResolvedRecipe, dataset: Dataset, cache_dir: FeatureCacheDir, cut: Cut) -> str:
    """Return why a cut's features cannot be cached; empty if they can."""
    total = count_rows(recipe, dataset) * row_bytes(cut.numel, recipe.cache.dtype)
    obstacle = cache_dir.find_obstacle(total)
    return f"{total / 1e9:.1f} GB, {obstacle}" if obstacle else ""


def _choose_together(context: FitContext, cache_dir: FeatureCacheDir) -> CutChoice:
    """Choose a cut on rank 0, and cut at the same place on every rank."""
    distributed = context.distributed
    own = CutChoice(None, "")
    if distributed.is_main:
        own = _choose(context, cache_dir, RunReader(context.folder, tolerant=True).trunk)
    said = distributed.share(lambda: _describe(own))
    choice = own if distributed.is_main else _choose(context, cache_dir, said)
    if _describe(choice)["cut"] != said["cut"]:
        asked = f"cutting the network at {said['cut']}, as the main process does"
        raise InternalError(asked, choice.reason, "Please report this with the backbone's name.")
    return choice


def _describe(choice: CutChoice) -> dict[str, Any]:
    return {"cut": choice.cut_network.cut.name if choice.cut_network else None, "reason": choice.reason}


def _choose(context: FitContext, cache_dir: FeatureCacheDir, before: Mapping[str, Any]) -> CutChoice:
    """Cut the network; an earlier attempt's place is used again."""
    setup = context.setup
    reason = find_reason_against(setup.recipe, setup.plan)
    dataset = context.dataset
    if reason is None and any(sample.path not in dataset.digests for sample in dataset.samples):
        reason = "every epoch runs the whole network: some images can no longer be read"
    if reason is not None:
        return CutChoice(None, reason)
    if before and before.get("cut") is None:
        return CutChoice(None, str(before.get("reason", "")))
    precision = setup.recipe.training.precision
    return choose_cut(
        setup.backbone.network,
        setup.plan,
        setup.backbone.card.preprocessing.input_size,
        setup.placement,
        precision=precision,
        find_obstacle=partial(_find_obstacle, context, cache_dir, before.get("cut")),
    )


def _find_obstacle(context: FitContext, cache_dir: FeatureCacheDir, before: str | None, cut: Cut) -> str:
    """Return why a cut's features cannot be cached; empty if they can, or are cached already."""
    if before is not None:
        return (
            ""
            if cut.name == before
            else f"another place than {before}, where an earlier attempt cut the network"
        )
    return find_lack_of_room(context.setup.recipe, context.dataset, cache_dir, cut)


def _describe_failure(error: DataError | OSError, folder: RunFolder) -> str:
    """Return the message that features cannot be cached and the whole network is run instead.

    Raises:
        DiskError: the run trained on cached features before, so it cannot resume without them.
    """
    found = error.found if isinstance(error, DataError) else error.strerror or str(error)
    if RunReader(folder, tolerant=True).trunk.get("cut") is not None:
        fix = "Free some space (`finetune cache clear`), and run the same command again."
        raise DiskError(f"resuming {folder.path}, which trains on cached features", found, fix)
    return f"features cannot be cached ({found}); every epoch runs the whole network"


def _try_to_keep(
    factory: LoaderFactory, cut_network: CutNetwork, frozen: Mapping[str, str]
) -> tuple[dict[Split, BatchLoader] | None, DataError | OSError | None]:
    """Return loaders of cached features, or the error that prevents them; the same on all ranks."""
    distributed = factory.context.distributed
    loaders, fault = None, None
    try:
        loaders = _keep(factory, cut_network, frozen)
    except (DataError, OSError) as error:
        fault = error
    distributed.wait()  # a machine may take much longer than another
    fault = next((one for one in distributed.collect(fault) if one is not None), None)
    return (loaders, None) if fault is None else (None, fault)


def _keep(
    factory: LoaderFactory, cut_network: CutNetwork, frozen: Mapping[str, str]
) -> dict[Split, BatchLoader]:
    """Run the trunk over all images whose features are not cached yet.

    Raises:
        DataError: an image cannot be read any more, or has changed.
        OSError: the features cannot be written, and are too many for the memory.
    """
    context = factory.context
    setup, recipe = context.setup, context.setup.recipe
    precision, batch_size = recipe.training.precision, recipe.training.batch_size
    kept = KeptRows(
        cache_dir=factory.cache_dir,
        device=setup.placement.device,
        batch_size=compute_batch_size(setup.placement.device, setup.backbone.card.preprocessing.input_size),
        precision=precision,
        dtype=recipe.cache.dtype,
        display=context.display,
        check_unchanged=partial(_check_unchanged, context),
        distributed=context.distributed.machine,
    )
    setup.backbone.network.eval()
    release_memory()  # of checking images and trying cuts; decoding processes are copies of this one
    facts = _describe_trunk(setup, kept, cut_network, frozen)

    @cache  # one export for all splits and views
    def forward_of(_: tuple[int, ...]) -> Forward:
        input_size = setup.backbone.card.preprocessing.input_size
        network, trunk = setup.backbone.network, cut_network.trunk
        return open_forward(recipe.runtime, network, trunk, setup.placement, input_size, context.display)

    try:
        views = {split: _rows_of(factory, kept, forward_of, facts, split) for split in context.splits}
    except BaseException:
        kept.close()  # others may need the files, and wait for them
        raise
    factory.stack.callback(kept.close)
    release_memory()
    _say_kept(kept, cut_network, _num_views(recipe))
    return {
        split: FeatureLoader(
            rows,
            context.dataset.of(split),
            context.dataset.encode(context.dataset.of(split)),
            context.dataset.target,
            batch_size=batch_size,
            placement=setup.placement,
            seed=recipe.seed,
            shuffle=split == "train",
            distributed=context.distributed,
        )
        for split, rows in views.items()
    }


def _check_unchanged(context: FitContext, samples: Sequence[Sample]) -> None:
    """Refuse to cache features of images that changed since the run started.

    Raises:
        DataError: one was changed. One that has vanished was read before.
    """
    for sample in samples:
        with suppress(OSError), open_regular(context.dataset.file(sample)) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != context.dataset.digests[sample.path]:
                fix = "Do not change images while a run starts, and run the command again."
                raise DataError(
                    f"reading {sample.path}", f"{sample.path} changed while the run was starting", fix
                )


def _describe_trunk(
    setup: RunSetup, kept: KeptRows, cut_network: CutNetwork, frozen: Mapping[str, str]
) -> dict[str, Any]:
    """Return what all features of a trunk depend on, but for the images and their view."""
    recipe, card = setup.recipe, setup.backbone.card
    return {
        "kind": "trunk",
        "format": FORMAT,
        "cut": cut_network.cut.name,
        "numel": cut_network.packing.numel,
        "dtype": kept.dtype,
        "batch_size": kept.batch_size,
        **describe_source(card, setup.placement, kept.precision, recipe.runtime, recipe.deterministic),
        "head": card.head,
        "weights": digest_of(frozen),
    }


def _rows_of(
    factory: LoaderFactory,
    kept: KeptRows,
    forward_of: Callable[[tuple[int, ...]], Forward],
    facts: dict[str, Any],
    split: Split,
) -> list[Rows]:
    """Return the rows of each view of a split."""
    context = factory.context
    views = range(_num_views(context.setup.recipe) if split == "train" else 1)
    open_loader = cache(partial(factory.loader_for_trunk, split, kept.batch_size, len(views)))
    augmentation = context.setup.recipe.input.augmentation if split == "train" else "none"
    images = describe_images([context.dataset.digests[sample.path] for sample in context.dataset.of(split)])
    rows = []
    for view in views:
        own = {"augmentation": augmentation, "view": view}
        spec = RowSpec(facts | own | images, facts["numel"])
        which = f"{split}, view {view + 1} of {len(views)}" if len(views) > 1 else split
        rows += kept.rows([spec], forward_of, lambda _: open_loader(), view, f"running the trunk ({which})")
    return rows


def _say_kept(kept: KeptRows, cut_network: CutNetwork, num_views: int) -> None:
    each = row_bytes(cut_network.packing.numel, kept.dtype)
    total = kept.num_computed + kept.num_found
    views = f"{num_views} views of each training image, " if num_views > 1 else ""
    found = f", {kept.num_found:,} of them from an earlier run" if kept.num_found else ""
    kept.display.say(
        f"features cached: {views}{total:,} in all, {each / 1e3:,.0f} KB each, {total * each / 1e6:,.0f} MB"
        f"{found}"
    )
