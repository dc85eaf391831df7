"""The surest mistakes: what the network saw, and where it saw what it said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import device, nn

from finetune.data.decode import BadImageError
from finetune.data.transforms import Normalizer, Transform, build_eval_transform
from finetune.explain.cam import GradCam, HeatMap
from finetune.explain.overlay import draw_overlay
from finetune.report.facts import Facts, Prediction
from finetune.report.pictures import Album, Picture, encode
from pretrained.catalog import Card

MOST_MISTAKES = 12
_SIDE = 208


@dataclass(frozen=True)
class Panel:
    """One picture of a mistake: what it shows, and its file among the plots."""

    words: str
    picture: Picture
    name: str = ""
    content: bytes = b""


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction with its pictures: the view, and a heat map for each of the two classes."""

    prediction: Prediction
    panels: tuple[Panel, ...]


class Explainer:
    """Shows mistakes of one network.

    Args:
        network: in eval mode, on the CPU.
        card: with class names and preprocessing.
    """

    def __init__(self, network: nn.Module, card: Card) -> None:
        self._labels = {name: index for index, name in enumerate(card.label_names)}
        self._cam = GradCam(network, card.preprocessing.input_size)
        self._normalize = Normalizer(card.preprocessing, device("cpu"))
        self.transform: Transform = build_eval_transform(card.preprocessing)

    def explain(self, image: Image.Image, classes: list[str]) -> tuple[Image.Image, list[HeatMap]]:
        """Return the network's view of an image, and a map for each class."""
        view = self.transform(image)
        seen = Image.fromarray(view.permute(1, 2, 0).numpy())
        if any(name not in self._labels for name in classes):
            return seen, [HeatMap(None, "the model does not know the class")] * len(classes)
        indices = [[self._labels[name]] for name in classes]
        return seen, [maps[0] for maps in self._cam(self._normalize(view[None]), *indices)]


def show_mistakes(
    facts: Facts, album: Album, explainer: Explainer | None, advance: Callable[[], None]
) -> list[Mistake]:
    """Return the surest mistakes, the surest first.

    Args:
        facts: of the run.
        album: makes the pictures.
        explainer: None where there is no model; then there are no heat maps.
        advance: called after each.
    """
    shown = []
    for number, prediction in enumerate(facts.mistakes[:MOST_MISTAKES], start=1):
        shown.append(Mistake(prediction, _panels(number, prediction, album, explainer)))
        advance()
    return shown


def _panels(
    number: int, prediction: Prediction, album: Album, explainer: Explainer | None
) -> tuple[Panel, ...]:
    file = album.find(prediction.path)
    if explainer is None or file is None:
        return (Panel("picture", album.show_file(prediction.path, _SIDE)),)
    try:
        image = explainer.transform.open(file)
    except BadImageError as error:
        return (Panel("picture", Picture("", f"gone: {error.reason}")),)
    seen, maps = explainer.explain(image, [prediction.predicted, prediction.label])
    scale = _SIDE / max(seen.size)
    small = seen.resize((round(seen.width * scale), round(seen.height * scale)), Image.Resampling.LANCZOS)
    panels = [Panel("what it saw", album.show(small))]
    wanted = (("predicted", prediction.predicted), ("true", prediction.label))
    for (kind, label), heat in zip(wanted, maps, strict=True):
        words = f"evidence for {label}"
        if heat.values is None:
            panels.append(Panel(words, Picture("", heat.reason)))
            continue
        content = encode(draw_overlay(small, heat.values))
        name = f"mistake-{number:02}-{kind}.jpg"
        panels.append(Panel(words, album.show_bytes(content), name, content))
    return tuple(panels)
