"""``finetune extract``: features of layers as tables, all of them from one forward pass.

::

    --output features.csv     one table: path, label, split, then every layer's numbers side by side
    --output features/        a table for each layer, index.csv, bad_images.csv, extraction.json

Features are cached as they are computed, so that a killed extraction resumes where it stopped. Tables are
written from the cache, sorted by path, and appear under their names when they are complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from finetune.data.dataset import PreparedDataset, Sample
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
from finetune.features.network import open_network
from finetune.features.tables import LayerRows, TableFormat, check_format, check_names, write_table
from finetune.recipe import Recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.claim import create_folder
from finetune.runs.files import write_csv, write_json
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
        """The folder for features that do not fit in the cache, until the output is written."""
        return self.path.with_name(f".{self.path.name}.work")

    def table_of(self, layer: Layer) -> Path:
        """Return the path of a layer's table in a folder."""
        return self.path / f"{layer.name}.{self.format}"


def find_target(output: Path, format: str | None) -> Target:
    """Return the output: a single table if the suffix is that of a known format, else a folder.

    Raises:
        UsageError: the format is unknown, or differs from the suffix.
        EnvironmentFaultError: the format needs a package that is not installed.
    """
    suffix = output.suffix.lower().removeprefix(".")
    is_table = suffix in FORMATS and not output.is_dir()
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
    with translated_errors(distributed=distributed):
        target = find_target(output, format)
        network = distributed.first(lambda: open_network(recipe, display, distributed))
        layers = network.layers.select(wanted, pool)
        check_names(target.format, [layer.name for layer in layers])
        dataset = distributed.share(lambda: _read_images(recipe, output, display))
        source = open_source(recipe, network, dataset, display)
        facts = {
            "features": describe_extraction(source, layers, pool),
            "layers": [layer.name for layer in layers],
            "format": target.format,
            "pictures": digest_of([_describe(source, sample) for sample in dataset.samples]),
        }
        if before := distributed.share(lambda: _begin(target, facts)):
            display.say(f"{output} already holds these features")
            return before
        with _open_kept(source, layers, pool, target, distributed) as features:
            return _write(source, features, pool, target, facts) if distributed.is_main else {}


def _read_images(recipe: Recipe, output: Path, display: Display) -> PreparedDataset:
    dataset = open_images(recipe, display, draws=False)
    check_outside(output, dataset)
    return read_images(recipe, dataset, display)


def _begin(target: Target, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Claim the output; return the record of a finished extraction of the same features, else None."""
    if _is_done(target, facts):
        return json.loads(target.record.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    create_folder(target.path if target.is_folder else target.path.parent)
    if target.is_folder:
        write_json(target.record, facts)
    return None


def _is_done(target: Target, facts: dict[str, Any]) -> bool:
    """Return whether the output holds a finished extraction of the same features.

    Raises:
        UsageError: the output exists and is something else.
    """
    asked, fix = f"--output {target.path}", "Name another --output, or remove it yourself."
    if not target.is_folder:
        if target.path.exists():
            raise UsageError(asked, "there is a file of that name already", fix)
        return False
    if not target.path.exists():
        return False
    if not target.path.is_dir():
        raise UsageError(asked, "it is a file", fix)
    try:
        before = json.loads(target.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before is None and not any(target.path.iterdir()):
        return False
    if not isinstance(before, dict) or any(before.get(key) != value for key, value in facts.items()):
        raise UsageError(asked, "it holds another extraction, or something else", fix)
    return "tables" in before and all(Path(path).exists() for path in before["tables"])


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
        shutil.rmtree(target.work, ignore_errors=True)  # of ours; a killed one may have left more


def _write(
    source: Source, features: Features, pool: Pool, target: Target, facts: dict[str, Any]
) -> dict[str, Any]:
    samples, display = source.dataset.samples, source.display
    bad = {image.path: image.reason for image in source.dataset.unreadable} | features.lost
    usable = features.usable(samples)
    order = torch.tensor(sorted(usable.tolist(), key=lambda index: samples[index].path))
    _report_bad(bad, target, display)
    tables = _write_tables(source, features, order, target, display)
    if target.is_folder:
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
        write_csv(target.path / "index.csv", rows, INDEX_COLUMNS)
    done = facts | {
        "backbone": source.network.backbone.card.name,
        "pool": pool,
        "num_images": len(order),
        "num_bad": len(bad),
        "num_features": [layer.num_features(pool) for layer in features.layers],
        "tables": [str(path) for path in tables],
    }
    if target.is_folder:
        write_json(target.record, done)
    found = f"{count(len(order), 'image')}, {count(len(features.layers), 'layer')}"
    display.say(f"{found}: {target.path}", style="bold")
    return done


def _report_bad(bad: dict[str, str], target: Target, display: Display) -> None:
    if bad:
        write_csv(target.bad_images, sorted(bad.items()), ("path", "reason"))
        images = count(len(bad), "image has", "images have")
        display.warn(f"{images} no row; listed in {target.bad_images}")


def _write_tables(
    source: Source, features: Features, order: Tensor, target: Target, display: Display
) -> list[Path]:
    images = [_describe(source, sample) for sample in source.dataset.samples]
    layers = [LayerRows(one.name, rows) for one, rows in zip(features.layers, features.rows, strict=True)]
    groups = [(target.path, layers)]
    if target.is_folder:
        groups = [(target.table_of(one), [rows]) for one, rows in zip(features.layers, layers, strict=True)]
    for path, group in groups:
        if path.exists():  # whole, from before a kill: extraction.json says what it holds
            continue
        with display.track(f"writing {path.name}", len(order) * len(group)) as advance:
            write_table(path, target.format, images, order, group, lambda done: advance(done, ""))
    return [path for path, _ in groups]


def _describe(source: Source, sample: Sample) -> tuple[str, str, str]:
    if not source.dataset.is_labelled:
        return sample.path, "", ""
    return sample.path, source.dataset.classes[sample.label], sample.split
