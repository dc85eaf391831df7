"""``audit.png``: for each alarm, images that it predicted right, of all classes in turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from finetune.data.decode import BadImageError
from finetune.data.thumbnail import load_thumbnail
from finetune.data.transforms import Transform, build_eval_transform, draw_view
from finetune.features.extraction import Source
from finetune.features.regions import Region, build_mask
from finetune.plots.sheet import CELL, PAPER, Section, Tile, write_sections
from finetune.shortcuts.background import Background
from finetune.shortcuts.file_facts import FileFacts
from finetune.shortcuts.find import Shortcut
from finetune.shortcuts.meaning import MEANINGS

MOST_TILES = 12


def write_pictures(
    path: Path, source: Source, found: Sequence[Shortcut], facts: FileFacts, background: Background | None
) -> bool:
    """Draw a section for each alarm; return whether there was any.

    Args:
        path: the PNG file.
        source: the images, N of them.
        found: the tests in the order of the sections.
        facts: of the same images.
        background: of a run.

    Raises:
        DiskError: the file cannot be written.
    """
    alarms = [one for one in found if one.is_alarm]
    return write_sections(path, [_draw(source, one, facts, background) for one in alarms])


def _draw(source: Source, alarm: Shortcut, facts: FileFacts, background: Background | None) -> Section:
    title = MEANINGS[alarm.name].title
    title = title[0].upper() + title[1:]
    if alarm.name == "background" and background is not None:
        said = f"{title}: those that depend most on what surrounds the middle (log odds lost)"
        return Section(said, len(background.without_middle), background.tiles)
    right = np.flatnonzero(alarm.hits)
    said = f"{title}: {alarm.accuracy:.0%} right, {alarm.chance:.0%} by chance; some that are right"
    tiles = [_draw_tile(source, alarm.name, facts, place) for place in _take_turns(source, right.tolist())]
    return Section(said, len(right), tiles)


def _take_turns(source: Source, places: Sequence[int]) -> list[int]:
    """Return some of the images, at most :data:`MOST_TILES`, of all classes in turns, two of each first."""
    samples, seen, ranked = source.dataset.samples, dict[int, int](), []
    for place in places:
        label = samples[place].label
        seen[label] = seen.get(label, 0) + 1
        ranked.append(((seen[label] - 1) // 2, label, place))
    chosen = sorted(ranked)[:MOST_TILES]
    return [place for _, _, place in sorted(chosen, key=lambda one: one[1:])]


def _draw_tile(source: Source, name: str, facts: FileFacts, place: int) -> Tile:
    sample = source.dataset.samples[place]
    file, label = source.dataset.file(sample), source.dataset.classes[sample.label]
    base = PurePosixPath(sample.path).name
    if name in facts.words:
        said = facts.words[name][place]
        return Tile(load_thumbnail(file, CELL, source.value_range), (label, said, base))
    transform = build_eval_transform(source.network.backbone.card.preprocessing)
    return Tile(
        _draw_region(transform, file, "border" if name == "border" else "surroundings"), (label, base)
    )


def _draw_region(transform: Transform, file: Path, region: Region) -> Image.Image | str:
    """Return what the classifier saw of an image, at the size of a tile; the rest is blank."""
    try:
        view = draw_view(transform(transform.open(file)))
    except BadImageError as error:
        return error.reason
    mask = build_mask(region, (view.height, view.width)).numpy()
    shown = Image.composite(view, Image.new("RGB", view.size, PAPER), Image.fromarray(mask))
    scale = CELL / max(view.size)
    return shown.resize((round(view.width * scale), round(view.height * scale)), Image.Resampling.LANCZOS)
