"""``finetune extract``: features of layers as tables, all of them from one forward pass.

::

    --output features.csv     one table: path, label, split, then every layer's numbers side by side
    --output features/        a table for each layer, index.csv, bad_images.csv, extraction.json

Features are cached as they are computed, so that a killed extraction resumes where it stopped. Tables are
written from the cache, sorted by path, and appear under their names when they are complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from finetune.data.dataset import Dataset, Sample
from finetune.data.prepare import check_outside, read_images
from finetune.errors import UsageError, count, suggest
from finetune.features.extraction import (
    Features,
    Source,
    compute_bytes,
    describe_extraction,
    digest_of,
    open_features,
    open_images,
    open_source,
)
from finetune.features.network import open_network, take_channels
from finetune.features.placed import KEY, PlacedFiles, read_placed
from finetune.features.tables import LayerRows, TableFormat, check_format, check_names, write_table
from finetune.recipe import Recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.claim import check_name, create_folder, locked
from finetune.runs.files import name_result, read_object, remove_folder, sync_folder, write_csv, write_json
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from pretrained.graph.layers import Layer
from pretrained.graph.pooling import Pool

FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)
INDEX_COLUMNS = ("layer", "file", "module", "size", "num_features", "pool", "num_images")


@dataclass(frozen=True)
class Target:
    """The output of an extraction.

    Attributes:
        path: the folder, or the single table.
        is_folder: whether there is a table for each layer, in a folder.
        format: the format of the tables.
    """

    path: Path
    is_folder: bool
    format: TableFormat

    @property
    def record(self) -> Path:
        """The file that records what a folder was extracted from."""
        return self.path / "extraction.json"

    @property
    def bad_images(self) -> Path:
        """Images that have no row, and why."""
        if self.is_folder:
            return self.path / "bad_images.csv"
        return self.path.with_name(f"{self.path.stem}.bad_images.csv")

    @property
    def work(self) -> Path:
        """The folder for a table, and features that do not fit in the cache, until the output is written."""
        return self.path / ".work" if self.is_folder else self.path.with_name(f".{self.path.name}.work")

    @property
    def claimed(self) -> Path:
        """The folder that is locked while the output is written."""
        return self.path if self.is_folder else self.work

    def table_of(self, layer: Layer) -> Path:
        """Return the path of a layer's table in a folder."""
        return self.path / f"{layer.name}.{self.format}"


def find_target(output: Path, format: str | None) -> Target:
    """Return the output: a single table if the suffix is that of a known format, else a folder.

    Raises:
        UsageError: the format is unknown, or differs from the suffix, or the name is not UTF-8.
        EnvironmentFaultError: the format needs a package that is not installed.
    """
    suffix = output.suffix.lower().removeprefix(".")
    is_table = suffix in FORMATS and not output.is_dir()
    if not is_table:
        check_name(output)
    chosen = format or (suffix if is_table else "csv")
    if chosen not in FORMATS:
        found = f"there is no such format{suggest(chosen, FORMATS)}"
        raise UsageError(f"--format {chosen}", found, f"Choose {', '.join(FORMATS)}.")
    if is_table and suffix != chosen:
        found = f"--output {output} names a .{suffix} file"
        raise UsageError(f"--format {chosen}", found, "Drop --format, or rename the output.")
    known: TableFormat = next(name for name in FORMATS if name == chosen)
    check_format(known)
    return Target(output, not is_table, known)


def extract(
    recipe: Recipe,
    wanted: Sequence[str],
    output: Path,
    pool: Pool,
    format: str | None,
    *,
    display: Display,
    distributed: Distributed = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Write the features of some layers as tables.

    Every process calls this with the same arguments: all compute, and the main one writes.

    Args:
        recipe: settings of backbone, data, input, cache and machine.
        wanted: names, keywords and patterns of :meth:`pretrained.graph.layers.Layers.select`.
        output: a folder, or a file whose suffix names the format.
        pool: how a layer's output becomes a row.
        format: ``csv``, ``parquet`` or ``npz``; None for that of the suffix, else CSV.
        display: shows progress; silent in all but the main process.
        distributed: the processes that share the work.

    Returns:
        Counts and paths, as ``--json`` prints them; empty in all but the main process.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors(distributed=distributed), ExitStack() as files:
        target = find_target(output, format)
        found = distributed.share(lambda: _find_images(recipe, output, display))
        seen = take_channels(recipe, found)
        network = distributed.first(lambda: open_network(seen, display, distributed))
        layers = network.layers.select(wanted, pool)
        check_names(target.format, [layer.name for layer in layers])
        dataset = distributed.share(lambda: read_images(seen, found, display))
        source = open_source(seen, network, dataset, display)
        facts = {
            "features": describe_extraction(source, layers, pool),
            "layers": [layer.name for layer in layers],
            "format": target.format,
            "pictures": digest_of([_describe(source, sample) for sample in dataset.samples]),
        }
        if before := distributed.share(lambda: _begin(target, facts, files)):
            display.say(f"{output} already holds these features")
            return before
        placed = PlacedFiles(target.record) if distributed.is_main and target.is_folder else None
        with _open_kept(source, layers, pool, target, distributed) as features:
            done = _write(source, features, pool, target, placed, facts) if distributed.is_main else {}
        if distributed.is_main:
            remove_folder(target.work, ignore_errors=True)
        return done


def _find_images(recipe: Recipe, output: Path, display: Display) -> Dataset:
    dataset = open_images(recipe, display, draws=False)
    check_outside(output, dataset)
    return dataset


def _begin(target: Target, facts: dict[str, Any], files: ExitStack) -> dict[str, Any] | None:
    """Claim the output; return the record of a finished extraction of the same features, else None.

    Args:
        target: the output.
        facts: everything that the tables depend on.
        files: keeps the output locked until it is closed.

    Raises:
        UsageError: the output is something else, or another process is writing it.
        DiskError: it cannot be written.
    """
    if not target.is_folder:
        _check_names_free(target)
    if target.work.is_symlink():
        found = f"{target.work.name}, where unfinished tables are written, is a link to another folder"
        raise UsageError(f"--output {target.path}", found, "Remove the link, or name another --output.")
    create_folder(target.claimed)
    files.enter_context(locked(target.claimed))
    files.callback(_remove_if_empty, target.work)
    if not target.is_folder:
        _check_names_free(target)  # again: another process may have written it before it released the lock
        return None
    before = _read_record(target, facts)
    if before is not None and _is_done(before):
        return {key: value for key, value in before.items() if key != KEY}
    write_json(target.record, facts | {KEY: read_placed(before)})
    return None


def _check_names_free(target: Target) -> None:
    for path in (target.path, target.bad_images):
        if os.path.lexists(path):
            raise _taken(target, path, "Name another --output, or remove it yourself.")


def _taken(target: Target, path: Path, fix: str) -> UsageError:
    what = "there is a file of that name already"
    if path == target.bad_images:
        what = f"{path.name}, where images that cannot be read are listed, already exists beside it"
    return UsageError(f"--output {target.path}", what, fix)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _read_record(target: Target, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of an extraction of the same features in the folder; None if the folder is empty.

    Raises:
        UsageError: it holds something else.
    """
    if not any(entry != target.work for entry in target.path.iterdir()):
        return None
    try:
        before = read_object(target.record)
    except (OSError, ValueError):
        before = None
    if before is None or any(before.get(key) != value for key, value in facts.items()):
        found = "it holds another extraction, or something else"
        fix = "Name another --output, or remove it yourself."
        raise UsageError(f"--output {target.path}", found, fix)
    return before


def _is_done(before: dict[str, Any]) -> bool:
    """Return whether all tables that a record names are there."""
    tables = before.get("tables")
    return isinstance(tables, list) and all(isinstance(path, str) and Path(path).exists() for path in tables)


@contextmanager
def _open_kept(
    source: Source, layers: Sequence[Layer], pool: Pool, target: Target, distributed: Distributed
) -> Iterator[Features]:
    """Open the features, in the cache or, if they do not fit, in a folder beside the output."""
    cache_dir = FeatureCacheDir(source.recipe.cache.max_gb * 1e9)
    obstacle = cache_dir.find_obstacle(compute_bytes(source, layers, pool))
    if not obstacle or not distributed.is_main:
        with open_features(
            source, layers, pool, cache_dir=cache_dir, distributed=distributed.machine
        ) as features:
            yield features
        return
    source.display.say(f"features are not cached for other commands: {obstacle}")
    with open_features(
        source, layers, pool, cache_dir=FeatureCacheDir(folder=target.work), distributed=distributed.machine
    ) as features:
        yield features
        features.kept.discard()


def _write(
    source: Source,
    features: Features,
    pool: Pool,
    target: Target,
    placed: PlacedFiles | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write everything; ``placed`` are the files in the folder, also those of a process that was killed."""
    samples, display = source.dataset.samples, source.display
    bad = {image.path: image.reason for image in source.dataset.unreadable} | features.lost
    usable = features.usable(samples)
    order = torch.tensor(sorted(usable.tolist(), key=lambda index: samples[index].path))
    target.work.mkdir(exist_ok=True)
    _report_bad(bad, target, placed, display)
    tables = _write_tables(source, features, order, target, placed, display)
    if placed is not None:
        rows = [
            (
                one.name,
                path.name,
                one.point.module,
                one.size,
                one.num_features(pool),
                one.pool_of(pool),
                len(order),
            )
            for one, path in zip(features.layers, tables, strict=True)
        ]
        write_csv(target.work / "index.csv", rows, INDEX_COLUMNS)
        placed.place(target.work / "index.csv", target.path / "index.csv")
    else:
        _name(target, bool(bad))
    done = facts | {
        "backbone": source.network.backbone.card.name,
        "pool": pool,
        "num_images": len(order),
        "num_bad": len(bad),
        "num_features": [layer.num_features(pool) for layer in features.layers],
        "tables": [str(path) for path in tables],
    }
    if placed is not None:
        write_json(target.record, done | placed.entry)
    found = f"{count(len(order), 'image')}, {count(len(features.layers), 'layer')}"
    display.say(f"{found}: {target.path}", style="bold")
    return done


def _report_bad(bad: dict[str, str], target: Target, placed: PlacedFiles | None, display: Display) -> None:
    if bad:
        write_csv(target.work / target.bad_images.name, sorted(bad.items()), ("path", "reason"))
        if placed is not None:
            placed.place(target.work / target.bad_images.name, target.bad_images)
        images = count(len(bad), "image has", "images have")
        display.warn(f"{images} no row; listed in {target.bad_images}")


def _write_tables(
    source: Source,
    features: Features,
    order: Tensor,
    target: Target,
    placed: PlacedFiles | None,
    display: Display,
) -> list[Path]:
    images = [_describe(source, sample) for sample in source.dataset.samples]
    layers = [LayerRows(one.name, rows) for one, rows in zip(features.layers, features.rows, strict=True)]
    groups = [(target.path, layers)]
    if target.is_folder:
        groups = [(target.table_of(one), [rows]) for one, rows in zip(features.layers, layers, strict=True)]
    for path, group in groups:
        if placed is not None and placed.holds(path):  # extraction.json says what it holds
            continue
        part = target.work / path.name
        with display.track(f"writing {path.name}", len(order) * len(group)) as advance:
            write_table(part, target.format, images, order, group, lambda done: advance(done, ""))
        if placed is not None:
            placed.place(part, path)
    return [path for path, _ in groups]


def _name(target: Target, has_bad: bool) -> None:
    """Give a single table its name, and the list of the images without a row.

    Raises:
        UsageError: another file has one of the names meanwhile; what was computed is kept.
    """
    paths = (target.path, target.bad_images) if has_bad else (target.path,)
    for path in paths:  # both, before one of them is renamed
        if os.path.lexists(path):
            raise _appeared(target, path)
    for path in paths:
        name_result(target.work / path.name, path, target.path)
    sync_folder(target.path.parent)


def _appeared(target: Target, path: Path) -> UsageError:
    return _taken(target, path, f"Move it away, and take {target.work / path.name} in its place.")


def _describe(source: Source, sample: Sample) -> tuple[str, str, str]:
    if not source.dataset.is_labelled:
        return sample.path, "", ""
    return sample.path, source.dataset.classes[sample.label], sample.split
