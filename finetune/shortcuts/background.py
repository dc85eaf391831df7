"""What the predictions of a run depend on: the middle of each image, or what surrounds it.

Of a labelled image the place of the object is unknown. Its middle stands for it: a rectangle of half the
area, so that as much is hidden either way. The check of the heat maps deletes what a map marks
(:mod:`finetune.explain.checks.deletion`); here a region is deleted that no map has chosen, and the maps say
how much of the evidence lies outside of the middle.

Shape legend: B batch, M images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.data.inputs import InputImage
from finetune.evaluation.intervals import compute_wilson
from finetune.explain.attribution.cam import GradCam
from finetune.explain.attribution.heat_map import ComputeMaps, HeatMap
from finetune.explain.checks.verdicts import Check
from finetune.explain.commands.checked_maps import CheckedMaps, MapJob, MapRow
from finetune.explain.commands.heat_maps import shrink
from finetune.explain.commands.images import ImageReader
from finetune.explain.commands.labelled import LabelledImages, find_labelled_images
from finetune.explain.commands.model import open_model, require_classes
from finetune.features.extraction import Source
from finetune.features.network import Network
from finetune.features.regions import build_mask, hide_outside
from finetune.plots.overlay import draw_overlay
from finetune.plots.sheet import Tile
from finetune.shortcuts.find import Shortcut
from finetune.shortcuts.permutation import Floats
from finetune.system.display import Display
from finetune.targets import compute_log_odds, decide
from pretrained.graph.structures import tensors_in

MOST = 32
"""Images whose answers are tried, and whose maps are checked by deletion, which takes 28 passes each."""
FEWEST = 8
SHOWN = 12


@dataclass(frozen=True)
class Background:
    """What hiding parts of images changes in the answers of a run.

    Attributes:
        shortcut: the test, as the others; None if it was not made.
        reason: why not.
        split: split of the images.
        without_surroundings: fall of the log odds of the answer, in nats, (M,).
        without_middle: the same without the middle.
        evidence_outside: share of the evidence of the heat maps that lies outside of the middle, mean over
            the maps that passed their checks; half for evidence that is spread evenly. None without a map.
        checks: what the checks of the maps found.
        tiles: images that depend most on their surroundings, with their maps.
    """

    shortcut: Shortcut | None
    reason: str = ""
    split: str = ""
    without_surroundings: Floats = field(default_factory=lambda: np.empty(0))
    without_middle: Floats = field(default_factory=lambda: np.empty(0))
    evidence_outside: float | None = None
    checks: tuple[Check, ...] = ()
    tiles: tuple[Tile, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        if self.shortcut is None:
            return {"tested": False, "reason": self.reason}
        return {
            "tested": True,
            "split": self.split,
            "num_images": len(self.without_middle),
            "answers_changed_without_surroundings": self.shortcut.accuracy,
            "answers_changed_without_middle": self.shortcut.chance,
            "log_odds_lost_without_surroundings": float(self.without_surroundings.mean()),
            "log_odds_lost_without_middle": float(self.without_middle.mean()),
            "evidence_outside_of_middle": self.evidence_outside,
            "checks_of_the_maps": {check.name: check.to_dict() for check in self.checks},
        }


def audit_background(run: Path, source: Source, output: Path, display: Display) -> Background:
    """Find out whether a run's answers depend more on the surroundings than on the middle of its images.

    Args:
        run: a finished run.
        source: its data, and settings of the machine.
        output: the folder of the results.
        display: shows progress.
    """
    asked = source.recipe.backbone.model_copy(update={"name": str(run), "weights": None})
    recipe = source.recipe.model_copy(update={"backbone": asked})
    network = open_model(recipe, display)
    if not network.backbone.card.preprocessing.is_rgb:
        return Background(None, "its network takes no photographs")
    classes = require_classes(network)
    found = find_labelled_images(recipe, network, output, display)
    images = _choose(found)
    if len(images) < FEWEST:
        return Background(None, f"{FEWEST} images to test are needed, and it has {len(images)}")
    return _measure(network, classes, images, found.split, display)


def _choose(found: LabelledImages) -> list[InputImage]:
    """Return at most :data:`MOST` images, of all classes in turns."""
    turns: dict[int, int] = {}
    ranked = []
    for image, label in zip(found.images, found.labels.tolist(), strict=True):
        turns[label] = turns.get(label, 0) + 1
        ranked.append((turns[label], label, image))
    return [image for _, _, image in sorted(ranked, key=lambda one: one[:2])[:MOST]]


def _measure(
    network: Network, classes: tuple[str, ...], images: Sequence[InputImage], split: str, display: Display
) -> Background:
    model, size = network.backbone.network, network.backbone.card.preprocessing.input_size
    cam = GradCam(model, size)

    def make(other: nn.Module) -> ComputeMaps:
        if cam.reason:
            return lambda pixels, _: [HeatMap(None, cam.reason)] * len(pixels)
        maps_of = GradCam(other, size, cam.position)
        return lambda pixels, indices: maps_of(pixels, indices)[0]

    maps = CheckedMaps(MapJob("grad-cam", network, classes, None, make, {}))
    reader, seen, lost, changed = ImageReader(network), [], [], []
    with display.track("hiding parts of test images", len(images)) as advance:
        for batch, rows in maps.compute(images, reader):
            own_lost, own_changed = _hide_parts(network, batch.pixels, [row.index for row in rows])
            lost.append(own_lost)
            changed.append(own_changed)
            seen += [shrink(batch.picture(place)) for place in range(len(rows))]
            advance(len(rows), "")
    if sum(map(len, lost)) < FEWEST:
        return Background(None, "its test images cannot be read")
    shown, checks = maps.judge()
    falls, flips = np.concatenate(lost), np.concatenate(changed)
    outside = [_measure_outside(row.heat, size[1:]) for row in shown if row.heat.values is not None]
    return Background(
        _test(falls, flips),
        "",
        split,
        falls[:, 0],
        falls[:, 1],
        float(np.mean(outside)) if outside else None,
        checks,
        tuple(_draw(classes, shown, seen, falls)),
    )


def _hide_parts(network: Network, pixels: Tensor, indices: Sequence[int]) -> tuple[Floats, Any]:
    """Return the fall of the log odds (B, 2) without surroundings and without middle, and changed answers."""
    size, device = network.backbone.card.preprocessing.input_size, pixels.device
    wanted, odds, answers = torch.tensor(indices)[:, None], [], []
    for region in ("whole", "middle", "surroundings"):
        with torch.inference_mode():
            hidden = hide_outside(region, size, device)(pixels)
            logits = tensors_in(network.backbone.network(hidden))[0].float().cpu()
        odds.append(torch.from_numpy(compute_log_odds(logits)).gather(1, wanted)[:, 0])
        answers.append(decide(logits))
    falls = torch.stack([odds[0] - odds[1], odds[0] - odds[2]], dim=1)
    changed = torch.stack([answers[0] != answers[1], answers[0] != answers[2]], dim=1)
    return falls.numpy(), changed.numpy()


def _test(falls: Floats, flips: Any) -> Shortcut:
    """Test whether the log odds fall more without the surroundings: Wilcoxon's signed ranks, one-sided."""
    differences = falls[:, 0] - falls[:, 1]
    p = float(wilcoxon(differences, alternative="greater").pvalue) if differences.any() else 1.0
    changed = flips.mean(axis=0).tolist()
    interval = compute_wilson(int(flips[:, 0].sum()), len(flips))
    return Shortcut("background", p, 1.0, changed[0], interval, changed[1], None, 0, flips[:, 0])


def _measure_outside(heat: HeatMap, size: Sequence[int]) -> float:
    """Return the share of a map's evidence that lies outside of the middle."""
    assert heat.values is not None
    fine = F.interpolate(heat.values[None, None], tuple(size), mode="bilinear")[0, 0]
    mask = build_mask("surroundings", (size[0], size[1]))
    return float(fine[mask].sum() / fine.sum())


def _draw(classes: Sequence[str], rows: Sequence[MapRow], seen: Sequence[Any], falls: Floats) -> list[Tile]:
    order = np.argsort(falls[:, 1] - falls[:, 0], kind="stable")[:SHOWN]
    tiles = []
    for place in order.tolist():
        row = rows[place]
        image = seen[place] if row.heat.values is None else draw_overlay(seen[place], row.heat.values.numpy())
        said = f"background {falls[place, 0]:+.1f}, middle {falls[place, 1]:+.1f}"
        tiles.append(Tile(image, (f"answer {classes[row.index]}", said, Path(row.path).name)))
    return tiles
