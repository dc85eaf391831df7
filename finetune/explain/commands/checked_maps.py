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
from finetune.explain.attribution.heat_map import HeatMap, MakeCompute
from finetune.explain.checks.deletion import Advantages, measure_advantage
from finetune.explain.checks.randomisation import measure_randomisation
from finetune.explain.checks.verdicts import Check, judge_deletion, judge_randomisation, withhold
from finetune.explain.commands.images import ImageBatch, ImageReader
from finetune.features.network import Network
from finetune.targets import Target, decide, read_target
from pretrained.graph.structures import tensors_in

BATCH = 16
"""Images that go through the network at a time, with their gradients."""
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
        wanted: index of the class that is explained; None for the most probable class of each image.
        make: makes the function that computes maps.
        facts: what else ``explain.json`` tells, such as the layer.
    """

    method: str
    network: Network
    classes: tuple[str, ...]
    wanted: int | None
    make: MakeCompute
    facts: dict[str, Any]

    @property
    def target(self) -> Target:
        """What the labels of the network are."""
        return read_target(dict(self.network.backbone.card.target))

    def describe(self, row: MapRow) -> str:
        """Return what the network says of an image."""
        return f"probability {row.answer:.3f}" if self.target.has_classes else f"predicted {row.answer:.4g}"


@dataclass(frozen=True)
class MapRow:
    """The map of one image.

    Attributes:
        path: the image.
        index: index of the class that is explained; 0 for a number.
        answer: probability of the class, in [0, 1], or the number.
        logit: the network's output for it.
        heat: the map, or why there is none.
        advantages: how much lower the score is when marked places are deleted before random ones, in nats;
            None if that was not measured.
    """

    path: str
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
        """Yield each batch with the rows of its images, in order."""
        compute = self.job.make(self.job.network.backbone.network)
        for batch in reader.read(images, BATCH):
            logits, indices = self._classify(batch.pixels)
            maps = compute(batch.pixels, indices)
            if not self._similar:
                self._randomise(batch.pixels, indices, maps)
            answers = self.job.target.activate(logits / self.job.network.backbone.card.temperature)
            advantages = self._delete(batch.pixels, indices, maps)
            rows = [
                MapRow(
                    image.path,
                    indices[number],
                    float(answers[number, indices[number]]),
                    float(logits[number, indices[number]]),
                    maps[number],
                    advantages[number],
                )
                for number, image in enumerate(batch.images)
            ]
            self.rows += rows
            yield batch, rows

    def judge(self) -> tuple[list[MapRow], tuple[Check, Check]]:
        """Return all rows without the maps that must not be shown, and what the checks found."""
        checks = (
            judge_randomisation(self._similar, self._num_randomised),
            judge_deletion([row.advantages for row in self.rows]),
        )
        return [replace(row, heat=withhold(row.heat, row.advantages, checks)) for row in self.rows], checks

    def _classify(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Return the logits (B, K) on the CPU, and the class that is explained of each image."""
        with torch.inference_mode():
            logits = tensors_in(self.job.network.backbone.network(pixels))[0].float().cpu()
        wanted = self.job.wanted
        return logits, decide(logits).tolist() if wanted is None else [wanted] * len(logits)

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
