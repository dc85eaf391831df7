"""Images of the page: samples inlined up to a size limit, and the most confident mistakes with heat maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps
from torch import Tensor, device, nn

from finetune.data.channels.depth import ValueRange
from finetune.data.decode import BadImageError
from finetune.data.thumbnail import load_picture
from finetune.data.transforms import Normalizer, Transform, build_eval_transform, draw_view
from finetune.evaluation.predictor import resolve_names
from finetune.explain.attribution.cam import GradCam
from finetune.explain.attribution.heat_map import ComputeMaps, HeatMap
from finetune.explain.checks.deletion import measure_advantage
from finetune.explain.checks.randomisation import measure_randomisation
from finetune.explain.checks.verdicts import judge_deletion, judge_randomisation, withhold
from finetune.plots.overlay import draw_overlay
from finetune.report.facts import Facts
from finetune.report.mistakes import Mistake
from finetune.targets import read_target
from pretrained.backbone import describe_stages
from pretrained.catalog import Card

MOST_BYTES = 3_000_000
"""Size limit of all images of a page together, before base64 encoding."""
_QUALITY = 78
"""JPEG quality."""


@dataclass(frozen=True)
class InlineImage:
    """An inlined image, or the reason why it is missing.

    Attributes:
        source: a ``data:`` URL; empty if the image is missing.
        missing: the reason why it is missing, in a few words; empty if it is not.
    """

    source: str
    missing: str = ""


class Album:
    """Loads and inlines the images of one page, up to a size limit.

    Args:
        root: folder that image paths are relative to; None if it is unknown or missing.
        most_bytes: size limit of all images together; images beyond it are left out.
        value_range: the values that become black and white in images of more than 8 bits.

    Attributes:
        left_out: number of images left out because the page was full.
    """

    def __init__(
        self, root: Path | None, most_bytes: int = MOST_BYTES, value_range: ValueRange | None = None
    ) -> None:
        self._root, self._room, self.left_out = root, most_bytes, 0
        self._value_range = value_range

    def find(self, path: str) -> Path | None:
        """Return the file of an image; None if the root is unknown or the path leaves it."""
        pure = PurePosixPath(path)
        if self._root is None or pure.is_absolute() or ".." in pure.parts:
            return None
        return self._root / pure

    def show_file(self, path: str, side: int) -> InlineImage:
        """Return the central square of an image of the data set, resized to ``side`` pixels."""
        file = self.find(path)
        if file is None:
            return InlineImage("", "missing")
        try:
            image = load_picture(file, side, self._value_range)
        except BadImageError as error:
            return InlineImage("", f"missing: {error.reason}")
        return self.show(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))

    def show(self, image: Image.Image) -> InlineImage:
        """Return an image at its own size, encoded as JPEG."""
        return self.show_bytes(encode(image))

    def show_bytes(self, content: bytes) -> InlineImage:
        """Return the content of a JPEG file, inlined unchanged."""
        if len(content) > self._room:
            self.left_out += 1
            return InlineImage("", "left out: the page is full")
        self._room -= len(content)
        return InlineImage("data:image/jpeg;base64," + base64.b64encode(content).decode())


def encode(image: Image.Image) -> bytes:
    """Return an image encoded as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()


# --- mistakes with heat maps ----------------------------------------------------------------------


MOST_MISTAKES = 12
_SIDE = 208
"""Longer side of an image of a mistake, in pixels."""


@dataclass(frozen=True)
class Panel:
    """One image of a mistake with its caption; a heat map also has a file in ``plots/``."""

    caption: str
    image: InlineImage
    name: str = ""
    content: bytes = b""


@dataclass(frozen=True)
class ShownMistake:
    """A wrong answer with its images: the network's input, and a heat map for each output it is about."""

    mistake: Mistake
    panels: tuple[Panel, ...]


_STEPS, _PLACES = 4, 2
"""Of the check by deletion: nine passes of the network for a map, instead of 28 in `finetune explain`."""


class Explainer:
    """Computes heat maps of one network, and leaves those out that its checks speak against.

    Args:
        network: in eval mode, on the CPU.
        card: with class names and preprocessing.
    """

    def __init__(self, network: nn.Module, card: Card) -> None:
        # Nearly twice as fast on a CPU.
        self._network, self._card = network.to(memory_format=torch.channels_last), card
        self._labels = {name: index for index, name in enumerate(resolve_names(card))}
        self._cam = GradCam(self._network, card.preprocessing.input_size)
        self._normalize = Normalizer(card.preprocessing, device("cpu"))
        self.transform: Transform = build_eval_transform(card.preprocessing)

    def explain(self, views: Sequence[Tensor], *classes: Sequence[str]) -> list[list[HeatMap]]:
        """Return, for each list of classes, a map for each image.

        Args:
            views: the network's input, uint8 (3, H, W) or float32 (C, H, W), B images.
            classes: lists of B class names; the network may not know some of them.
        """
        pixels = self._normalize(torch.stack(list(views))).contiguous(memory_format=torch.channels_last)
        indices = [[self._labels.get(name, 0) for name in names] for names in classes]
        found = self._check(pixels, indices, self._cam(pixels, *indices))
        unknown = HeatMap(None, "the model does not know the class")
        return [
            [heat if name in self._labels else unknown for name, heat in zip(names, maps, strict=True)]
            for names, maps in zip(classes, found, strict=True)
        ]

    def _check(
        self, pixels: Tensor, indices: Sequence[Sequence[int]], found: Sequence[Sequence[HeatMap]]
    ) -> list[list[HeatMap]]:
        """Return the maps that may be shown, and the reason in place of the others."""
        if self._cam.reason:
            return [list(maps) for maps in found]
        stages, _ = describe_stages(self._card)
        target = read_target(dict(self._card.target))
        similar = measure_randomisation(self._network, stages, self._make, pixels, indices[0], found[0])
        advantages = [
            measure_advantage(self._network, pixels, wanted, maps, _STEPS, _PLACES, target)
            for wanted, maps in zip(indices, found, strict=True)
        ]
        checks = (
            judge_randomisation(similar, sum(heat.values is not None for heat in found[0])),
            judge_deletion([one for some in advantages for one in some]),
        )
        return [
            [withhold(heat, one, checks) for heat, one in zip(maps, some, strict=True)]
            for maps, some in zip(found, advantages, strict=True)
        ]

    def _make(self, network: nn.Module) -> ComputeMaps:
        cam = GradCam(network, self._card.preprocessing.input_size, self._cam.position)
        return lambda pixels, classes: cam(pixels, classes)[0]


def show_mistakes(
    facts: Facts, album: Album, explainer: Explainer | None, advance: Callable[[], None]
) -> list[ShownMistake]:
    """Return at most ``MOST_MISTAKES`` mistakes, the worst first.

    Args:
        facts: content of the run's files.
        album: loads the images.
        explainer: computes heat maps; None if the model is missing.
        advance: called after each mistake.
    """
    mistakes = facts.mistakes[:MOST_MISTAKES]
    opened = [_open(mistake.path, album, explainer) for mistake in mistakes]
    seen = [view for view in opened if isinstance(view, Tensor)]
    known = [one for one, view in zip(mistakes, opened, strict=True) if isinstance(view, Tensor)]
    maps: list[list[HeatMap]] = []
    if explainer is not None and seen:
        maps = explainer.explain(seen, *zip(*(one.outputs for one in known), strict=True))
    of_each = iter(zip(*maps, strict=True))
    shown = []
    for number, (mistake, view) in enumerate(zip(mistakes, opened, strict=True), start=1):
        if isinstance(view, Tensor):
            panels = _panels(number, mistake, album, view, next(of_each))
        else:
            panels = (Panel("image", view),)
        shown.append(ShownMistake(mistake, panels))
        advance()
    return shown


def _open(path: str, album: Album, explainer: Explainer | None) -> Tensor | InlineImage:
    """Return the network's input; without a network or a readable file, what is shown in its place."""
    file = album.find(path)
    if explainer is None or file is None:
        return album.show_file(path, _SIDE)
    try:
        return explainer.transform(explainer.transform.open(file))
    except BadImageError as error:
        return InlineImage("", f"missing: {error.reason}")


def _panels(
    number: int, mistake: Mistake, album: Album, view: Tensor, maps: Sequence[HeatMap]
) -> tuple[Panel, ...]:
    seen = draw_view(view)
    scale = _SIDE / max(seen.size)
    small = seen.resize((round(seen.width * scale), round(seen.height * scale)), Image.Resampling.LANCZOS)
    panels = [Panel("network input", album.show(small))]
    for kind, output, heat in zip(("predicted", "true"), mistake.outputs, maps, strict=False):
        caption = f"evidence for {output}"
        if heat.values is None:
            panels.append(Panel(caption, InlineImage("", heat.reason)))
            continue
        content = encode(draw_overlay(small, heat.values.numpy()))
        name = f"mistake-{number:02}-{kind}.jpg"
        panels.append(Panel(caption, album.show_bytes(content), name, content))
    return tuple(panels)
