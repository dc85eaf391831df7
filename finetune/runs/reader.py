"""RunReader: the one reader of a run folder.

The folder of an evaluation has fewer files than that of a run, and a run in progress has not written all of
them yet. So an absent file reads as None or as empty; the caller checks for what it needs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.errors import FinetuneError, UsageError
from finetune.runs.files import damaged_file, read_object, read_rows, unescape_formula
from finetune.runs.folder import RunFolder
from finetune.system.regular_files import MOST_BYTES, bounded_lines, open_text
from finetune.targets import PREDICTION_COLUMNS, read_classes

if TYPE_CHECKING:  # the supervisor reads outcomes and must stay small
    from finetune.recipe import Recipe

T = TypeVar("T")
CsvRow = Mapping[str, str]
Confusion = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Class names, and counts (K, K): one row per true class, one column per predicted class."""

SPLIT_COLUMNS = ("path", "label", "split", "sha256")
BAD_IMAGES_COLUMNS = ("path", "split", "reason")
_PLAN_COLUMNS = ("group", "stage", "parameters", "trained", "rate")
_PER_CLASS_COLUMNS = ("label", "recall", "support")
_LARGEST_COUNT = 2**53
"""Counts from here on are damage; smaller ones are exact as floats."""
_LARGEST_METRIC = 1e40
"""Metrics from here on are damage, as those that are not finite are: losses come from 32-bit logits."""
_ENDS = ("low", "high")
"""Columns of the interval of a number."""
_TOLERANCE = 1e-3
"""Largest difference of a sum of probabilities from 1. They are written with nine digits."""


@dataclass(frozen=True)
class PredictionRow:
    """One evaluated image: path below the data folder, true and predicted class, confidence of the latter."""

    path: str
    label: str
    predicted: str
    confidence: float

    @property
    def is_right(self) -> bool:
        """Whether the true class was predicted."""
        return self.label == self.predicted


class RunReader:
    """The content of a run's or an evaluation's files, each read once, when it is first asked for.

    Args:
        folder: run folder, or folder of an evaluation.
        tolerant: whether a damaged file counts as absent; its name is then added to :attr:`damaged`.

    Every property raises DataError (``recipe``: UsageError) for a file that is damaged, unless the reader is
    tolerant.

    Attributes:
        damaged: names of the files that could not be read.
    """

    def __init__(self, folder: RunFolder, *, tolerant: bool = False) -> None:
        self.folder, self.damaged = folder, list[str]()
        self._tolerant = tolerant

    def _read(self, path: Path, read: Callable[[Path], T], absent: T) -> T:
        try:
            return read(path) if path.exists() else absent
        except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
            refusal: FinetuneError = damaged_file(path, error)
        except MemoryError:
            refusal = damaged_file(path, MemoryError("it does not fit in memory"))
        except FinetuneError as error:
            refusal = error
        if not self._tolerant:
            raise refusal from None
        if path.name not in self.damaged:
            self.damaged.append(path.name)
        return absent

    def _object(self, path: Path) -> Mapping[str, Any]:
        nothing: Mapping[str, Any] = {}
        return self._read(path, read_object, nothing)

    def _rows(self, path: Path, *columns: str) -> tuple[CsvRow, ...]:
        return self._read(path, lambda path: tuple(read_rows(path, columns)), ())

    # --- the run ---------------------------------------------------------------------------------

    @cached_property
    def recipe(self) -> Recipe | None:
        """The resolved recipe; None before the run has begun."""
        return self._read(self.folder.recipe, _load_recipe, None)

    @cached_property
    def outcome(self) -> Mapping[str, Any]:
        """The content of ``outcome.json``; empty for an evaluation."""
        return self._object(self.folder.outcome)

    @cached_property
    def progress(self) -> Mapping[str, Any]:
        """The content of ``progress.json``; empty before a run has begun."""
        return self._object(self.folder.progress)

    @property
    def state(self) -> str:
        """``done``, ``running``, ``interrupted`` or ``failed``; an evaluation is done."""
        return str(self.outcome.get("state", "done"))

    @property
    def attempt(self) -> int:
        """Number of processes that have claimed the run; 0 if none has."""
        attempt = self.outcome.get("attempt")
        return attempt if isinstance(attempt, int) else 0

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        """Versions and hardware of the last attempt."""
        return self._object(self.folder.environment)

    @cached_property
    def advice(self) -> Mapping[str, Any]:
        """Why ``--strategy auto`` chose what it chose."""
        return self._object(self.folder.advice)

    @cached_property
    def budget(self) -> Mapping[str, Any]:
        """What ``--budget`` tried, and what it chose."""
        return self._object(self.folder.budget)

    @cached_property
    def trunk(self) -> Mapping[str, Any]:
        """How the network was cut so that its frozen part runs once: ``cut`` and ``reason``."""
        return self._object(self.folder.trunk)

    @cached_property
    def plan(self) -> tuple[CsvRow, ...]:
        """Which stages are trained, with which learning rate, one row per stage."""
        return self._read(self.folder.plan, _read_plan, ())

    @cached_property
    def history(self) -> tuple[Mapping[str, float], ...]:
        """Metrics of training, one row per epoch, without empty cells; finite, and whole epochs from 1."""
        return self._read(self.folder.history, _read_history, ())

    @property
    def kept_epochs(self) -> dict[int, Path]:
        """The files with the weights after some epochs, by epoch from 1, in order."""
        found = {
            path.stem.removeprefix("epoch-"): path for path in self.folder.epochs.glob("epoch-*.safetensors")
        }
        numbers = {int(word): path for word, path in found.items() if word.isascii() and word.isdecimal()}
        return dict(sorted(numbers.items()))

    # --- its images ------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names in index order."""
        return self._read(self.folder.classes, _read_lines, ())

    @cached_property
    def split(self) -> tuple[CsvRow, ...]:
        """Path, label, split and sha256 of each image that the run began with.

        For an evaluation: the evaluated images only.
        """
        return self._rows(self.folder.split, *SPLIT_COLUMNS)

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Sha256 of each image that the run began with, by path."""
        return {row["path"]: row["sha256"] for row in self.split}

    @cached_property
    def bad_images(self) -> tuple[CsvRow, ...]:
        """Path, split and reason of each image that could not be read."""
        return self._rows(self.folder.bad_images, *BAD_IMAGES_COLUMNS)

    @cached_property
    def check(self) -> Mapping[str, Any]:
        """The issues that the check of the data found."""
        return self._object(self.folder.check)

    # --- its results -----------------------------------------------------------------------------

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """The final metrics."""
        return self._object(self.folder.metrics)

    @cached_property
    def per_class(self) -> tuple[CsvRow, ...]:
        """Precision, recall, F1 and support, one row per class."""
        return self._rows(self.folder.per_class, *_PER_CLASS_COLUMNS)

    @cached_property
    def confusion(self) -> Confusion:
        """Class names and the confusion matrix."""
        nothing: Confusion = (), ()
        return self._read(self.folder.confusion_matrix, _read_confusion, nothing)

    @cached_property
    def cooccurrence(self) -> Confusion:
        """Class names, and the images that have two of them, where images have several."""
        nothing: Confusion = (), ()
        return self._read(self.folder.cooccurrence, _read_cooccurrence, nothing)

    @cached_property
    def numbers(self) -> tuple[tuple[float, float], ...]:
        """True and predicted number of each evaluated image; empty for other labels."""
        return self._read(self.folder.predictions, _read_numbers, ())

    @property
    def predictions(self) -> tuple[PredictionRow, ...]:
        """One row per evaluated image, in the order of the file, without probabilities."""
        return self._predictions[1]

    @property
    def predicted_classes(self) -> tuple[str, ...]:
        """Names of the classes whose probabilities ``predictions.csv`` holds, in index order."""
        return self._predictions[0]

    @cached_property
    def _predictions(self) -> tuple[tuple[str, ...], tuple[PredictionRow, ...]]:
        nothing: tuple[tuple[str, ...], tuple[PredictionRow, ...]] = (), ()
        return self._read(self.folder.predictions, _read_predictions, nothing)

    @property
    def prediction_rows(self) -> tuple[CsvRow, ...]:
        """All columns of ``predictions.csv`` as text; not cached, since they may be large."""
        return self._read(
            self.folder.predictions, lambda path: tuple(read_rows(path, ["path"], most_bytes=None)), ()
        )


def require_run(path: Path) -> Recipe:
    """Return the recipe of the run in a folder that the user named with ``--run``.

    Raises:
        UsageError: there is no run in it, or it has not started training.
    """
    run = RunFolder(path)
    recipe = RunReader(run).recipe if run.split.is_file() and run.recipe.is_file() else None
    if recipe is None:
        found = "it is not a run folder, or the run has not started training"
        raise UsageError(f"--run {path}", found, "Name the --output of a `finetune run`.")
    return recipe


def _load_recipe(path: Path) -> Recipe | None:
    from finetune.recipe import load_recipe

    return load_recipe(str(path))


def _read_lines(path: Path) -> tuple[str, ...]:
    with open_text(path, MOST_BYTES) as file:
        lines = file.read().removesuffix("\n").split("\n")
    return tuple(line.removesuffix("\r") for line in lines)  # of an editor that ends lines with both


def _read_count(cell: str) -> int:
    number = int(cell)
    if not 0 <= number < _LARGEST_COUNT:
        raise ValueError(f"a count is {cell}")
    return number


def _read_plan(path: Path) -> tuple[CsvRow, ...]:
    rows = tuple(read_rows(path, _PLAN_COLUMNS))
    for row in rows:
        _read_count(row["parameters"])
    return rows


def _read_history(path: Path) -> tuple[Mapping[str, float], ...]:
    return tuple(map(_read_epoch, read_rows(path, ["epoch"])))


def _read_epoch(cells: CsvRow) -> Mapping[str, float]:
    row = {key: float(value) for key, value in cells.items() if value}
    if not all(abs(value) < _LARGEST_METRIC for value in row.values()):
        raise ValueError(f"epoch {cells['epoch']} has a metric that is not finite")
    if not (row["epoch"].is_integer() and 1 <= row["epoch"] < _LARGEST_COUNT):
        raise ValueError(f"an epoch is {cells['epoch']}")
    return row


def _read_confusion(path: Path) -> Confusion:
    with open_text(path, MOST_BYTES) as file:
        header, *rows = csv.reader(bounded_lines(file))
    labels = tuple(unescape_formula(cell) for cell in header[1:])
    if [unescape_formula(row[0]) for row in rows] != list(labels) or len(set(labels)) < len(labels):
        raise ValueError("its rows are not of the classes of its columns")
    counts = tuple(tuple(_read_count(cell) for cell in row[1:]) for row in rows)
    if [len(row) for row in counts] != [len(labels)] * len(labels):
        raise ValueError("the table is not square")
    return labels, counts


def _read_cooccurrence(path: Path) -> Confusion:
    labels, counts = _read_confusion(path)
    if any(count > row[index] for index, row in enumerate(counts) for count in row):
        raise ValueError("more images have two classes than have one of them")
    return labels, counts


def _read_predictions(path: Path) -> tuple[tuple[str, ...], tuple[PredictionRow, ...]]:
    """Return class names, and the first four columns of each row; the probabilities may be very many."""
    with open_text(path) as file:
        rows = csv.reader(bounded_lines(file))
        header = next(rows, [])
        if _are_other_answers(header, rows):
            return tuple(read_classes(header)), ()
        if tuple(header[:4]) != PREDICTION_COLUMNS:
            raise ValueError(f"its columns do not begin with {', '.join(PREDICTION_COLUMNS)}")
        classes = tuple(read_classes(header))
        if len(classes) != len(header) - len(PREDICTION_COLUMNS) or len(set(classes)) < len(classes):
            raise ValueError("its other columns are not the probabilities of its classes")
        index = {name: number for number, name in enumerate(classes)}
        return classes, tuple(_to_prediction(row, index) for row in rows)


def _read_numbers(path: Path) -> tuple[tuple[float, float], ...]:
    """Return true and predicted numbers; nothing of a table of classes."""
    with open_text(path) as file:
        rows = csv.reader(bounded_lines(file))
        if "confidence" in (header := next(rows, [])) or read_classes(header):
            return ()
        pairs = tuple((float(row[1]), float(row[2])) for row in rows)
    if not all(abs(value) < _LARGEST_METRIC for pair in pairs for value in pair):
        raise ValueError("a number is not finite")
    return pairs


def _are_other_answers(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Return whether a table holds sets of classes or numbers, of which no row has a confidence.

    Raises:
        ValueError: the numbers are none.
    """
    first, others = tuple(header[:3]), tuple(header[3:])
    if first != PREDICTION_COLUMNS[:3] or (others and read_classes(header) == [] and others != _ENDS):
        return False
    if others[:1] == PREDICTION_COLUMNS[3:]:
        return False
    if not read_classes(header):
        for row in rows:
            float(row[2])
    return True


def _to_prediction(row: Sequence[str], index: Mapping[str, int]) -> PredictionRow:
    """Return a row of ``predictions.csv`` whose numbers are those of a prediction.

    Args:
        row: its cells.
        index: number of each class; empty if the table has no probabilities.

    Raises:
        ValueError: its numbers are no probabilities, or those of another prediction.
    """
    path, label, predicted = map(unescape_formula, row[:3])
    confidence, *probabilities = map(float, row[3:])
    if not 0 <= confidence <= 1:  # also refuses nan
        raise ValueError(f"{path} has the confidence {row[3]}")
    if index:
        if len(probabilities) != len(index) or not math.isclose(sum(probabilities), 1, abs_tol=_TOLERANCE):
            raise ValueError(f"the probabilities of {path} do not add up to 1")
        if min(probabilities) < 0 or not probabilities[index[predicted]] == max(probabilities) == confidence:
            raise ValueError(f"the confidence of {path} is not its largest probability, or another class's")
    return PredictionRow(path, label, predicted, confidence)
