"""Images of the page: samples inlined up to a size limit, and the most confident mistakes with heat maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps
from torch import device, nn

from finetune.data.decode import BadImageError, decode_image
from finetune.data.depth import ValueRange
from finetune.data.transforms import Normalizer, Transform, build_eval_transform
from finetune.evaluation.predictor import resolve_names
from finetune.explain.cam import GradCam, HeatMap
from finetune.plots.overlay import draw_overlay
from finetune.report.facts import Facts
from finetune.runs.reader import PredictionRow
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
            image = decode_image(file, side, self._value_range)
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
class Mistake:
    """A wrong prediction with its images: the network's input, and a heat map for each of the two classes."""

    prediction: PredictionRow
    panels: tuple[Panel, ...]


class Explainer:
    """Computes heat maps of one network.

    Args:
        network: in eval mode, on the CPU.
        card: with class names and preprocessing.
    """

    def __init__(self, network: nn.Module, card: Card) -> None:
        self._labels = {name: index for index, name in enumerate(resolve_names(card))}
        self._cam = GradCam(network, card.preprocessing.input_size)
        self._normalize = Normalizer(card.preprocessing, device("cpu"))
        self.transform: Transform = build_eval_transform(card.preprocessing)

    def explain(self, image: Image.Image, classes: list[str]) -> tuple[Image.Image, list[HeatMap]]:
        """Return the network's input, as an image, and a heat map for each class."""
        view = self.transform(image)
        seen = Image.fromarray(view.permute(1, 2, 0).numpy())
        if any(name not in self._labels for name in classes):
            return seen, [HeatMap(None, "the model does not know the class")] * len(classes)
        indices = [[self._labels[name]] for name in classes]
        return seen, [maps[0] for maps in self._cam(self._normalize(view[None]), *indices)]


def show_mistakes(
    facts: Facts, album: Album, explainer: Explainer | None, advance: Callable[[], None]
) -> list[Mistake]:
    """Return at most ``MOST_MISTAKES`` mistakes, the most confident first.

    Args:
        facts: content of the run's files.
        album: loads the images.
        explainer: computes heat maps; None if the model is missing.
        advance: called after each mistake.
    """
    shown = []
    for number, prediction in enumerate(facts.mistakes[:MOST_MISTAKES], start=1):
        shown.append(Mistake(prediction, _panels(number, prediction, album, explainer)))
        advance()
    return shown


def _panels(
    number: int, prediction: PredictionRow, album: Album, explainer: Explainer | None
) -> tuple[Panel, ...]:
    file = album.find(prediction.path)
    if explainer is None or file is None:
        return (Panel("image", album.show_file(prediction.path, _SIDE)),)
    try:
        image = explainer.transform.open(file)
    except BadImageError as error:
        return (Panel("image", InlineImage("", f"missing: {error.reason}")),)
    seen, maps = explainer.explain(image, [prediction.predicted, prediction.label])
    scale = _SIDE / max(seen.size)
    small = seen.resize((round(seen.width * scale), round(seen.height * scale)), Image.Resampling.LANCZOS)
    panels = [Panel("network input", album.show(small))]
    wanted = (("predicted", prediction.predicted), ("true", prediction.label))
    for (kind, label), heat in zip(wanted, maps, strict=True):
        caption = f"evidence for {label}"
        if heat.values is None:
            panels.append(Panel(caption, InlineImage("", heat.reason)))
            continue
        content = encode(draw_overlay(small, heat.values.numpy()))
        name = f"mistake-{number:02}-{kind}.jpg"
        panels.append(Panel(caption, album.show_bytes(content), name, content))
    return tuple(panels)
