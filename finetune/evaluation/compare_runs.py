"""``finetune compare``: which of several runs is better, by paired tests on the images they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import DataError, UsageError, count, sanitize
from finetune.evaluation.answers import RunAnswers, load_answers
from finetune.evaluation.paired_scores import PairedScores, ScoredRun, compare_scores
from finetune.evaluation.paired_tests import PairedTest, Rights, compare_pairs
from finetune.evaluation.resampling import Floats
from finetune.evaluation.summary import JUDGES
from finetune.plots.intervals import Difference, Estimate, draw_comparison
from finetune.plots.svg import Plot
from finetune.runs.files import write_csv, write_json, write_text
from finetune.runs.new_folder import new_folder
from finetune.system.display import Display
from finetune.targets import METRIC_NAMES, SINGLE

MOST_FOR_ALL_PAIRS = 4
"""Largest number of runs that are compared pairwise; more are compared with the first one only."""

_DETAILS = {
    "accuracy": ("balanced_accuracy", "f1_macro", "loss"),
    "map": ("f1_micro", "f1_macro"),
    "r2": ("spearman", "mae"),
}
"""Further metrics of the table, by the score."""


@dataclass(frozen=True)
class ComparisonResult:
    """The result of a comparison.

    Attributes:
        rows: the table, one row per run; values that a run does not record are None.
        pairs: the paired test of each pair of runs.
        metric: name of the score that is compared.
        warnings: reasons why the metrics may not be comparable, or optimistic.
    """

    rows: list[dict[str, Any]]
    pairs: list[PairedTest] | list[PairedScores]
    warnings: list[str]
    metric: str = "accuracy"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``comparison.json``."""
        pairs = [
            asdict(pair)
            | {"difference": pair.difference, "claimed": pair.is_claimed, "sentence": pair.sentence}
            for pair in self.pairs
        ]
        return {"metric": self.metric, "runs": self.rows, "pairs": pairs, "warnings": self.warnings}


def compare_runs(paths: Sequence[Path], output: Path | None, display: Display) -> ComparisonResult:
    """Compare finished runs or evaluations on the images that they share.

    Args:
        paths: two folders or more; more than :data:`MOST_FOR_ALL_PAIRS` are compared with the first only.
        output: a new folder for ``runs.csv``, ``pairs.csv``, ``comparison.json`` and ``comparison.svg``; None
            writes nothing.
        display: shows the warnings.

    Raises:
        UsageError: fewer than two folders are given, one does not exist or is given twice, or the output is
            not new.
        DataError: the folders differ in classes, labels or image contents, or have no image in common.
    """
    runs = _load(paths)
    _check_classes(runs)
    with_first = [(runs[0], other) for other in runs[1:]]
    chosen = list(combinations(runs, 2)) if len(runs) <= MOST_FOR_ALL_PAIRS else with_first
    warnings = _find_faults(runs)
    pairs = []
    for first, second in chosen:
        shared = _find_shared(first, second)
        warnings += _describe_left_out(first, second, len(shared)) + _compare_training(first, second)
        pairs.append((first, second, shared))
    rows = [_describe(run) for run in runs]
    result = ComparisonResult(rows, _compare_pairs(pairs), warnings, runs[0].target.score)
    for warning in warnings:
        display.warn(warning)
    if output is not None:
        with new_folder(output) as folder:
            _write(result, folder)
        display.say(f"{output}/runs.csv, pairs.csv, comparison.json, comparison.svg", style="bold")
    return result


def _load(paths: Sequence[Path]) -> list[RunAnswers]:
    if len(paths) < 2:
        raise UsageError("finetune compare", f"{len(paths)} run was named", "Name two runs or more.")
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(paths):
        if resolved[number] in resolved[:number]:
            raise UsageError(str(path), "it is given twice", "Name each run once.")
    names = [path.name for path in resolved]
    return [
        load_answers(path, sanitize(str(path) if names.count(name) > 1 else name))
        for path, name in zip(paths, names, strict=True)
    ]


# --- what can be compared ------------------------------------------------------------------------


def _check_classes(runs: Sequence[RunAnswers]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.target != first.target:
            found = f"one has the score {METRIC_NAMES[first.target.score]}, the other "
            fix = "Compare runs with labels of one kind."
            asked = f"comparing {first.name} and {run.name}"
            raise DataError(asked, found + METRIC_NAMES[run.target.score], fix)
        if set(run.classes) != set(first.classes):
            others = sorted(set(run.classes) ^ set(first.classes))
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            found = f"only one of them knows {', '.join(map(repr, others[:3]))}{more}"
            fix = "Compare runs that were trained on the same classes."
            raise DataError(f"comparing {first.name} and {run.name}", found, fix)


def _find_shared(first: RunAnswers, second: RunAnswers) -> list[str]:
    """Return the sorted paths of the images that both runs were evaluated on.

    Raises:
        DataError: there are none, or an image differs in label or content between the runs.
    """
    asked = f"comparing {first.name} and {second.name}"
    shared = sorted(first.answers.keys() & second.answers.keys())
    if not shared:
        found = f"they share no image (for example {min(first.answers)} and {min(second.answers)})"
        fix = "Evaluate both on the same folder (`finetune evaluate RUN --data FOLDER`), and compare these."
        raise DataError(asked, found, fix)
    fix = "Evaluate both on the same images (`finetune evaluate RUN --data FOLDER`), and compare these."
    for path in shared:
        labels = first.answers[path][0], second.answers[path][0]
        if labels[0] != labels[1]:
            raise DataError(asked, f"{path} has the labels {labels[0]!r} and {labels[1]!r}", fix)
        if first.digests[path] != second.digests[path]:
            raise DataError(asked, f"{path} is not the same image in both (by its sha256)", fix)
    return shared


def _compare_pairs(
    pairs: Sequence[tuple[RunAnswers, RunAnswers, list[str]]],
) -> list[PairedTest] | list[PairedScores]:
    """Compare pairs of runs on the images that they share, by the score of their labels."""
    target = pairs[0][0].target
    if target == SINGLE:
        return compare_pairs(
            [(one.name, _rights(one, paths), two.name, _rights(two, paths)) for one, two, paths in pairs]
        )
    scored = []
    for first, second, paths in pairs:
        labels = target.encode([first.answers[path][0] for path in paths], first.classes)
        runs = [ScoredRun(run.name, _values(run, paths, first.classes)) for run in (first, second)]
        scored.append((runs[0], runs[1], labels))
    return compare_scores(scored, JUDGES[target.kind], target.score)


def _values(run: RunAnswers, paths: Sequence[str], classes: Sequence[str]) -> Floats:
    """Return what a run predicted for images (N, K), classes in the order of the first run."""
    order = [run.classes.index(name) for name in classes] or [0]
    return np.array([run.values[path] for path in paths])[:, order]


def _rights(run: RunAnswers, paths: Sequence[str]) -> Rights:
    """Return whether a run predicted each image correctly, (N,) bool."""
    return np.array([run.answers[path][0] == run.answers[path][1] for path in paths])


# --- warnings ------------------------------------------------------------------------------------


def _find_faults(runs: Sequence[RunAnswers]) -> list[str]:
    warnings = []
    choosers = [run.name for run in runs if run.metrics.get("split_chose_checkpoint")]
    if choosers:
        was = "was" if len(choosers) == 1 else "were"
        warnings.append(
            f"the images that {_join(choosers)} {was} evaluated on also chose the epoch: accuracies are "
            "slightly optimistic, more so after many epochs"
        )
    for run in runs:
        if trained := run.metrics.get("trained_on"):
            warnings.append(f"{run.name} was trained on {trained} of the images that it was evaluated on")
    splits = {str(run.metrics.get("split")) for run in runs}
    if len(splits) > 1:
        listed = ", ".join(f"{run.name} {run.metrics.get('split')}" for run in runs)
        warnings.append(f"the evaluated splits differ ({listed})")
    return warnings


def _describe_left_out(first: RunAnswers, second: RunAnswers, num_shared: int) -> list[str]:
    left = [(run.name, len(run.answers) - num_shared) for run in (first, second)]
    listed = " and ".join(f"{count(number, 'image')} of {name} alone" for name, number in left if number)
    return [f"left out: {listed}; compared: {num_shared}"] if listed else []


def _compare_training(first: RunAnswers, second: RunAnswers) -> list[str]:
    if not first.trained_on or not second.trained_on or first.trained_on == second.trained_on:
        return []
    sizes = f"{len(first.trained_on)} and {len(second.trained_on)}"
    both = len(first.trained_on & second.trained_on)
    return [
        f"{first.name} and {second.name} were trained on different images ({sizes}, {both} of them in both): "
        "a difference may be due to the training data"
    ]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the table and the files ---------------------------------------------------------------------


def _describe(run: RunAnswers) -> dict[str, Any]:
    metrics = run.metrics
    models = metrics.get("models")
    seconds, calibration = metrics.get("seconds") or {}, metrics.get("calibration") or {}
    score = run.target.score
    low, high = (metrics.get("intervals") or {}).get(score) or (None, None)
    return {
        "run": run.name,
        "path": str(run.folder.path),
        "backbone": metrics.get("backbone") or (" + ".join(map(str, models)) if models else None),
        "strategy": metrics.get("strategy"),
        "solved_on": ", ".join(map(str, metrics.get("features") or ())) or None,
        "split": metrics.get("split"),
        "images": len(run.answers),
        score: metrics[score],
        f"{score}_low": low,
        f"{score}_high": high,
        **{name: metrics.get(name) for name in _DETAILS[score]},
        **({"ece": calibration.get("ece_calibrated")} if run.target == SINGLE else {}),
        "seconds": seconds.get("total"),
        "learned": run.num_learned,
    }


def _write(result: ComparisonResult, folder: Path) -> None:
    rows = result.rows
    write_csv(folder / "runs.csv", [tuple(row.values()) for row in rows], tuple(rows[0]))
    pairs = [_to_row(pair) for pair in result.pairs]
    write_csv(folder / "pairs.csv", [tuple(row.values()) for row in pairs], tuple(pairs[0]))
    write_json(folder / "comparison.json", result.to_dict())
    write_text(folder / "comparison.svg", _draw(result).file)


def _to_row(pair: PairedTest | PairedScores) -> dict[str, Any]:
    row: dict[str, Any] = {"first": pair.first, "second": pair.second, "images": pair.num_images}
    if isinstance(pair, PairedTest):
        row |= {"only_first": pair.only_first, "only_second": pair.only_second}
    low, high = pair.interval
    row |= {"difference": pair.difference, "low": low, "high": high}
    row |= {"p_value": pair.p_value, "p_corrected": pair.p_corrected}
    return row | {"claimed": "yes" if pair.is_claimed else "no"}


def _draw(result: ComparisonResult) -> Plot:
    scores = [_estimate(row, result.metric) for row in result.rows]
    differences = [
        Difference(pair.first, pair.second, pair.difference, pair.interval, pair.is_claimed)
        for pair in result.pairs
    ]
    return draw_comparison(scores, differences, METRIC_NAMES[result.metric])


def _estimate(row: dict[str, Any], metric: str) -> Estimate:
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    interval = None if low is None or high is None else (float(low), float(high))
    return str(row["run"]), float(row[metric]), interval
