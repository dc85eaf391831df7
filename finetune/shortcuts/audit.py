"""``finetune audit``: can the label be predicted from what should not tell it?

::

    training images, at most 2,000 -> features of whole images -> groups of look-alikes -> whole accuracy
                                   -> features of the border, and without the middle -> ridge regression
                                   -> facts of the files                             -> decision trees
    each against permuted labels -> Holm -> audit.json, audit.png
    a run also: the answer without the surroundings, and without the middle (finetune/shortcuts/background.py)

Shape legend: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.dataset import PreparedDataset
from finetune.data.prepare import check_outside, draw_evenly, read_images, require_classes
from finetune.errors import DataError, UsageError, count
from finetune.evaluation.intervals import compute_wilson
from finetune.evaluation.label_issues import leave_changed_out
from finetune.features.extraction import Source, open_features, open_images, open_source
from finetune.features.look_alikes import find_groups
from finetune.features.network import open_network, take_channels
from finetune.features.regions import Region
from finetune.features.ridge import LeftOutRidge, leave_groups_out
from finetune.features.rows import ConcatRows, MemoryRows
from finetune.features.transferability import MOST_IMAGES
from finetune.recipe import Recipe
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader
from finetune.shortcuts.background import Background, audit_background
from finetune.shortcuts.file_facts import FileFacts, read_file_facts
from finetune.shortcuts.find import Shortcut, correct, find_shortcuts, sort_alarms
from finetune.shortcuts.meaning import MEANINGS
from finetune.shortcuts.permutation import LEVEL, LabelPermuter
from finetune.shortcuts.predictors import FindHits, predict_by_ridge, predict_by_tree, tells_nothing
from finetune.shortcuts.sheet import write_pictures
from finetune.system.display import Display

RECORD, SHEET = "audit.json", "audit.png"
FEWEST_GROUPS = 16
"""Independent images or groups that are needed for a test."""
FEWEST_IMAGES = 8
"""Images of the smallest class."""
REGIONS: tuple[Region, ...] = ("border", "surroundings")


@dataclass(frozen=True)
class Independence:
    """How many images there are in fact.

    Attributes:
        num_images: training images that were looked at, N.
        num_groups: groups of look-alikes and of ``--group-by``; an image alone is one too.
        largest: images of the largest group.
        accuracy_images: of whole images with ridge regression, each image left out alone.
        accuracy_groups: with each group left out as a whole; what new subjects may expect.
        interval: 95 % interval of the latter, which counts a group as one image.
    """

    num_images: int
    num_groups: int
    largest: int
    accuracy_images: float
    accuracy_groups: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Audit:
    """The content of ``audit.json``.

    Attributes:
        backbone: name of the backbone whose features were used.
        independence: how many independent images there are.
        shortcuts: the tests, alarms first, those first that reach most of the accuracy of whole images.
        untested: why a test was not made, by its name.
        background: what the predictions of a run depend on; None without a run.
        can_alarm: whether the groups allow enough permutations for an alarm.
        data: the images, or the run.
        output: the folder of the files.
    """

    backbone: str
    independence: Independence
    shortcuts: tuple[Shortcut, ...]
    untested: Mapping[str, str]
    background: Background | None
    can_alarm: bool
    data: str
    output: str

    @property
    def alarms(self) -> tuple[Shortcut, ...]:
        """The tests that found a shortcut."""
        return tuple(one for one in self.shortcuts if one.is_alarm)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        facts = dict(vars(self.independence))
        return {
            "data": self.data,
            "output": self.output,
            "backbone": self.backbone,
            "level": LEVEL,
            "alarms": [one.name for one in self.alarms],
            "can_alarm": self.can_alarm,
            "independence": facts | {"interval": list(self.independence.interval)},
            "tests": [one.to_dict() for one in self.shortcuts],
            "untested": dict(self.untested),
            "background": None if self.background is None else self.background.to_dict(),
        }


def read_run(run: Path) -> Recipe:
    """Return the recipe of a run, with its own images as data.

    Raises:
        UsageError: there is no run, or its network began with random weights.
    """
    folder = RunFolder(run)
    recipe = RunReader(folder).recipe if folder.split.is_file() and folder.recipe.is_file() else None
    if recipe is None:
        fix = "Name the --output of a `finetune run`, or the images with --data FOLDER."
        raise UsageError(f"finetune audit {run}", "it is not the folder of a run that has started", fix)
    if recipe.strategy.starts_random:
        found = "it was trained from random weights: there are no features that have not seen the labels"
        raise UsageError(f"finetune audit {run}", found, "Name its images with --data, and a --backbone.")
    data = recipe.data.model_copy(update={"path": str(run)})
    return recipe.model_copy(update={"data": data, "device": "auto"})


def audit(recipe: Recipe, output: Path, display: Display, run: Path | None = None) -> Audit:
    """Test whether border, background, file facts or name order tell the label, and write what was found.

    Args:
        recipe: settings of backbone, data, input, cache, machine and seed.
        output: a new folder for ``audit.json`` and ``audit.png``.
        display: shows progress.
        run: the run whose images the recipe names, if they are of one; its predictions are audited as well.

    Raises:
        DataError: there are no labels, or too few images for a test.
        FinetuneError: every other refusal and failure.
    """
    with translated_errors():
        source = _open(recipe, output, display, run)
        with new_folder(output) as folder:
            with display.busy("reading labels"):
                _check_enough(source.dataset, recipe)
            found = _audit(source, run, output, folder)
            write_json(folder / RECORD, found.to_dict())
        return found


def _open(recipe: Recipe, output: Path, display: Display, run: Path | None) -> Source:
    """Return the training images, at most 2,000, seen whole: the border is cropped for no other reason."""
    dataset = open_images(recipe, display)
    require_classes(dataset, recipe)
    if recipe.input.crop_pct == "auto":
        recipe = recipe.model_copy(update={"input": recipe.input.model_copy(update={"crop_pct": 1.0})})
    recipe = take_channels(recipe, dataset)
    network = open_network(recipe, display)
    check_outside(output, dataset)
    few = draw_evenly(read_images(recipe, dataset, display), MOST_IMAGES, recipe.seed)
    source = open_source(recipe, network, few, display)
    if run is None:
        return source
    return replace(source, dataset=leave_changed_out(source, RunFolder(run), display))


def _check_enough(dataset: PreparedDataset, recipe: Recipe) -> None:
    counts = dict(zip(dataset.classes, dataset.counts("train"), strict=True))
    name = min(counts, key=lambda one: counts[one])
    if len(counts) < 2:
        found = "there is only one class"
        raise DataError(f"--data {recipe.data.path}", found, "Give images of two classes or more.")
    if counts[name] < FEWEST_IMAGES:
        found = f"class {name!r} has {count(counts[name], 'training image')}"
        fix = f"Add images, or leave the class out: an audit needs {FEWEST_IMAGES} of each class."
        raise DataError(f"--data {recipe.data.path}", found, fix)


# --- the tests -----------------------------------------------------------------------------------


def _audit(source: Source, run: Path | None, output: Path, folder: Path) -> Audit:
    display, recipe = source.display, source.recipe
    regions, last, usable = extract_regions(source)
    source = replace(source, dataset=_keep(source.dataset, usable))
    samples = source.dataset.samples
    labels = torch.tensor([sample.label for sample in samples])
    groups, independence = measure_independence(source, regions["whole"], last, labels)
    facts = read_file_facts(source.dataset, display)
    predictors, untested = build_predictors(source, regions, facts, groups)
    predict_whole = predictors.pop("whole")
    with display.track("testing shortcuts", len(predictors)) as advance:
        found = find_shortcuts(
            predictors,
            labels.numpy(),
            groups.numpy(),
            float(predict_whole(labels.numpy()[None]).mean()),
            recipe.seed,
            advance,
        )
    background = None
    if run is not None:
        background = audit_background(run, source, output, display)
        if background.shortcut is None:
            untested |= {"background": background.reason}
        else:
            found = correct([*found, background.shortcut])
    found = sort_alarms(found)
    can_alarm = _can_alarm(labels, groups, len(found))
    if not can_alarm:
        display.warn("the groups are too few for an alarm: their labels have too few permutations")
    write_pictures(folder / SHEET, source, found, facts, background)
    name = source.network.backbone.card.name
    data = str(Path(str(source.recipe.data.path)).absolute())
    return Audit(name, independence, tuple(found), untested, background, can_alarm, data, str(output))


def extract_regions(source: Source) -> tuple[dict[Region, Tensor], Tensor, Tensor]:
    """Return the features of all stages of whole images and of each region, (N, D) each.

    Low stages see stamps, colours and traces of compression better than the last one. Unreadable images are
    left out; also returned are the last features of whole images, by which look-alikes are found, and the
    places of these N images among the samples of the source.
    """
    layers, regions = source.network.layers.all, dict[Region, Tensor]()
    if source.network.backbone.card.taps:  # a classifier on stages takes no other features
        layers = layers[-1:]
    for region in ("whole", *REGIONS):
        shown = replace(source, region=region)
        source.display.say(f"features of {'whole images' if region == 'whole' else MEANINGS[region].title}")
        with open_features(shown, layers, "auto", splits=("train",)) as features:
            usable = features.usable(source.dataset.samples)
            regions[region] = ConcatRows(features.rows)[usable]
            if region == "whole":
                last = features.rows[-1][usable]
    return regions, last, usable


def _keep(dataset: PreparedDataset, usable: Tensor) -> PreparedDataset:
    return replace(dataset, samples=tuple(dataset.samples[place] for place in usable.tolist()))


def measure_independence(
    source: Source, whole: Tensor, last: Tensor, labels: Tensor
) -> tuple[Tensor, Independence]:
    """Return the group of each image, (N,) int64, and what leaving out whole groups changes.

    Args:
        source: the images, N of them.
        whole: their features of all stages, (N, D).
        last: their last features, by which look-alikes are found.
        labels: (N,) int64.

    Raises:
        DataError: there are fewer groups than a test needs.
    """
    rows, every = MemoryRows(whole), torch.arange(len(labels))
    groups = find_groups(MemoryRows(last), every, labels, [sample.group for sample in source.dataset.samples])
    _, sizes = torch.unique(groups, return_counts=True)
    if len(sizes) < FEWEST_GROUPS:
        found = f"{count(len(labels), 'image')} of only {count(len(sizes), 'group')}"
        fix = f"An audit needs {FEWEST_GROUPS} independent images or groups (--group-by, look-alikes)."
        raise DataError(f"--data {source.recipe.data.path}", found, fix)
    num_classes, device = source.dataset.num_classes, source.network.placement.device
    alone, together = (
        leave_groups_out(rows, every, labels, num_classes, device, own).double().mean().item()
        for own in (None, groups)
    )
    interval = compute_wilson(round(together * len(sizes)), len(sizes))
    largest = int(sizes.max())
    return groups, Independence(len(labels), len(sizes), largest, alone, together, interval)


def build_predictors(
    source: Source, regions: Mapping[Region, Tensor], facts: FileFacts, groups: Tensor
) -> tuple[dict[str, FindHits], dict[str, str]]:
    """Return what predicts from ``whole`` images and each shortcut, and why others are not tested."""
    num_classes, device = source.dataset.num_classes, source.network.placement.device
    every, own = torch.arange(len(groups)), groups.numpy()
    predictors: dict[str, FindHits] = {}
    untested: dict[str, str] = {}
    for region in ("whole", *REGIONS):
        ridge = LeftOutRidge(MemoryRows(regions[region]), every, num_classes, device)
        predictors[region] = predict_by_ridge(ridge, own, source.recipe.seed)
    for name, values in facts.values.items():
        if np.isnan(values).all():
            untested[name] = "no file says it"
        elif tells_nothing(values):
            untested[name] = "it is the same for all images"
        else:
            predictors[name] = predict_by_tree(values, own, num_classes, source.recipe.seed)
    return predictors, untested


def _can_alarm(labels: Tensor, groups: Tensor, num_tests: int) -> bool:
    permuter = LabelPermuter(labels.numpy(), groups.numpy())
    return permuter.log_arrangements > math.log(num_tests / LEVEL)
