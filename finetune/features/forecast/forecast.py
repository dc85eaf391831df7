"""``finetune forecast``: what twice and four times the images would bring, and how many a target needs.

::

    images, features of the frozen network -> learning curve -> curves that fit it -> forecast, requirement
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.dataset import Dataset
from finetune.data.prepare import check_outside, require_classes
from finetune.errors import DataError, UsageError, count
from finetune.features.extraction import Features, Source, open_features, open_images, open_source
from finetune.features.forecast.extrapolation import LEVEL, CurveSample, find_interval, fit_curves
from finetune.features.forecast.learning_curve import (
    FEWEST_A_CLASS,
    LearningCurve,
    count_fits,
    measure_curve,
)
from finetune.features.forecast.requirement import MOST_WIDTH, Requirement, check_target, find_requirement
from finetune.features.look_alikes import find_groups_of_small_classes
from finetune.features.network import Network, open_network, take_channels
from finetune.features.probe import leave_copies_out
from finetune.features.rows import ConcatRows, Rows, SubsetRows
from finetune.plots.learning_curve import (
    CurvePoint,
    LearningCurvePlot,
    draw_learning_curve,
    write_learning_curve,
)
from finetune.recipe import Recipe, flatten, load_recipe
from finetune.runs.files import write_csv, write_json, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader
from finetune.system.display import Display
from pretrained.graph.layers import Layer

TIMES = (1, 2, 4)
"""Multiples of the images at hand that are forecast."""
COLUMNS = ("kind", "images", "accuracy", "low", "high")
_FEWEST_GROUPS = 3
"""Groups of a class: one is tested, and the smallest subsets still differ."""
_NUM_DRAWN = 60
"""Points of the drawn curve."""


@dataclass(frozen=True)
class Forecast:
    """The content of ``forecast.json``.

    Attributes:
        data: the images, or the run whose images they are.
        backbone: name of the network.
        layers: names of the layers whose features are classified.
        num_images: labelled images at hand, without exact copies.
        num_groups: how many of them are independent: look-alikes and named groups count once.
        num_classes: number of classes.
        measured: points of the learning curve.
        fitted: points of the fitted curve, close together.
        forecast: one, two and four times the images.
        limit: accuracy with any number of images; its interval depends most on the form of the curve.
        requirement: what the target needs; None without a target.
    """

    data: str
    backbone: str
    layers: tuple[str, ...]
    num_images: int
    num_groups: int
    num_classes: int
    measured: tuple[CurvePoint, ...]
    fitted: tuple[CurvePoint, ...]
    forecast: tuple[CurvePoint, ...]
    limit: CurvePoint
    requirement: Requirement | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "data": self.data,
            "backbone": self.backbone,
            "layers": list(self.layers),
            "num_images": self.num_images,
            "num_groups": self.num_groups,
            "num_classes": self.num_classes,
            "level": LEVEL,
            "measured": [vars(point) for point in self.measured],
            "fitted": [vars(point) for point in self.fitted],
            "forecast": [
                {"times": times, **vars(point), "can_say": can_say(point)}
                for times, point in zip(TIMES, self.forecast, strict=True)
            ],
            "limit": {name: value for name, value in vars(self.limit).items() if name != "images"},
            "requirement": None if self.requirement is None else self.requirement.to_dict(),
        }


def can_say(point: CurvePoint) -> bool:
    """Return whether the interval of a forecast is narrow enough to say something."""
    return point.high - point.low <= MOST_WIDTH


def take_run(run: Path, given: Recipe) -> Recipe:
    """Return the recipe of a run, whose images, network and input are taken, with the given settings.

    Args:
        run: folder of a run.
        given: settings of the command; those that are not the defaults replace the run's.

    Raises:
        UsageError: there is no run in the folder, or images or network are given as well.
    """
    folder = RunFolder(run)
    own = RunReader(folder).recipe if folder.split.is_file() and folder.recipe.is_file() else None
    if own is None:
        found = "it is not a run folder, or the run has not started training"
        raise UsageError(str(run), found, "Name the --output of a `finetune run`, or images with --data.")
    defaults = dict(flatten(Recipe().to_dict()))
    changed = {key: value for key, value in flatten(given.to_dict()) if value != defaults[key]}
    for key, flag in {"data.path": "--data", "backbone.name": "--backbone"}.items():
        if key in changed:
            found = f"images and network are those of the run, and {flag} {changed[key]} is given as well"
            raise UsageError(str(run), found, f"Leave out {flag}, or the run.")
    return load_recipe(own, changed | {"data.path": str(run)})


def forecast(recipe: Recipe, target: float | None, output: Path, display: Display) -> Forecast:
    """Measure the learning curve of a linear classifier on frozen features, and extrapolate it.

    All labelled images are used, of any split. No network is trained.

    Args:
        recipe: settings of backbone, data, input, cache, machine and seed; ``strategy.features`` names the
            features, ``last`` by default.
        target: accuracy whose number of images is wanted, in (0, 1); None for none.
        output: a new folder for ``forecast.json``, ``forecast.csv``, ``forecast.svg`` and ``forecast.png``.
        display: shows progress.

    Raises:
        DataError: a class has fewer than eight images, or fewer than three groups of look-alikes.
        FinetuneError: the command fails otherwise; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        if target is not None:
            check_target(target)
        dataset = open_images(recipe, display)
        require_classes(dataset, recipe)
        check_counts(dataset.classes, torch.tensor([one.label for one in dataset.samples]), recipe)
        recipe = take_channels(recipe, dataset)
        network = open_network(recipe, display)
        layers = _choose_layers(network, recipe, display)
        check_outside(output, dataset)
        source = open_source(recipe, network, dataset, display)
        with new_folder(output) as folder:
            with open_features(source, layers, "auto") as features:
                curve, groups = _measure(source, features, dataset)
            curves = fit_curves(curve, recipe.seed)
            result = _conclude(source, layers, curve, curves, groups, target)
            write_results(folder, result)
        display.say(f"{output}/forecast.json, forecast.csv, forecast.svg, forecast.png", style="bold")
        return result


def _choose_layers(network: Network, recipe: Recipe, display: Display) -> tuple[Layer, ...]:
    choice = recipe.strategy.features or "last"
    if choice == "all":
        return network.layers.all
    if choice == "best":
        display.say("the best stage is not searched for: the forecast is of the last features")
    return network.layers.all[-1:] if choice in ("best", "last") else network.layers.select([choice])


def check_counts(classes: Sequence[str], labels: Tensor, recipe: Recipe) -> None:
    """Refuse images of which a class has too few for a learning curve.

    Args:
        classes: names of the K classes.
        labels: (N,) int64.
        recipe: names the data.

    Raises:
        DataError: there is only one class, or one has fewer than :data:`FEWEST_A_CLASS` images.
    """
    asked = f"--data {recipe.data.path}"
    if len(classes) < 2:
        raise DataError(asked, "there is only one class", "Give images of two classes or more.")
    counts = labels.bincount(minlength=len(classes))
    few = [f"{classes[label]!r} has {int(counts[label])}" for label in counts.argsort().tolist()]
    number = int((counts < FEWEST_A_CLASS).sum())
    if number:
        shown = ", ".join(few[: min(number, 3)])
        others = f", and {number - 3} more have too few" if number > 3 else ""
        found = f"a forecast needs at least {FEWEST_A_CLASS} images of every class, and class {shown}{others}"
        raise DataError(asked, found, "Add images of such classes, or leave these classes out.")


def _measure(source: Source, features: Features, dataset: Dataset) -> tuple[LearningCurve, Tensor]:
    """Return the learning curve of the images that have features, and their groups (N,)."""
    samples, recipe = source.dataset.samples, source.recipe
    usable = leave_copies_out(features.usable(samples), source)
    chosen = [samples[index] for index in usable.tolist()]
    labels = torch.tensor([sample.label for sample in chosen])
    check_counts(dataset.classes, labels, recipe)
    whole: Rows = features.rows[0] if len(features.rows) == 1 else ConcatRows(features.rows)
    with source.display.busy("looking for look-alikes"):
        known = [sample.group for sample in chosen]
        groups = find_groups_of_small_classes(features.rows[-1], usable, labels, known)
    _check_groups(dataset.classes, labels, groups, recipe)
    with source.display.track("learning curve", count_fits()) as advance:
        curve = measure_curve(
            SubsetRows(whole, usable),
            labels,
            groups,
            dataset.num_classes,
            recipe.seed,
            source.network.placement.device,
            lambda: advance(1, ""),
        )
    return curve, groups


def _check_groups(classes: Sequence[str], labels: Tensor, groups: Tensor, recipe: Recipe) -> None:
    for label, name in enumerate(classes):
        number = len(torch.unique(groups[labels == label]))
        if number < _FEWEST_GROUPS:
            found = f"the images of class {name!r} are only {count(number, 'group')} of look-alikes"
            fix = f"Add images of other objects: a forecast needs {_FEWEST_GROUPS} groups of every class."
            raise DataError(f"--data {recipe.data.path}", found, fix)


# --- results -------------------------------------------------------------------------------------


def _conclude(
    source: Source,
    layers: Sequence[Layer],
    curve: LearningCurve,
    curves: CurveSample,
    groups: Tensor,
    target: float | None,
) -> Forecast:
    middle, low, high = find_interval(curves.limits())
    measured = describe_measured(curve)
    sizes = np.geomspace(measured[0].images, TIMES[-1] * curve.num_images, _NUM_DRAWN)
    return Forecast(
        data=str(Path(str(source.recipe.data.path)).absolute()),
        backbone=source.network.backbone.card.name,
        layers=tuple(layer.name for layer in layers),
        num_images=curve.num_images,
        num_groups=len(torch.unique(groups)),
        num_classes=source.dataset.num_classes,
        measured=measured,
        fitted=tuple(predict(curves, round(size)) for size in sizes),
        forecast=tuple(predict(curves, times * curve.num_images) for times in TIMES),
        limit=CurvePoint(0, middle, low, high),
        requirement=None if target is None else find_requirement(curves, target),
    )


def describe_measured(curve: LearningCurve) -> tuple[CurvePoint, ...]:
    """Return the measured points, each with its interval under normal noise."""
    from scipy.stats import norm

    reach = float(norm.ppf((1 + LEVEL) / 2)) * np.sqrt(np.diag(curve.covariance))
    return tuple(
        CurvePoint(round(size), value, max(0.0, value - far), min(1.0, value + far))
        for size, value, far in zip(
            curve.sizes.tolist(), curve.accuracies.tolist(), reach.tolist(), strict=True
        )
    )


def predict(curves: CurveSample, images: int) -> CurvePoint:
    """Return the accuracy that the curves give for a number of training images."""
    return CurvePoint(images, *find_interval(curves.accuracies(images)))


def write_results(folder: Path, result: Forecast) -> None:
    """Write ``forecast.json``, ``forecast.csv``, ``forecast.svg`` and ``forecast.png``.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    write_json(folder / "forecast.json", result.to_dict())
    kinds = (("measured", result.measured), ("forecast", result.forecast))
    rows = [
        (kind, point.images, point.accuracy, point.low, point.high)
        for kind, points in kinds
        for point in points
    ]
    write_csv(folder / "forecast.csv", rows, COLUMNS)
    drawn = LearningCurvePlot(
        measured=result.measured,
        fitted=result.fitted,
        forecast=result.forecast,
        target=None if result.requirement is None else result.requirement.target,
        title=f"{result.backbone}, a linear classifier on {', '.join(result.layers)}",
    )
    write_text(folder / "forecast.svg", draw_learning_curve(drawn).file)
    write_learning_curve(folder / "forecast.png", drawn)
