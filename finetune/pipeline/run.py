"""``finetune run``: from a recipe to a finished run.

::

    recipe -> dataset -> backbone -> plan -> training -> metrics -> exported model
              checked    loaded      shown               written    verified by loading it again
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune import __version__
from finetune.data.dataset import PreparedDataset
from finetune.data.prepare import check_outside, describe_data, record_split
from finetune.data.provenance import check_seen
from finetune.data.quality.usable import check_data
from finetune.errors import DataError, InternalError, UsageError
from finetune.evaluation.summary import JUDGES
from finetune.exporters.folder import export_model, measure_round_trip
from finetune.features.network import name_backbone, place_network
from finetune.pipeline.auto import choose_strategy
from finetune.pipeline.budget.choose import choose_by_budget, judge_choice
from finetune.pipeline.changes import RunChanges, accept, warn_of_versions
from finetune.pipeline.context import Clock, FitContext
from finetune.pipeline.fit import FitResult, fit_network
from finetune.pipeline.results import (
    check_predictions,
    collect_metrics,
    describe_answers,
    find_gap,
    report_result,
)
from finetune.pipeline.resume import refuse_other_classes, try_resume
from finetune.pipeline.setup import (
    RunSetup,
    check_asked,
    check_deterministic,
    fit_batches,
    keep_channels,
    keep_views,
    prepare,
)
from finetune.recipe import Recipe
from finetune.report.write_report import add_report
from finetune.runs.claim import Claim, check_name, claim_folder, create_folder, locked
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.runs.outcome import recorded_outcome, translated_errors
from finetune.runs.progress import ProgressFile
from finetune.runs.reader import RunReader
from finetune.strategies import AUTO
from finetune.system.display import Display, SilentDisplay
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.memory import find_largest_peak, measure_peak_memory
from finetune.system.signals import StopSignal
from finetune.targets import METRIC_NAMES, SCORES
from finetune.tracking.trackers import Trackers, check_trackers
from finetune.training.plan import PLAN_COLUMNS, Plan
from pretrained.backbone import Backbone

ROUND_TRIP_TOLERANCE = 1e-3
"""Largest difference in a probability between the trained network and its exported copy (layouts differ)."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its ``metrics.json``."""

    folder: RunFolder
    metrics: dict[str, Any]


def run(
    recipe: Recipe,
    output: Path | None = None,
    display: Display | None = None,
    allow_changed: bool = False,
    distributed: Distributed = SINGLE_PROCESS,
) -> Run:
    """Fine-tune as a recipe says, and write all results into a run folder.

    Every rank calls this with the same arguments. Rank 0 makes the decisions and shares them
    (:meth:`finetune.system.distributed.Distributed.share`); only rank 0 writes files.

    Args:
        recipe: recipe of the run; its "auto" values are resolved here and saved.
        output: run folder; by default ``runs/<time>-<backbone>-<strategy>``. If it already holds this run,
            the run resumes.
        display: progress display; silent by default, and on all ranks but rank 0.
        allow_changed: resume even if the recipe, the images or the weights changed.
        distributed: ranks of the run.

    Returns:
        The finished run. Its metrics are complete on rank 0 and may be empty on the others.

    Raises:
        FinetuneError: any refusal or failure, with its exit code (docs/errors.md).
    """
    display = display or SilentDisplay()
    clock = Clock()
    with StopSignal(gentle=not distributed.is_main) as stop, translated_errors(distributed=distributed):
        if recipe.budget is not None:
            recipe, output = _spend_budget(recipe, output, display, clock, distributed)
        recipe, advice = distributed.share(lambda: resolve_strategy(recipe, output, display, clock))
        with clock.phase("load"):
            setup, found = prepare(recipe, display, distributed)
        path = distributed.share(lambda: output or default_output(setup))
        if recipe.cache.views == "auto":
            setup = keep_views(setup, RunFolder(path), distributed)
        if recipe.input.mean == "auto" and recipe.input.std == "auto":
            setup = keep_channels(setup, RunFolder(path), distributed)
        if setup.placement.device.type == "cuda":
            check_deterministic(setup, distributed)
            if recipe.training.batch_size == "auto":
                setup = fit_batches(setup, RunFolder(path), distributed)
        run_changes = RunChanges(setup, found, RunFolder(path), display, distributed.size)
        distributed.share(lambda: _create_folder(path, run_changes))
        with locked(path) if distributed.is_main else nullcontext():
            display.heartbeat.send({"folder": str(path.absolute())})
            with clock.phase("check"):
                claim = distributed.share(lambda: _claim(path, setup, run_changes, allow_changed, display))
            if claim.finished:
                metrics = distributed.share(lambda: _read_metrics(claim, run_changes, display))
                if metrics is not None:
                    return Run(claim.folder, metrics)
            trackers = Trackers(setup.recipe, claim.folder, display)
            with _recorded(claim, trackers, advice, display, distributed):
                with clock.phase("check"):
                    dataset, changed, seen = distributed.share(
                        lambda: _prepare_data(claim, setup, run_changes, allow_changed, display)
                    )
                setup = setup.with_value_range(dataset.value_range)
                place_network(setup.backbone.network, setup.placement)
                context = FitContext(
                    setup,
                    dataset,
                    claim,
                    display,
                    changed=changed,
                    clock=clock,
                    stop=stop,
                    on_history=trackers.log_epochs,
                    distributed=distributed,
                )
                result = fit_network(context)
                peaks = distributed.collect(measure_peak_memory(setup.placement.device))
                metrics = _write_results(context, result, seen, peaks) if distributed.is_main else {}
                trackers.log_final(metrics)
                return Run(claim.folder, metrics)


def _spend_budget(
    recipe: Recipe, output: Path | None, display: Display, clock: Clock, distributed: Distributed
) -> tuple[Recipe, Path]:
    """Return the recipe that a budget chose, and its run folder."""
    if distributed.size > 1:
        found = "the search measures one process"
        raise UsageError(f"--budget {recipe.budget}", found, "Leave out --gpus and --processes.")
    check_trackers(recipe.tracking.to)
    check_asked(recipe)
    with clock.phase("search"):
        return choose_by_budget(recipe, output, display)


def resolve_strategy(
    recipe: Recipe, output: Path | None, display: Display, clock: Clock
) -> tuple[Recipe, dict[str, Any] | None]:
    """Return the recipe with its backbone and strategy chosen, and the advice if that chose the strategy."""
    check_trackers(recipe.tracking.to)
    check_asked(recipe)
    recipe = name_backbone(recipe, output, display)
    if recipe.strategy.name != AUTO:
        return recipe, None
    with clock.phase("advise"):
        recipe, advice = choose_strategy(recipe, output, display)
    return recipe, advice.to_dict() if advice is not None else None


def default_output(setup: RunSetup) -> Path:
    """Return ``runs/<time>-<backbone>-<strategy>``."""
    name = f"{setup.backbone.card.architecture}-{setup.recipe.strategy.name}"
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


# --- the run folder ------------------------------------------------------------------------------


def _create_folder(path: Path, run_changes: RunChanges) -> None:
    check_name(path)
    check_outside(path, run_changes.dataset)
    create_folder(path)


def _claim(
    path: Path, setup: RunSetup, run_changes: RunChanges, allow_changed: bool, display: Display
) -> Claim:
    """Claim the run folder; refuse if it holds a different run, or one that cannot resume."""

    def check(claim: Claim) -> None:
        changes = run_changes.find_changes(claim)
        if not allow_changed:
            accept(changes, claim, False, display)
        if changes or claim.was_finished:
            try_resume(setup, claim, run_changes, is_changed=bool(changes))

    refuse_other_classes(RunFolder(path), run_changes.dataset.classes)
    claim = claim_folder(path, setup.recipe, allow_changed, check)
    if not claim.finished:
        display.heartbeat.send({"attempt": claim.attempt})
    return claim


def _read_metrics(claim: Claim, run_changes: RunChanges, display: Display) -> dict[str, Any] | None:
    """Return the metrics of a finished run; None if it changed since and may resume."""
    folder = claim.folder
    if run_changes.find_changes(claim):
        return None
    metrics = dict(RunReader(folder, tolerant=True).metrics)
    if not metrics:
        fix = "Start a new run with another --output."
        raise DataError(f"--output {folder.path}", "its metrics.json is missing or damaged", fix)
    score = next((name for name in SCORES if name in metrics), SCORES[0])
    result = f"{METRIC_NAMES[score]} {metrics[score]:.4f}"
    message = f"{folder.path} already holds this run, finished with {result}"
    display.say(f"{message}; to train again, give another --output or more --epochs")
    return metrics


@contextmanager
def _recorded(
    claim: Claim,
    trackers: Trackers,
    advice: Mapping[str, Any] | None,
    display: Display,
    distributed: Distributed,
) -> Iterator[None]:
    """Write the log and the outcome, and keep the trackers open, while the block runs; on rank 0 only."""
    if not distributed.is_main:
        yield
        return
    display.log_to(claim.folder.log)
    display.follow(ProgressFile(claim.folder.progress).update)
    display.report({"attempt": claim.attempt})
    if advice is not None:
        write_json(claim.folder.advice, advice)
    with recorded_outcome(claim, display, distributed), trackers.opened():
        yield
        # Before the outcome: nothing writes after it, so that nothing half written can stay.
        display.report({"phase": "done", "done": None, "total": None, "seconds_left": None})


def _prepare_data(
    claim: Claim, setup: RunSetup, run_changes: RunChanges, allow_changed: bool, display: Display
) -> tuple[PreparedDataset, bool, dict[str, int]]:
    """Check the images, compare with an earlier attempt, and record the split and the environment.

    Returns:
        The usable images, whether the data or the recipe changed since the last
        attempt (which the user has allowed), and the counts of :func:`check_seen`.
    """
    folder, recipe = claim.folder, setup.recipe
    found = run_changes.dataset
    display.note(f"finetune {__version__}: {recipe.to_dict()}")
    display.note(f"backbone {setup.backbone.card.name}: {setup.backbone.match}")
    for warning in found.warnings:
        display.warn(warning)
    changes = run_changes.find_changes(claim)
    accept(changes, claim, allow_changed, display)
    if changes:
        folder.split.unlink(missing_ok=True)
        folder.trunk.unlink(missing_ok=True)
    dataset = check_data(found, run_changes.checked, folder, display, recipe)
    warn_of_versions(claim, run_changes.environment, display)
    if not folder.split.exists():
        record_split(dataset, folder)
    write_json(folder.environment, run_changes.environment)
    display.say(f"data {recipe.data.path}: {describe_data(dataset)}")
    if dataset.value_range is not None and setup.backbone.card.preprocessing.is_rgb:
        low, high = dataset.value_range
        display.say(f"images of more than 8 bits: {low:g} becomes black and {high:g} white, in all of them")
    seen = check_seen(dataset, recipe, display)
    _show_plan(setup.plan, folder, display, recipe.strategy.features is not None)
    return dataset, bool(changes), seen


def _show_plan(plan: Plan, folder: RunFolder, display: Display, is_solved: bool) -> None:
    write_csv(folder.plan, [row.cells() for row in plan.rows], PLAN_COLUMNS)
    display.table(PLAN_COLUMNS, plan_cells(plan, is_solved), numbers=("parameters", "rate"))
    for line in plan.describe_phases():
        display.say(line)


def plan_cells(plan: Plan, is_solved: bool = False) -> list[list[str]]:
    """Return a plan as table cells to display; stages that are solved show ``solved`` instead of an lr."""
    return [
        [
            row.group,
            row.stage.name,
            f"{row.num_parameters:,}",
            "yes" if row.trained else "-",
            "solved" if is_solved and row.trained else f"{row.lr:g}",
            row.norm,
        ]
        for row in plan.rows
    ]


# --- the results ---------------------------------------------------------------------------------


def _write_results(
    context: FitContext, result: FitResult, seen: dict[str, int], peaks: list[dict[str, int]]
) -> dict[str, Any]:
    """Write metrics, model and report; return the content of ``metrics.json``.

    Args:
        context: the running attempt.
        result: the fitted network.
        seen: counts of :func:`check_seen`.
        peaks: peak memory of every rank when the fit ended.
    """
    setup, dataset, clock, folder = context.setup, context.dataset, context.clock, context.folder
    with clock.phase("evaluate"), context.display.busy("computing the metrics"):
        network = result.backbone.network
        check_predictions(network, result.predictions, result.images, result.precision, result.dtype)
        judge = JUDGES[dataset.target.kind]
        summary = judge.summarize(result.predictions, result.val, dataset.classes)
    metrics = collect_metrics(setup, dataset, summary, result.facts) | seen
    advice = RunReader(folder, tolerant=True).advice
    metrics["advice_gap"] = find_gap(advice, metrics.get("val_accuracy"), len(dataset.of("val")))
    images = dataset.evaluated(dataset.of(metrics["split"]))
    judge.write_tables(folder, images, summary.predictions, dataset.classes)
    with clock.phase("export"), context.display.busy("exporting the model"):
        card = describe_answers(result.backbone.card, summary)
        _export(replace(result.backbone, card=card), folder, metrics, result.images)
    metrics |= find_largest_peak([*peaks, measure_peak_memory(setup.placement.device)])
    metrics["seconds"] = clock.seconds | {"total": round(sum(clock.seconds.values()), 3)}
    write_json(folder.metrics, metrics)
    report_result(context.display, folder, metrics)
    judge_choice(folder, metrics, context.display)
    add_report(folder, context.display)
    if folder.report.exists():
        context.display.say(f"report {folder.report}")
    return metrics


def _export(backbone: Backbone, folder: RunFolder, metrics: dict[str, Any], images: Tensor) -> None:
    export_model(backbone, backbone.network, folder.model, metrics)
    difference = measure_round_trip(backbone.network, folder.model, images)
    if not difference <= ROUND_TRIP_TOLERANCE:  # also refuses NaN
        found = f"after loading, its probabilities differ by up to {difference:.2g}"
        fix = "Do not use it; please report this with the backbone's name."
        raise InternalError(f"exporting {folder.model}", found, fix)
