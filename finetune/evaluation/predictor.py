"""Prediction with a trained network: images in, labels and probabilities out.

::

    import finetune

    print(finetune.load("runs/ants").predict("photo.jpg").label)

::

    image -> views, uint8 (V, 3, H, W)         -> logits (V, K) -> probabilities (K,)
             evaluation transform, in threads     network          softmax of logits / temperature, mean of V

Shape legend: B images, V views of each, K classes, H W pixels.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.data.channels.arrays import arrange, describe_shape
from finetune.data.channels.bands import convert_bands, standardise
from finetune.data.decode import BadImageError, convert_image
from finetune.data.loader import Placement
from finetune.data.transforms import Normalizer, Opened, build_eval_transform
from finetune.errors import DataError, FinetuneError, UsageError
from finetune.evaluation.views import Views, build_views, compute_mean_over_views
from finetune.features.network import place_network
from finetune.features.runtime import choose_runtime, open_forward
from finetune.features.store import Forward
from finetune.system.device import available_cores, compute_chunk_size, resolve_device
from finetune.system.display import Display
from finetune.system.forward import ChunkedForward
from finetune.targets import make_unique, rank_classes, read_target
from pretrained.backbone import load_source
from pretrained.catalog import Card, find_card
from pretrained.network import is_convolutional

Floats = npt.NDArray[np.float32]
ImageInput = str | PathLike[str] | Image.Image | npt.NDArray[Any]
"""A path, a Pillow image, or RGB pixels (H, W, 3) uint8. A network of arrays takes paths and numbers."""
T = TypeVar("T")
CPU_BATCH, GPU_BATCH = 32, 128
_AHEAD = 2
"""Batches that are decoded while the network computes another one; more would only use memory."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image.

    Attributes:
        label: the most probable class; the classes above their thresholds, joined by ``|``; or the number.
        confidence: probability of the class, in [0, 1]; None for other labels.
        values: (K,) float32, the probability of each class in the order of ``classes``, or the number.
        classes: class names in index order.
    """

    label: str
    confidence: float | None
    values: Floats = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each class by name."""
        return dict(zip(self.classes, self.values.tolist(), strict=True))

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most probable classes with their probabilities, in descending order."""
        return [(self.classes[index], float(self.values[index])) for index in rank_classes(self.values, k)]


@dataclass(frozen=True)
class BatchResult(Generic[T]):
    """The predictions for a batch.

    Attributes:
        inputs: the images of the batch, in order.
        probabilities: (G, K) float32 of the G images that could be read, in order.
        faults: reasons why the other images could not be read, by position in the batch.
    """

    inputs: Sequence[T]
    probabilities: Floats
    faults: dict[int, str]


class Predictor:
    """A network with its preprocessing, classes and calibration; :func:`load` creates one.

    Threads may share a predictor: a lock lets one at a time use the network.

    Args:
        network: a network with a classifier; it is moved to the device and set to eval mode.
        card: preprocessing, classes and temperature of the network.
        device: device of the network.
        batch_size: images per batch.
        workers: number of decoding threads.
        views: transform from an image to its views.
        forward: what computes the logits; by default the network.

    Attributes:
        card: preprocessing, classes, temperature, source and licence of the network.
        classes: unique class names in index order; the indices as text if the card has no names.
        target: what the labels are.
    """

    def __init__(
        self,
        network: nn.Module,
        card: Card,
        device: torch.device,
        batch_size: int,
        workers: int,
        views: Views,
        forward: Forward | None = None,
    ) -> None:
        self.card, self.device, self.batch_size = card, device, batch_size
        self.target = read_target(dict(card.target))
        self.classes = resolve_names(card)
        self._placement = Placement(device, is_convolutional(network))
        self.network = place_network(network.eval(), self._placement)
        self._forward = forward or self.network
        self._views, self._workers = views, max(1, workers)
        self._transform = build_eval_transform(card.preprocessing)
        self._normalize = Normalizer(card.preprocessing, device)
        chunk_size = compute_chunk_size(*card.preprocessing.size) if device.type == "cpu" else batch_size
        self._chunked = ChunkedForward(self._forward, chunk_size)
        self._lock = threading.Lock()

    def open(self, image: Path | Image.Image | npt.NDArray[Any]) -> Opened:
        """Return an image as the network sees it before it is resized: RGB, upright, 8 bits a channel.

        A network of bands gets their standardised numbers, and one that takes arrays the array of the file.

        Raises:
            BadImageError: it cannot be read.
        """
        preprocessing = self.card.preprocessing
        if isinstance(image, Path):
            return self._transform.open(image)
        if preprocessing.kind == "bands":
            return standardise(convert_bands(image, preprocessing.channels), preprocessing)
        if preprocessing.is_rgb and isinstance(image, Image.Image):
            return convert_image(image, preprocessing.value_range)
        wanted = describe_shape(preprocessing.input_size)
        raise BadImageError(f"an image, and the network takes arrays of {wanted} values")

    @property
    def num_views(self) -> int:
        """Number of views of an image (V)."""
        return self._views.num_views

    def without_temperature(self) -> Predictor:
        """Return the same network without temperature scaling."""
        return self._with(card=replace(self.card, temperature=1.0))

    def with_views(self, crops: int, scales: Sequence[int] = ()) -> Predictor:
        """Return the same network with other views (:func:`finetune.evaluation.views.build_views`)."""
        return self._with(views=build_views(self.card.preprocessing, crops, scales))

    def with_runtime_for(self, num_images: int, display: Display) -> Predictor:
        """Return the same network in the runtime that pays for this many images.

        Args:
            num_images: number of images that will be predicted.
            display: shows an export, which takes seconds.
        """
        size = self.card.preprocessing.input_size
        num_pixels = num_images * self.num_views * math.prod(size[1:])
        runtime = choose_runtime("auto", self.network, self.device, "float32", num_pixels)
        return self._with(
            forward=open_forward(runtime, self.network, self.network, self._placement, size, display)
        )

    def _with(
        self, card: Card | None = None, views: Views | None = None, forward: Forward | None = None
    ) -> Predictor:
        return Predictor(
            self.network,
            card or self.card,
            self.device,
            self.batch_size,
            self._workers,
            views or self._views,
            forward or self._forward,
        )

    @overload
    def predict(self, images: ImageInput) -> Prediction: ...  # type: ignore[overload-overlap] # texts are one file

    @overload
    def predict(self, images: Iterable[ImageInput]) -> list[Prediction]: ...

    def predict(self, images: ImageInput | Iterable[ImageInput]) -> Prediction | list[Prediction]:
        """Predict one image, or several in their order.

        Args:
            images: files, Pillow images, or arrays of RGB pixels (H, W, 3) uint8; one, or any iterable.
                For a network that takes arrays: files, or arrays (C, H, W) or (H, W, C) of numbers.

        Raises:
            DataError: an image cannot be read.
            UsageError: a value is not an image.
        """
        if isinstance(images, str | PathLike | Image.Image | np.ndarray):
            return self._predict([images])[0]
        if isinstance(images, bytes | bytearray | memoryview) or not isinstance(images, Iterable):
            raise _no_image(images)
        return self._predict(images)

    def _predict(self, images: Iterable[ImageInput]) -> list[Prediction]:
        found: list[Prediction] = []
        for result in self.predict_batches(split_batches(images, self.batch_size), self._open_any):
            for index, reason in result.faults.items():
                fix = "Leave it out or repair it; `finetune predict` lists such images and continues."
                raise DataError(_name(result.inputs[index]), f"it cannot be read: {reason}", fix)
            found += [self._describe(values) for values in result.probabilities]
        return found

    def _open_any(self, image: ImageInput) -> Opened:
        if isinstance(image, Image.Image):
            return self.open(image)
        if isinstance(image, np.ndarray):
            preprocessing = self.card.preprocessing
            if preprocessing.kind == "array":
                return arrange(image, preprocessing.input_size)
            if preprocessing.kind == "bands":
                return self.open(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise _no_image(image)
            return Image.fromarray(np.ascontiguousarray(image))
        if isinstance(image, str | PathLike):
            return self.open(Path(image))
        raise _no_image(image)

    def _describe(self, values: Floats) -> Prediction:
        label, confidence = self.target.answer(values, self.classes)
        return Prediction(label, confidence, values, self.classes)

    def predict_batches(
        self, batches: Iterable[Sequence[T]], open: Callable[[T], Opened]
    ) -> Iterator[BatchResult[T]]:
        """Yield the predictions of each batch, in order, while the next batches are decoded.

        Args:
            batches: the images; a few batches are taken ahead.
            open: returns the RGB image or the array; called in several threads. A BadImageError becomes a
                fault.
        """
        waiting: deque[tuple[Sequence[T], list[Future[Tensor | str]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(self._view, open, item) for item in batch]))
                if len(waiting) > _AHEAD:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an image may take a minute

    def _view(self, open: Callable[[T], Opened], item: T) -> Tensor | str:
        """Return the views of an image, or the reason why it cannot be read."""
        try:
            return self._views(open(item))
        except BadImageError as error:
            return error.reason

    def _collect(self, batch: Sequence[T], futures: list[Future[Tensor | str]]) -> BatchResult[T]:
        decoded = [future.result() for future in futures]
        faults = {index: view for index, view in enumerate(decoded) if isinstance(view, str)}
        views = [view for view in decoded if isinstance(view, Tensor)]
        return BatchResult(batch, self.compute(views), faults)

    def compute(self, views: Sequence[Tensor]) -> Floats:
        """Return probabilities (B, K) float32 for the views (V, C, H, W) of B images.

        Raises:
            UsageError: probabilities are not finite, since the weights are damaged.
        """
        if not views:
            return np.empty((0, len(self.classes)), np.float32)
        with self._lock, torch.inference_mode():
            images = self._normalize(torch.cat(list(views)).to(self.device))
            images = images.to(memory_format=self._placement.memory_format)
            logits = self._chunked(images)
            mean = compute_mean_over_views(logits, self._views.num_views, self.card.temperature, self.target)
        if not mean.isfinite().all():
            fix = "Its weights are damaged: use another model."
            raise UsageError(f"the model {self.card.name}", "its probabilities are not finite", fix)
        probabilities: Floats = mean.cpu().numpy()
        return probabilities


def load(
    model: str | PathLike[str],
    *,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    crops: int = 1,
    offline: bool = False,
) -> Predictor:
    """Load a trained network from a run, a model folder or a name with published weights.

    Args:
        model: folder of a finished run, its ``model`` folder, any folder in timm's format, or a name with
            published weights (``timm/...``, ``torchvision/...``, ``hf-hub:...``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: images per batch; by default 32, on a GPU 128.
        workers: number of decoding threads; by default the number of cores.
        crops: 1, 5 or 10 views of each image (:mod:`finetune.evaluation.views`).
        offline: never download weights.

    Raises:
        UsageError: there is no such model, or it has no classifier.
        EnvironmentFaultError: this machine lacks the device or the weights.
    """
    target = resolve_device(device)
    network, card = _load_network(str(model), offline)
    size = batch_size or (CPU_BATCH if target.type == "cpu" else GPU_BATCH)
    views = build_views(card.preprocessing, crops)
    return Predictor(network, card, target, size, workers or available_cores(), views)


def _load_network(model: str, offline: bool) -> tuple[nn.Module, Card]:
    try:
        card = find_card(model, offline)
        backbone = load_source(card, offline=offline)
    except UsageError as error:  # the original message speaks of --backbone
        raise UsageError(f"the model {model}", error.found, error.fix) from None
    match = backbone.match
    if not match.head or match.head_replaced or match.missing:
        found = (
            "its weights hold no classifier that fits"
            if not match.missing
            else f"weights are missing: {match}"
        )
        raise UsageError(
            f"the model {model}", found, "Name a finished run, or a network with its own classifier."
        )
    return backbone.network, card


def split_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items; the last one may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def resolve_names(card: Card) -> tuple[str, ...]:
    """Return the class names of a card; duplicates (ImageNet has two cranes) get their index appended."""
    if len(card.label_names) != card.num_classes:
        return tuple(map(str, range(card.num_classes)))
    return make_unique(card.label_names)


def _no_image(value: Any) -> FinetuneError:
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        kind = f"an array of shape {value.shape} and type {value.dtype}"
    fix = "Give paths, Pillow images, or RGB pixels (H, W, 3) as uint8 from 0 to 255."
    return UsageError("predict", f"{kind} is not an image", fix)


def _name(image: ImageInput) -> str:
    return str(image) if isinstance(image, str | PathLike) else f"the {type(image).__name__}"
