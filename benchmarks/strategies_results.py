"""What the runs of :mod:`benchmarks.strategies` found: a file of lines, and the page that is made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.strategies_data import DATASETS, VERSION, DataSet

IMG_SIZE = 96
AUTO = "auto"
STRATEGIES: dict[str, tuple[str, ...]] = {
    "freeze": ("--strategy", "freeze"),
    "probe": ("--strategy", "freeze", "--set", "strategy.features=last"),
    "probe-best": ("--strategy", "freeze", "--set", "strategy.features=best"),
    "probe-all": ("--strategy", "freeze", "--set", "strategy.features=all"),
    "top": ("--strategy", "top"),
    "full": ("--strategy", "full"),
    AUTO: ("--strategy", AUTO),
}
"""What is compared: names, and the words that each adds to the command line. All but ``auto`` are fixed."""

Key = tuple[str, int, str]


@dataclass(frozen=True)
class Trial:
    """What one run found.

    Attributes:
        dataset: name of the data set.
        seed: of the images and of the run.
        strategy: a key of ``STRATEGIES``.
        setup: everything else that the figures depend on.
        accuracy: on the test part.
        val_accuracy: of the best epoch, on the validation part.
        chosen: the strategy that trained; of ``auto``, what it chose.
        decided: the section ``strategy`` of the recipe, as the run has decided it.
        seconds: of the whole process.
        cpu: processor seconds, which other work on the machine stretches less.
        num_train: images learned from.
        num_classes: of the data set.
        num_test: images judged on.
    """

    dataset: str
    seed: int
    strategy: str
    setup: dict[str, Any]
    accuracy: float
    val_accuracy: float
    chosen: str
    decided: dict[str, Any]
    seconds: float
    cpu: float
    num_train: int
    num_classes: int
    num_test: int

    @property
    def key(self) -> Key:
        """What it is the result of."""
        return self.dataset, self.seed, self.strategy


def describe_setup(dataset: DataSet) -> dict[str, Any]:
    """Return what the figures of a data set depend on; lines of another setup do not count."""
    return {
        "images": [dataset.train, dataset.val, dataset.test],
        "epochs": dataset.epochs,
        "img_size": IMG_SIZE,
        "version": VERSION,
    }


def read_trials(path: Path) -> dict[Key, Trial]:
    """Return the runs of a file that were made as they would be made now; a later one replaces an earlier."""
    setups = {dataset.name: describe_setup(dataset) for dataset in DATASETS}
    trials = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError):  # the last line of a killed process
            continue
        if setups.get(trial.dataset) == trial.setup and trial.strategy in STRATEGIES:
            trials[trial.key] = trial
    return trials


def append_trial(trial: Trial, path: Path) -> None:
    """Keep a run."""
    append_line(asdict(trial), path)


def append_line(values: dict[str, Any], path: Path) -> None:
    """Add a line of JSON in one write; after a line that was cut off, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(values) + "\n")


# --- comparing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The runs of a data set, of those seeds that every strategy in it has finished.

    Attributes:
        dataset: which one.
        trials: by strategy, in the order of the seeds.
    """

    dataset: DataSet
    trials: dict[str, list[Trial]]

    @property
    def some(self) -> Trial:
        """Any of the runs: they all have the same numbers of images and classes."""
        return next(iter(self.trials.values()))[0]

    def mean(self, strategy: str) -> float:
        """Return the mean accuracy over the seeds."""
        return mean(trial.accuracy for trial in self.trials[strategy])

    def means(self) -> dict[str, float]:
        """Return the mean accuracy of each fixed strategy."""
        return {name: self.mean(name) for name in self.trials if name != AUTO}

    def best_of_each(self) -> list[float]:
        """Return the accuracy of the best fixed strategy, for each seed."""
        fixed = [runs for name, runs in self.trials.items() if name != AUTO]
        return [max(trial.accuracy for trial in runs) for runs in zip(*fixed, strict=True)]

    def regret(self, strategy: str) -> float:
        """Return what a strategy loses to the fixed one that is best by its mean."""
        return max(self.means().values()) - self.mean(strategy)

    def regret_of_each(self, strategy: str) -> float:
        """Return what it loses to the best of each seed, on average. That best is lucky too."""
        return mean(self.best_of_each()) - self.mean(strategy)

    def error(self) -> float:
        """Return one standard error of a run's accuracy, for the fixed strategy that is best by its mean."""
        return standard_error(max(self.means().values()), self.some.num_test)


def standard_error(accuracy: float, num_test: int) -> float:
    """Return one standard error of a share of test images."""
    return float((accuracy * (1 - accuracy) / num_test) ** 0.5)


def collect_rows(trials: dict[Key, Trial]) -> list[Row]:
    """Return the data sets of which there is anything to compare, strategies in the order of their table."""
    rows = []
    for dataset in DATASETS:
        found: dict[str, dict[int, Trial]] = {name: {} for name in STRATEGIES}
        for (name, seed, strategy), trial in trials.items():
            if name == dataset.name:
                found[strategy][seed] = trial
        present = {name: runs for name, runs in found.items() if runs}
        seeds = sorted(set.intersection(*(set(runs) for runs in present.values()))) if present else []
        if seeds and set(present) - {AUTO}:
            by_name = {name: [runs[seed] for seed in seeds] for name, runs in present.items()}
            rows.append(Row(dataset, by_name))
    return rows


# --- the page ------------------------------------------------------------------------------------------


def build_page(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the page."""
    if not rows:
        return ["Nothing has been run."]
    errors = [100 * row.error() for row in rows]
    caveat = (
        "Accuracy on the test part in percent, means over seeds; the best fixed strategy is bold. One "
        "standard error (s.e.) of one run, from its number of test images alone, is "
        f"{min(errors):.1f} to {max(errors):.1f} points: smaller differences say little. A seed draws other "
        "images, and the best of each seed is partly luck: even the right strategy loses to it now and "
        "then. The network was pretrained on the very images of Tiny-ImageNet."
    )
    return [*build_table(rows), "", caveat, "", describe_cost(rows), "", *summarise(rows)]


def build_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of accuracies and regrets."""
    columns = [name for name in STRATEGIES if any(name in row.trials for row in rows) and name != AUTO]
    head = ["data set", "like ImageNet", "images", "classes", "seeds", "test images", "one s.e."]
    head += [f"`{name}`" for name in columns]
    head += ["`auto` chose", "`auto`", "regret, means", "regret, each seed"]
    cells = [head, ["---"] * len(head), *(format_row(row, columns) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def format_row(row: Row, columns: Sequence[str]) -> list[str]:
    """Return the cells of a data set."""
    means, some = row.means(), row.some
    cells = [row.dataset.name, row.dataset.likeness, f"{some.num_train:,}", f"{some.num_classes}"]
    cells += [f"{len(row.best_of_each())}", f"{some.num_test}", f"{100 * row.error():.1f}"]
    for name in columns:
        mark = "**" if name in means and means[name] == max(means.values()) else ""
        cells.append(f"{mark}{100 * means[name]:.1f}{mark}" if name in means else "")
    if AUTO not in row.trials:
        return [*cells, "", "", "", ""]
    cells += [", ".join(trial.chosen for trial in row.trials[AUTO]), f"{100 * row.mean(AUTO):.1f}"]
    return [*cells, f"{100 * row.regret(AUTO):+.1f}", f"{100 * row.regret_of_each(AUTO):+.1f}"]


def describe_cost(rows: Sequence[Row]) -> str:
    """Return the mean processor seconds of each strategy."""
    words = []
    for name in STRATEGIES:
        spent = [trial.cpu for row in rows for trial in row.trials.get(name, ())]
        words += [f"`{name}` {mean(spent):.0f}"] if spent else []
    return f"Processor seconds a run, mean: {', '.join(words)}."


def summarise(rows: Sequence[Row]) -> list[str]:
    """Return the figures over all data sets: of ``auto``, and of always taking the same fixed strategy."""
    judged = [row for row in rows if AUTO in row.trials] or list(rows)
    names = [name for name in STRATEGIES if all(name in row.trials for row in judged)]
    lines = [
        f"- {'' if name == AUTO else 'always '}`{name}`: {format_regret(judged, name)}" for name in names
    ]
    return [
        f"Mean regret over {len(judged)} data sets, in points, against the fixed strategy that is best by "
        "its mean over the seeds, and against the best of each seed (± one standard error over data sets):",
        "",
        *lines,
        "",
        count_hits(judged) if AUTO in names else "`auto` has not been run.",
    ]


def format_regret(rows: Sequence[Row], strategy: str) -> str:
    """Return both mean regrets of a strategy."""
    words = []
    for values in ([row.regret(strategy) for row in rows], [row.regret_of_each(strategy) for row in rows]):
        spread = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        words.append(f"{100 * mean(values):.2f} ± {100 * spread:.2f}")
    return " and ".join(words)


def count_hits(rows: Sequence[Row]) -> str:
    """Return how often ``auto`` was the best, and how often no test of this size could tell."""
    best = close = runs = 0
    for row in rows:
        for trial, highest in zip(row.trials[AUTO], row.best_of_each(), strict=True):
            runs += 1
            best += trial.accuracy >= highest
            close += trial.accuracy >= highest - standard_error(highest, trial.num_test)
    return (
        f"In {close} of {runs} runs `auto` was the best or within one standard error of that seed's best "
        f"fixed strategy; in {best} none was better."
    )
