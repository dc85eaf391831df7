"""Heat maps of many images in batches, each checked on the network at hand before it may be shown.

Shape legend: B batch, H W pixels, h w positions of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from finetune.data.inputs import InputImage
from finetune.explain.attribution.heat_map import ComputeMaps, HeatMap, MakeCompute
from finetune.explain.checks.deletion import Advantages, measure_advantage
from finetune.explain.checks.randomisation import measure_randomisation
from finetune.explain.checks.verdicts import Check, judge_deletion, judge_randomisation, withhold
from finetune.explain.commands.images import ImageBatch, ImageReader
from finetune.explain.commands.model import find_target
from finetune.features.network import Network
from finetune.targets import Target, decide
from pretrained.graph.structures import tensors_in

BATCH = 16
"""Images that go through the network at a time, with their gradients."""
MOST_CLASSES = 3
"""Most classes of an image that has several of which each gets a map."""
MOST_DELETED = 64
"""Images whose maps are checked by deletion, which takes 28 passes of the network each."""
MOST_RANDOMISED = 8
"""Images whose maps are computed again with random weights, three times."""


@dataclass(frozen=True)
class MapJob:
    """What is explained.

    Attributes:
        method: name of the method, such as ``grad-cam``.
        network: the network with its classes.
        classes: names of its classes in index order.
        wanted: index of the class that is explained; None for the classes that the network names for each
            image, or the most probable one if it names none.
        make: makes the function that computes maps.
        facts: what else ``explain.json`` tells, such as the layer.
        most: most classes that are explained of an image; 1 for the most probable one.
    """

    method: str
    network: Network
    classes: tuple[str, ...]
    wanted: int | None
    make: MakeCompute
    facts: dict[str, Any]
    most: int = 1

    @property
    def target(self) -> Target:
        """What the labels of the network are."""
        return find_target(self.network)

    def describe(self, row: MapRow) -> str:
        """Return what the network says of an image."""
        return f"probability {row.answer:.3f}" if self.target.has_classes else f"predicted {row.answer:.4g}"


@dataclass(frozen=True)
class MapRow:
    """The map of one image and one class.

    Attributes:
        path: the image.
        place: number of the image in its batch.
        index: index of the class that is explained; 0 for a number.
        answer: probability of the class, in [0, 1], or the number.
        logit: the network's output for it.
        heat: the map, or why there is none.
        advantages: how much lower the score is when marked places are deleted before random ones, in nats;
            None if that was not measured.
    """

    path: str
    place: int
    index: int
    answer: float
    logit: float
    heat: HeatMap
    advantages: Advantages | None


@dataclass
class CheckedMaps:
    """Computes the maps of a job, batch by batch, and remembers what the checks measure.

    Attributes:
        job: what is explained.
        rows: the rows so far.
    """

    job: MapJob
    rows: list[MapRow] = field(default_factory=list)
    _similar: dict[str, float] = field(default_factory=dict)
    _num_randomised: int = 0

    def compute(
        self, images: Sequence[InputImage], reader: ImageReader
    ) -> Iterator[tuple[ImageBatch, list[MapRow]]]:
        """Yield each batch with the rows of its images, in order: a row for each class of an image."""
        compute = self.job.make(self.job.network.backbone.network)
        for batch in reader.read(images, BATCH):
            logits = self._forward(batch.pixels)
            answers = self.job.target.activate(logits / self.job.network.backbone.card.temperature)
            chosen = [
                (place, index)
                for place in range(len(logits))
                for index in self._choose(logits[place], answers[place])
            ]
            before = len(self.rows)
            for start in range(0, len(chosen), BATCH):
                part = chosen[start : start + BATCH]
                self.rows += self._explain(batch, part, compute, logits, answers)
            yield batch, self.rows[before:]

    def _explain(
        self,
        batch: ImageBatch,
        chosen: Sequence[tuple[int, int]],
        compute: ComputeMaps,
        logits: Tensor,
        answers: Tensor,
    ) -> list[MapRow]:
        """Return the rows of some classes, each of an image of the batch."""
        places, indices = [place for place, _ in chosen], [index for _, index in chosen]
        pixels = batch.pixels if places == [*range(len(batch.pixels))] else batch.pixels[places]
        maps = compute(pixels, indices)
        if not self._similar:
            self._randomise(pixels, indices, maps)
        advantages = self._delete(pixels, indices, maps)
        return [
            MapRow(
                batch.images[place].path,
                place,
                index,
                float(answers[place, index]),
                float(logits[place, index]),
                maps[number],
                advantages[number],
            )
            for number, (place, index) in enumerate(chosen)
        ]

    def judge(self) -> tuple[list[MapRow], tuple[Check, Check]]:
        """Return all rows without the maps that must not be shown, and what the checks found."""
        checks = (
            judge_randomisation(self._similar, self._num_randomised),
            judge_deletion([row.advantages for row in self.rows]),
        )
        return [replace(row, heat=withhold(row.heat, row.advantages, checks)) for row in self.rows], checks

    def _forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (B, K) on the CPU."""
        with torch.inference_mode():
            return tensors_in(self.job.network.backbone.network(pixels))[0].float().cpu()

    def _choose(self, logits: Tensor, answers: Tensor) -> list[int]:
        """Return the classes that are explained of an image, the most probable first.

        Args:
            logits: the network's outputs for the image, (K,).
            answers: what they mean, (K,).
        """
        if self.job.wanted is not None:
            return [self.job.wanted]
        best = int(decide(logits[None]))
        if self.job.most == 1:
            return [best]
        label, _ = self.job.target.answer(answers.numpy(), self.job.classes)
        named = [self.job.classes.index(name) for name in self.job.target.classes_of(label)]
        return sorted(named, key=lambda index: -float(answers[index]))[: self.job.most] or [best]

    def _randomise(self, pixels: Tensor, indices: Sequence[int], maps: Sequence[HeatMap]) -> None:
        known = [number for number, heat in enumerate(maps) if heat.values is not None][:MOST_RANDOMISED]
        self._num_randomised = len(known)
        self._similar = measure_randomisation(
            self.job.network.backbone.network,
            self.job.network.backbone.stages,
            self.job.make,
            pixels[known],
            [indices[number] for number in known],
            [maps[number] for number in known],
        )

    def _delete(
        self, pixels: Tensor, indices: Sequence[int], maps: Sequence[HeatMap]
    ) -> list[Advantages | None]:
        number = max(0, min(len(maps), MOST_DELETED - len(self.rows)))
        network = self.job.network.backbone.network
        target = self.job.target
        measured = measure_advantage(network, pixels[:number], indices[:number], maps[:number], target=target)
        return [*measured, *[None] * (len(maps) - number)]
