"""Further results about a run: what its budget tried, and a forecast and an audit in folders beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from finetune.plots.learning_curve import CurvePoint, LearningCurvePlot, draw_learning_curve
from finetune.plots.svg import Plot
from finetune.report.facts import finite
from finetune.report.images import Album, InlineImage
from finetune.report.sections import percent
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.regular_files import open_text

T = TypeVar("T")
_WIDEST = 1000
"""Width of the pictures of an audit on the page, in pixels."""


@dataclass(frozen=True)
class ShownForecast:
    """What ``finetune forecast`` found for the images of a run.

    Attributes:
        folder: name of its folder.
        plot: the learning curve.
        rows: times, images, accuracy and its interval, formatted.
        said: further sentences.
    """

    folder: str
    plot: Plot
    rows: tuple[tuple[str, str, str, str], ...]
    said: tuple[str, ...]


@dataclass(frozen=True)
class ShownAudit:
    """What ``finetune audit`` found in a run.

    Attributes:
        folder: name of its folder.
        said: how many independent images there are.
        rows: test, accuracy with its interval, chance and p value, formatted, alarms first.
        alarms: title, meaning and fix of each alarm.
        picture: images behind the alarms; None without alarms.
    """

    folder: str
    said: str
    rows: tuple[tuple[str, str, str, str], ...]
    alarms: tuple[tuple[str, str, str], ...]
    picture: InlineImage | None


@dataclass(frozen=True)
class ShownBudget:
    """What ``--budget`` tried, and what its choice is worth.

    Attributes:
        budget: as it was given, such as ``10m``.
        rows: candidate, images, cross-validated accuracy and seconds, formatted, those on most images first.
        figures: name, accuracy, interval and number of images of both figures, formatted.
        num_left: candidates that were not tried.
    """

    budget: str
    rows: tuple[tuple[str, str, str, str], ...]
    figures: tuple[tuple[str, str, str, str], ...]
    num_left: int


def find_budget(run: RunFolder) -> ShownBudget | None:
    """Return what the budget of a run tried; None without one, or where its file is damaged."""
    try:
        return _show_budget(RunReader(run, tolerant=True).budget)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def find_forecast(run: RunFolder) -> ShownForecast | None:
    """Return the last forecast of a run's images beside it; None without one that can be read."""
    return _find(run, "forecast.json", _show_forecast)


def find_audit(run: RunFolder, album: Album) -> ShownAudit | None:
    """Return the last audit of a run beside it; None without one that can be read."""
    return _find(run, "audit.json", lambda path, facts: _show_audit(path, facts, album))


def _find(run: RunFolder, name: str, show: Callable[[Path, Mapping[str, Any]], T]) -> T | None:
    own = run.path.resolve()
    try:
        files = [path / name for path in own.parent.iterdir() if (path / name).is_file()]
        files.sort(key=lambda file: -file.stat().st_mtime)
    except OSError:
        return None
    for file in files:
        try:
            with open_text(file) as opened:
                facts = json.load(opened)
            if Path(str(facts["data"])).resolve() == own:
                return show(file.parent, facts)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # damaged, or of other data
    return None


# --- budget --------------------------------------------------------------------------------------


def _show_budget(facts: Mapping[str, Any]) -> ShownBudget:
    figures, tried = facts["figures"], [row for row in facts["candidates"] if row["score"] is not None]
    tried.sort(key=lambda row: (-row["num_images"], -row["score"]))
    titles = {
        f"{figures['judged']['split']} images, which chose nothing": figures["judged"],
        f"left-out training images, best of {_number(figures['chose']['num_candidates']):.0f} candidates": (
            figures["chose"]
        ),
    }
    return ShownBudget(
        str(facts["budget"]),
        tuple(_show_trial(row) for row in tried),
        tuple(_show_figure(title, figure) for title, figure in titles.items()),
        len(facts["candidates"]) - len(tried),
    )


def _show_trial(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    size = row["img_size"]
    size = "x".join(map(str, size)) if isinstance(size, list) else size
    learns = f"{row['features']} features" if row["strategy"] == "freeze" else f"{row['strategy']}"
    score = f"{percent(_number(row['score']))} ± {100 * _number(row['error']):.1f}"
    name = f"{row['backbone']}, {size} pixels, {learns}"
    return name, f"{_number(row['num_images']):,.0f}", score, f"{_number(row['seconds']):.1f}"


def _show_figure(title: str, figure: Mapping[str, Any]) -> tuple[str, str, str, str]:
    low, high = map(_number, figure["interval"])
    images = f"{_number(figure['num_images']):,.0f}"
    return title, percent(_number(figure["accuracy"])), f"{percent(low)} to {percent(high)}", images


# --- forecast ------------------------------------------------------------------------------------


def _show_forecast(path: Path, facts: Mapping[str, Any]) -> ShownForecast:
    measured, fitted, forecast = (
        tuple(_to_point(point) for point in facts[key]) for key in ("measured", "fitted", "forecast")
    )
    requirement = facts["requirement"]
    target = None if requirement is None else _number(requirement["target"])
    title = f"{facts['backbone']}, a linear classifier on {', '.join(map(str, facts['layers']))}"
    plot = draw_learning_curve(LearningCurvePlot(measured, fitted, forecast, target, title))
    rows = tuple(
        (
            f"{_number(fact['times']):g}x",
            f"{point.images:,}",
            percent(point.accuracy) if fact["can_say"] is True else "cannot say",
            f"{percent(point.low)} to {percent(point.high)}",
        )
        for fact, point in zip(facts["forecast"], forecast, strict=True)
    )
    limit = {key: _number(facts["limit"][key]) for key in ("accuracy", "low", "high")}
    ends = f"{percent(limit['low'])} to {percent(limit['high'])}"
    said = [f"With any number of images: {percent(limit['accuracy'])} ({ends})."]
    said += [] if requirement is None else [f"{requirement['said']}."]
    return ShownForecast(path.name, plot, rows, tuple(said))


def _to_point(point: Mapping[str, Any]) -> CurvePoint:
    images, *values = (_number(point[key]) for key in ("images", "accuracy", "low", "high"))
    if images < 1:
        raise ValueError(f"a point has {images:g} images")
    return CurvePoint(round(images), *values)


# --- audit ---------------------------------------------------------------------------------------


def _show_audit(path: Path, facts: Mapping[str, Any], album: Album) -> ShownAudit:
    own, tests = facts["independence"], facts["tests"]
    low, high = map(_number, own["interval"])
    together, alone = (percent(_number(own[f"accuracy_{name}"])) for name in ("groups", "images"))
    said = (
        f"Of {_number(own['num_images']):,.0f} training images {_number(own['num_groups']):,.0f} are "
        f"independent. A linear classifier on whole images has an accuracy of {together} with look-alikes "
        f"left out together ({percent(low)} to {percent(high)}), and of {alone} with each image left out "
        "alone."
    )
    alarms = tuple(
        (str(test["title"]), str(test["means"]), str(test["fix"])) for test in tests if test["alarm"] is True
    )
    picture = path / "audit.png" if alarms else None
    return ShownAudit(
        path.name,
        said,
        tuple(_show_test(test) for test in tests if test["permutations"]),
        alarms,
        None if picture is None else _show_picture(picture, album),
    )


def _show_test(test: Mapping[str, Any]) -> tuple[str, str, str, str]:
    low, high = map(_number, test["interval"])
    accuracy = f"{percent(_number(test['accuracy']))} ({percent(low)} to {percent(high)})"
    chance, p = percent(_number(test["chance"])), f"{_number(test['p_holm']):.3f}"
    return str(test["title"]), accuracy, chance, p


def _show_picture(file: Path, album: Album) -> InlineImage:
    try:
        with Image.open(file) as opened:
            opened.thumbnail((_WIDEST, 4 * _WIDEST))
            return album.show(opened.convert("RGB"))
    except OSError:
        return InlineImage("", f"missing: {file.name}")


def _number(value: Any) -> float:
    number = finite(value)
    if number is None:
        raise ValueError(f"{value!r} is no number")
    return number
