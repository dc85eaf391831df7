"""``finetune similar`` and ``finetune map``: images by their features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.data.decode import BadImageError
from finetune.data.prepare import check_outside
from finetune.data.thumbnail import load_thumbnail
from finetune.data.transforms import Normalizer, build_eval_transform
from finetune.errors import DataError
from finetune.features.extraction import Source, open_features, open_images, open_source
from finetune.features.network import Network, open_network, take_channels
from finetune.features.retrieval import (
    check_umap,
    count_reads,
    find_nearest,
    find_plane,
    find_umap_plane,
)
from finetune.plots.features import draw_map
from finetune.plots.sheet import CELL, QUERY, Tile, write_retrieval
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from pretrained.graph.layers import FeatureExtractor, Layer
from pretrained.graph.pooling import Pool

Method = Literal["pca", "umap"]
_SIMILAR_COLUMNS = ("rank", "path", "label", "similarity")


def find_similar(
    recipe: Recipe, image: Path, layer: str, top: int, output: Path, pool: Pool, display: Display
) -> list[dict[str, Any]]:
    """Find the images that are most similar to one, and draw them on a contact sheet.

    The image itself is left out if the data contain it.

    Args:
        recipe: settings of backbone, data, input, cache and machine.
        image: the query image.
        layer: the layer whose features are compared by cosine similarity. Low layers compare texture, high
            ones meaning.
        top: number of images to find.
        output: a new folder for ``similar.csv`` and ``similar.png``.
        pool: how the layer's output becomes a row.
        display: shows progress.

    Returns:
        The rows of ``similar.csv``, the most similar first.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        source, chosen = _open(recipe, layer, pool, output, display)
        query = _see(source.network, image, chosen, pool)
        with new_folder(output) as folder:
            samples = source.dataset.samples
            with open_features(source, [chosen], pool) as features:
                usable = features.usable(samples)
                others = [i for i in usable.tolist() if not _is_same(source.dataset.file(samples[i]), image)]
                with display.track("comparing", len(others)) as advance:
                    found = find_nearest(
                        features.rows[0],
                        torch.tensor(others, dtype=torch.int64),
                        query,
                        top,
                        lambda done: advance(done, ""),
                    )
            rows = [
                {
                    "rank": rank,
                    "path": samples[i].path,
                    "label": _label(source, samples[i]),
                    "similarity": cosine,
                }
                for rank, (i, cosine) in enumerate(found, 1)
            ]
            write_csv(folder / "similar.csv", [tuple(row.values()) for row in rows], _SIMILAR_COLUMNS)
            hits = [_draw_hit(source, samples[i], rank, cosine) for rank, (i, cosine) in enumerate(found, 1)]
            query_tile = Tile(load_thumbnail(image, QUERY, source.value_range), ("query", image.name))
            write_retrieval(folder / "similar.png", query_tile, hits)
        display.say(f"{output}/similar.csv, similar.png", style="bold")
        return rows


def _draw_hit(source: Source, sample: Sample, rank: int, similarity: float) -> Tile:
    file = source.dataset.file(sample)
    image = load_thumbnail(file, CELL, source.value_range)
    return Tile(image, (f"{rank}.  {similarity:.3f}", _label(source, sample), file.name))


def _open(recipe: Recipe, layer: str, pool: Pool, output: Path, display: Display) -> tuple[Source, Layer]:
    """Open the images and the network, and return them with the layer of that name."""
    dataset = open_images(recipe, display)
    check_outside(output, dataset)
    recipe = take_channels(recipe, dataset)
    network = open_network(recipe, display)
    chosen = network.find_layer(layer, pool)
    return open_source(recipe, network, dataset, display), chosen


def _is_same(file: Path, image: Path) -> bool:
    try:
        return os.path.samefile(file, image)  # noqa: PTH121
    except OSError:
        return False


def _see(network: Network, image: Path, layer: Layer, pool: Pool) -> Tensor:
    """Return the features (D,) of one image."""
    preprocessing = network.backbone.card.preprocessing
    transform = build_eval_transform(preprocessing)
    try:
        view = transform(transform.open(image))
    except BadImageError as error:
        raise DataError(str(image), error.reason, "Name an image that can be decoded.") from None
    device = network.placement.device
    pixels = Normalizer(preprocessing, device)(view.unsqueeze(0).to(device))
    with torch.inference_mode():
        [row] = FeatureExtractor(network.backbone.network, [layer], pool)(pixels)
    return row[0].cpu()


def _label(source: Source, sample: Sample) -> str:
    return source.dataset.classes[sample.label] if source.dataset.is_labelled else ""


def draw_feature_map(
    recipe: Recipe, layer: str, method: Method, output: Path, pool: Pool, display: Display
) -> None:
    """Draw all images as points in a plane, coloured by class.

    Args:
        recipe: settings of backbone, data, input, cache, machine and seed.
        layer: the layer whose features are drawn.
        method: ``pca``: the first two principal components of standardised features; ``umap``:
            arXiv:1802.03426.
        output: a new folder for ``map.csv`` and ``map.png``.
        pool: how the layer's output becomes a row.
        display: shows progress.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        if method == "umap":
            check_umap()
        source, chosen = _open(recipe, layer, pool, output, display)
        with new_folder(output) as folder:
            samples = source.dataset.samples
            with open_features(source, [chosen], pool) as features:
                usable = features.usable(samples)
                find = find_plane if method == "pca" else find_umap_plane
                with display.track(
                    f"projecting to a plane ({method})", count_reads(features.rows[0], usable)
                ) as advance:
                    plane = find(features.rows[0], usable, lambda done: advance(done, ""))
            shown = [samples[index] for index in usable.tolist()]
            rows = [
                (sample.path, _label(source, sample), sample.split, x, y)
                for sample, (x, y) in zip(shown, plane.points.tolist(), strict=True)
            ]
            write_csv(folder / "map.csv", rows, ("path", "label", "split", "x", "y"))
            title = f"{source.network.backbone.card.name}, {chosen.name}, {len(shown):,} images"
            names = ("component 1", "component 2") if method == "pca" else ("UMAP 1", "UMAP 2")
            draw_map(
                folder / "map.png",
                plane.points.numpy(),
                _classes(shown),
                _names(source),
                title,
                names,
                plane.shares,
            )
        display.say(f"{output}/map.csv, map.png", style="bold")


def _classes(samples: Sequence[Sample]) -> list[int]:
    return [max(sample.label, 0) for sample in samples]


def _names(source: Source) -> tuple[str, ...]:
    return source.dataset.classes or ("no labels",)
