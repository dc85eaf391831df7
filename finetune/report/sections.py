"""The text and plots of each section of the report, without markup."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import sanitize
from finetune.plots.bars import ReliabilityBin, draw_reliability, draw_seconds, format_seconds
from finetune.plots.confusion import MOST_CLASSES, draw_confusion_matrix, draw_cooccurrence
from finetune.plots.curves import draw_curves
from finetune.plots.intervals import draw_intervals
from finetune.plots.scatter import draw_scatter
from finetune.plots.svg import Plot
from finetune.report.facts import EVALUATED, Facts, finite, finite_text
from finetune.report.images import Album, InlineImage
from finetune.targets import DETAIL_METRICS, HEADLINE_METRICS, METRIC_NAMES, PLAIN_METRICS

SPLIT_NAMES = {"val": "validation", "test": "test", "train": "training", "all": EVALUATED}
MOST_SAMPLES = 120
"""Largest number of sample images on the page, over all classes."""
SHOWN_CLASSES = 30
"""Largest number of classes with sample images."""
_SAMPLE_SIDE = 104
"""Side of a sample image, in pixels."""


def percent(share: float) -> str:
    """Return a share as ``91.5 %``."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class ShownMetric:
    """A metric with its name and its 95 % interval, formatted as text."""

    name: str
    value: str
    interval: str = ""


def list_metrics(facts: Facts) -> list[ShownMetric]:
    """Return the metrics, the most important first."""
    found = []
    for key in (*HEADLINE_METRICS, *DETAIL_METRICS):
        value, pair = facts.number(key), facts.interval(key)
        if value is not None:
            show = (lambda number: f"{number:.4g}") if key in PLAIN_METRICS else percent
            interval = f"{show(pair[0])} to {show(pair[1])}" if pair else ""
            found.append(ShownMetric(METRIC_NAMES[key], show(value), interval))
    return found


def name_split(facts: Facts) -> str:
    """Return the name of the evaluated split: validation, test, or the name in ``metrics.json``."""
    split = str(facts.metrics.get("split") or "all")
    return SPLIT_NAMES.get(split, split)


def describe_bias(facts: Facts) -> str:
    """Return a sentence on whether the metrics are unbiased; empty where the files do not say."""
    chose = facts.metrics.get("split_chose_checkpoint")
    leaked = (facts.number("num_leaked") or 0) + (facts.number("num_seen_by_backbone") or 0)
    if leaked:
        return (
            f"{leaked:,.0f} of them were used to train this model or its backbone: "
            "these metrics are optimistic."
        )
    if trained := facts.number("trained_on"):
        return f"{trained:,.0f} of them were used for training: these metrics say nothing about new images."
    if "trained_on" in facts.metrics and facts.metrics["trained_on"] is None:
        return "The training images are unknown; if these are among them, the metrics are optimistic."
    if chose is True:
        is_solved = facts.number("epochs") == 0
        how = "between this linear classifier and a trained network" if is_solved else "the best epoch"
        return (
            f"The same images also chose {how}, so the metrics are optimistic. "
            "A separate test split would show by how much."
        )
    if chose is False:
        return "These images were held out: neither the weights nor the best epoch depend on them."
    return ""


def plot_metrics(facts: Facts) -> Plot | None:
    """Return a plot of the metrics in [0, 1] with their intervals; None where there are none."""
    rows = [
        (METRIC_NAMES[key], value, facts.interval(key))
        for key in HEADLINE_METRICS
        if (value := facts.number(key)) is not None and 0 <= value <= 1
    ]
    return draw_intervals(rows) if rows else None


# --- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSamples:
    """A class, the number of its images by split, and some of them."""

    label: str
    counts: str
    images: tuple[tuple[str, InlineImage], ...]


def choose_classes(facts: Facts) -> list[str]:
    """Return the classes to show: all, or the ``SHOWN_CLASSES`` with the lowest recall."""
    if len(facts.classes) <= SHOWN_CLASSES:
        return list(facts.classes)
    recalls = {row["label"]: row["recall"] for row in facts.per_class}
    known = [name for name in facts.classes if finite_text(recalls.get(name, "")) is not None]
    worst = sorted(known, key=lambda name: finite_text(recalls[name]) or 0.0)
    return (worst or list(facts.classes))[:SHOWN_CLASSES]


def show_samples(facts: Facts, album: Album) -> list[ClassSamples]:
    """Return classes with sample images: training images if they are listed, else evaluated ones."""
    labels = choose_classes(facts)
    each = min(8, max(3, MOST_SAMPLES // max(len(labels), 1)))
    rows = [(row["path"], row["label"]) for row in facts.split if row["split"] == "train"]
    rows = rows or [(row.path, row.label) for row in facts.predictions]
    paths: dict[str, list[str]] = {label: [] for label in labels}
    for path, label in rows:
        for name in facts.target.classes_of(label):
            if name in paths:
                paths[name].append(path)
    shown = []
    for label, available in paths.items():
        chosen = spread(available, each)
        images = tuple((path, album.show_file(path, _SAMPLE_SIDE)) for path in chosen)
        shown.append(ClassSamples(label, _describe_counts(facts, label), images))
    return shown


def spread(items: Sequence[str], most: int) -> list[str]:
    """Return at most ``most`` items, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def _describe_counts(facts: Facts, label: str) -> str:
    return ", ".join(
        f"{counts[label]:,} {SPLIT_NAMES.get(split, split)}" for split, counts in facts.counts.items()
    )


def describe_sizes(facts: Facts) -> str:
    """Return the number of images by split, and the sizes of the smallest and the largest class."""
    sizes = [f"{number:,} {SPLIT_NAMES.get(split, split)}" for split, number in facts.sizes.items()]
    if not sizes:
        return ""
    if not facts.target.has_classes:
        return f"Images: {', '.join(sizes)}."
    text = f"{len(facts.classes)} classes; images: {', '.join(sizes)}."
    counts = next(iter(facts.counts.values()))
    if len(counts) > 1:
        (common, most), (rare, least) = counts.most_common()[0], counts.most_common()[-1]
        split = SPLIT_NAMES.get(next(iter(facts.counts)), "")
        if least < most:
            text += f" {least:,} ({rare}) to {most:,} ({common}) {split} images per class."
        else:
            text += f" {most:,} {split} images per class."
    return text


# --- plan and training ---------------------------------------------------------------------------


def describe_plan(facts: Facts) -> str:
    """Return a sentence with the number of trained parameters."""
    total = sum(int(row["parameters"]) for row in facts.plan)
    trained = sum(int(row["parameters"]) for row in facts.plan if row["trained"] == "True")
    features = facts.metrics.get("features")
    how = "were trained"
    if isinstance(features, list) and features:
        how = f"were fitted as a linear classifier on {', '.join(map(str, features))}"
    return f"{trained:,} of {total:,} parameters ({100 * trained / max(total, 1):.1f} %) {how}."


def list_speed(facts: Facts) -> list[tuple[str, str]]:
    """Return training speed and memory as (name, value), as far as the files record them."""
    found = []
    best, epochs = facts.number("best_epoch"), facts.number("epochs")
    if best and epochs:
        found.append(("best epoch", f"{best:.0f} of {epochs:.0f}"))
    if (speed := facts.number("images_per_second")) is not None:
        found.append(("training images per second", f"{speed:,.0f}"))
    if (waiting := facts.number("data_wait_fraction")) is not None:
        found.append(("time spent waiting for images", percent(waiting)))
    if (size := facts.number("microbatch")) is not None:
        found.append(("images per forward pass", f"{size:.0f}"))
    peaks = {
        "peak_memory_bytes": "peak memory",
        "peak_gpu_memory_bytes": "peak GPU memory, allocated",
        "peak_gpu_memory_reserved_bytes": "peak GPU memory, reserved",
    }
    for key, name in peaks.items():
        if (memory := facts.number(key)) is not None:
            found.append((name, f"{memory / 1e9:.2f} GB"))
    return found


def plot_history(facts: Facts) -> list[Plot]:
    """Return the plots of loss, accuracy and learning rate by epoch."""
    best = facts.number("best_epoch")
    wanted = (
        ("loss", {"validation": "eval_loss", "training": "train_loss"}, "{:.3g}"),
        ("accuracy", {"validation": "eval_accuracy", "training": "train_accuracy"}, "{:.4g} %"),
        ("learning_rate", {"head": "lr"}, "{:.3g}"),
    )
    plots = []
    for name, columns, form in wanted:
        scale = 100 if name == "accuracy" else 1
        curves = {
            curve: [
                (row["epoch"], row[column] * scale) for row in facts.history if {column, "epoch"} <= set(row)
            ]
            for curve, column in columns.items()
        }
        curves = {curve: points for curve, points in curves.items() if points}
        if curves:
            heading = name.replace("_", " ")
            ring = None if name == "learning_rate" else best
            plots.append(draw_curves(name, heading, curves, form.format, ring))
    return plots


# --- classes -------------------------------------------------------------------------------------


def plot_confusion(facts: Facts) -> Plot | None:
    """Return the plot of the confusion matrix; None where there are too many classes to read it."""
    if not facts.confusion or len(facts.classes) > MOST_CLASSES:
        return None
    return draw_confusion_matrix(facts.classes, facts.confusion)


def plot_answers(facts: Facts) -> Plot | None:
    """Return what takes the place of a confusion matrix: which classes occur together, or all numbers."""
    if facts.numbers:
        return draw_scatter(facts.numbers, facts.number("prediction_interval", "margin"))
    if facts.cooccurrence and len(facts.cooccurrence) == len(facts.classes) <= MOST_CLASSES:
        return draw_cooccurrence(facts.classes, facts.cooccurrence)
    return None


def describe_answers(facts: Facts) -> str:
    """Return a sentence below that plot."""
    if not facts.numbers:
        return "Evaluated images that have both classes. A stronger colour is a larger share of the row."
    margin, covered = (facts.number("prediction_interval", key) for key in ("margin", "covered"))
    if margin is None:
        return "A point is an image; exact predictions lie on the line."
    share = "" if covered is None else f"; {percent(covered)} of these images lie in it"
    return f"A point is an image. The interval of 90 % is the prediction plus and minus {margin:.4g}{share}."


# --- calibration ---------------------------------------------------------------------------------


def plot_calibration(facts: Facts) -> list[Plot]:
    """Return the reliability diagrams before and after the temperature."""
    wanted = (
        ("reliability", "bins", "ece", "before calibration"),
        ("reliability_calibrated", "bins_calibrated", "ece_calibrated", "after calibration"),
    )
    plots = []
    for name, key, error, when in wanted:
        bins, value = _read_bins(facts.rows("calibration", key)), facts.number("calibration", error)
        if bins:
            heading = when if value is None else f"{when}: ECE {value:.3f}"
            plots.append(draw_reliability(name, heading, bins))
    return plots


def _read_bins(rows: Sequence[Mapping[str, Any]]) -> list[ReliabilityBin]:
    """Return the bins whose limits are finite numbers."""
    bins = []
    for row in rows:
        low, high, confidence, accuracy = (
            finite(row.get(key)) for key in ("low", "high", "confidence", "accuracy")
        )
        if low is not None and high is not None:
            bins.append(ReliabilityBin(low, high, int(finite(row.get("count")) or 0), confidence, accuracy))
    return bins


def describe_calibration(facts: Facts) -> str:
    """Return the temperature and how calibration changed log loss and ECE."""
    value = facts.number("calibration", "temperature")
    if value is None:
        return ""
    text = f"Logits are divided by a temperature of {value:.3g}, fitted on the validation images."
    if value > 1.05:
        text += " It is above 1: the network was overconfident."
    elif value < 0.95:
        text += " It is below 1: the network was underconfident."
    before, after = facts.number("calibration", "loss"), facts.number("calibration", "loss_calibrated")
    if before is not None and after is not None:
        text += f" The log loss went from {before:.3f} to {after:.3f}."
    error, error_after = facts.number("calibration", "ece"), facts.number("calibration", "ece_calibrated")
    if error is not None and error_after is not None and error_after > error:
        text += (
            f" The ECE rose from {error:.3f} to {error_after:.3f}; on few images it is only a rough estimate."
        )
    calibration = facts.metrics["calibration"]
    if calibration.get("same_images") is True:
        text += (
            " The temperature was fitted on the evaluated images, so the calibrated metrics are cross-fitted "
            "in five folds."
        )
    return text


# --- the run itself ------------------------------------------------------------------------------


def plot_seconds(facts: Facts) -> Plot | None:
    """Return the plot of the time by phase; None where it was not recorded."""
    seconds = facts.metrics.get("seconds")
    if not isinstance(seconds, dict):
        return None
    phases = {str(key): number for key, value in seconds.items() if (number := finite(value)) is not None}
    phases.pop("total", None)
    return draw_seconds(phases) if phases else None


def format_total_time(facts: Facts) -> str:
    """Return the total time as text; empty where it was not recorded."""
    total = facts.number("seconds", "total")
    return "" if total is None else format_seconds(total)


def list_commands(facts: Facts, command: str | None) -> list[tuple[str, str]]:
    """Return (heading, command) pairs."""
    found = []
    if facts.recipe is not None:
        recipe = shlex.quote(str(facts.folder.recipe.absolute()))
        found.append(("Repeat this run", f"finetune run --recipe {recipe} --output runs/again"))
    if command:
        found.append(("Started with", sanitize(command)))
    return found


def list_environment(facts: Facts) -> list[tuple[str, str]]:
    """Return versions and hardware as (name, value)."""
    return [(str(key), sanitize(str(value))) for key, value in facts.environment.items() if value is not None]
