"""The main job: from a recipe to a finished run.

::

    recipe -> dataset -> backbone -> plan -> training -> figures -> exported model
              checked     loaded     shown   drawn       written    proved by loading it again
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune import __version__
from finetune.data.dataset import Dataset
from finetune.data.prepare import check_outside, describe_data, keep_split, record_split
from finetune.data.provenance import check_seen
from finetune.data.quality.usable import check_data
from finetune.errors import DataError, InternalError
from finetune.evaluation.summary import summarize, write_figures
from finetune.export.folder import export_model, measure_round_trip
from finetune.features.network import name_backbone, place_network
from finetune.job.help import share_work
from finetune.recipe import Recipe
from finetune.report.write_report import add_report
from finetune.run.advise import Advice
from finetune.run.auto import choose_strategy
from finetune.run.changes import WEIGHTS, RunChanges, accept, warn_of_versions
from finetune.run.context import Clock, Job, Work
from finetune.run.fit import fit_network
from finetune.run.results import check_figures, collect_metrics, say_result
from finetune.run.setup import Ready, check_asked, fit_batches, prepare
from finetune.runs.claim import Claim, claim_folder, create_folder, locked
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.runs.outcome import recorded_outcome, translated_errors
from finetune.runs.reader import RunReader
from finetune.strategies import AUTO, starts_random
from finetune.system.device import describe_environment, measure_peak_memory
from finetune.system.display import Display, SilentDisplay
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.signals import StopSignal
from finetune.tracking.trackers import Trackers, check_trackers
from finetune.training.checkpoint import CheckpointStore
from finetune.training.freeze import digest_weights
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
    """Fine-tune as a recipe says, and leave everything in a folder.

    Of several processes this is the main one; the others run :func:`finetune.job.help.help_run`.

    Args:
        recipe: its "auto" values are decided here, and saved.
        output: the run folder; by default ``runs/<time>-<backbone>-<strategy>``. A folder that holds this
            very run goes on where it stopped.
        display: what the user sees; nothing by default.
        allow_changed: go on with a run that began with another recipe, other images or other weights.
        distributed: the processes of the run.

    Returns:
        The run, finished.

    Raises:
        FinetuneError: every refusal and failure, with its exit code (docs/errors.md).
    """
    display = display or SilentDisplay()
    clock = Clock()
    check_trackers(recipe.tracking.to)
    with StopSignal() as stop, translated_errors(distributed=distributed):
        recipe, advice = _settle(recipe, output, display, clock)
        with clock.phase("load"):
            ready = prepare(recipe, display, distributed)
        path = output or default_output(ready.backbone.card.architecture, ready.recipe.strategy.name)
        ready = replace(ready, dataset=keep_split(ready.dataset, RunFolder(path), ready.recipe))
        if ready.placement.device.type == "cuda" and recipe.training.batch_size == "auto":
            ready = fit_batches(ready, RunFolder(path))
        check_outside(path, ready.dataset)
        create_folder(path)
        with locked(path):
            display.heartbeat.tell({"folder": str(path.absolute())})
            comparison = RunChanges(ready.dataset, _describe_environment(ready, distributed), display)
            with clock.phase("check"):
                claim = _claim(path, ready, comparison, allow_changed, display)
            trackers = Trackers(ready.recipe, claim.folder, display)
            job = Job(ready, claim, comparison, allow_changed, display, clock, stop, trackers, distributed)
            if claim.finished and (finished := _read_run(job)):
                share_work(None, distributed)
                return finished
            display.log_to(claim.folder.log)
            if advice is not None:
                write_json(claim.folder.advice, advice.to_dict())
            with recorded_outcome(claim, display, distributed), trackers.opened():
                finished = _carry_out(job)
                trackers.log_final(finished.metrics)
                return finished


def _settle(
    recipe: Recipe, output: Path | None, display: Display, clock: Clock
) -> tuple[Recipe, Advice | None]:
    """Return the recipe with a backbone and a strategy, and the advice where that chose it."""
    check_asked(recipe)
    recipe = name_backbone(recipe, output, display)
    if recipe.strategy.name != AUTO:
        return recipe, None
    with clock.phase("advise"):
        return choose_strategy(recipe, output, display)


def _claim(path: Path, ready: Ready, comparison: RunChanges, allow_changed: bool, display: Display) -> Claim:
    """Take the folder, unless it holds another run than this one."""

    def check(claim: Claim) -> None:
        if ready.recipe.strategy.features is None:
            _refuse_without_checkpoints(claim)
        changes = comparison.find_changes(claim)
        if not allow_changed:
            accept(changes, claim, False, display)

    claim = claim_folder(path, ready.recipe, allow_changed, check)
    if not claim.finished:
        display.heartbeat.tell({"attempt": claim.attempt})
    return claim


def _refuse_without_checkpoints(claim: Claim) -> None:
    """Refuse to make a finished run longer by training it all again."""
    if claim.was_finished and not CheckpointStore(claim.folder.checkpoints).names():
        found = "the checkpoints of the finished run are gone, and with them the way to make it longer"
        fix = "Bring them back, or train again with another --output."
        raise DataError(f"going on with {claim.folder.path}", found, fix)


def _describe_environment(ready: Ready, distributed: Distributed) -> dict[str, Any]:
    random = starts_random(ready.recipe.strategy.name)
    weights = None if random else digest_weights(ready.backbone.network, ready.plan)
    machine = describe_environment(ready.placement.device) | {"processes": distributed.size}
    return machine | {WEIGHTS: weights}


def default_output(architecture: str, strategy: str) -> Path:
    """Return ``runs/<time>-<backbone>-<strategy>``."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{architecture}-{strategy}"


def _read_run(job: Job) -> Run | None:
    """Return a finished run; nothing where it has changed since, and going on with that is allowed."""
    folder = job.folder
    if job.comparison.find_changes(job.claim):
        return None
    metrics = dict(RunReader(folder, tolerant=True).metrics)
    if not metrics:
        fix = "Start it again with another --output."
        raise DataError(f"--output {folder.path}", "its metrics.json is gone or damaged", fix)
    said = f"{folder.path} holds this run already, finished, with an accuracy of {metrics['accuracy']:.4f}"
    job.display.say(f"{said}; name another --output, or more --epochs, to train again")
    return Run(folder, metrics)


def _carry_out(job: Job) -> Run:
    ready, folder, display, clock = job.ready, job.folder, job.display, job.clock
    display.note(f"finetune {__version__}: {ready.recipe.to_dict()}")
    display.note(f"backbone {ready.backbone.card.name}: {ready.backbone.match}")
    with clock.phase("check"):
        dataset, changed = _take_data(job)
        seen = check_seen(dataset, job.comparison.checked.digests, ready.recipe, display)
    place_network(ready.backbone.network, ready.placement)
    _show_plan(ready.plan, folder, display, ready.recipe.strategy.features is not None)
    work = Work(
        ready,
        dataset,
        job.comparison.checked.digests,
        changed,
        job.claim,
        display,
        clock,
        job.stop,
        job.trackers.log_epochs,
        job.distributed,
    )
    share_work(work, job.distributed)
    result = fit_network(work)
    with clock.phase("evaluate"):
        network = result.backbone.network
        check_figures(network, result.predictions, result.images, result.precision, result.dtype)
        summary = summarize(result.predictions, result.val, dataset.classes)
    metrics = collect_metrics(ready, dataset, summary, result.facts) | seen
    write_figures(folder, dataset.of(metrics["split"]), summary.predictions, dataset.classes)
    with clock.phase("export"):
        card = replace(result.backbone.card, temperature=summary.temperature)
        _export(replace(result.backbone, card=card), folder, metrics, result.images)
    metrics |= measure_peak_memory(ready.placement.device)
    metrics["seconds"] = clock.seconds | {"total": round(sum(clock.seconds.values()), 3)}
    write_json(folder.metrics, metrics)
    say_result(display, folder, metrics)
    add_report(folder, display)
    return Run(folder, metrics)


def _take_data(job: Job) -> tuple[Dataset, bool]:
    """Check the images, compare everything with an earlier attempt, and record what this one works with.

    Returns:
        The usable images, and whether something is otherwise than it was, and allowed to be.
    """
    folder, display, comparison = job.folder, job.display, job.comparison
    for warning in job.ready.dataset.warnings:
        display.warn(warning)
    changes = comparison.find_changes(job.claim)
    accept(changes, job.claim, job.allow_changed, display)
    if changes:
        folder.split.unlink(missing_ok=True)
        folder.trunk.unlink(missing_ok=True)
    dataset = check_data(job.ready.dataset, comparison.checked, folder, display, job.ready.recipe)
    warn_of_versions(job.claim, comparison.environment, display)
    if not folder.split.exists():
        record_split(dataset, comparison.checked.digests, folder)
    write_json(folder.environment, comparison.environment)
    display.say(f"data {job.ready.recipe.data.path}: {describe_data(dataset)}")
    return dataset, bool(changes)


def _show_plan(plan: Plan, folder: RunFolder, display: Display, is_solved: bool) -> None:
    write_csv(folder.plan, [row.cells() for row in plan.rows], PLAN_COLUMNS)
    display.table(PLAN_COLUMNS, plan_cells(plan, is_solved), numbers=("parameters", "rate"))
    for line in plan.describe_phases():
        display.say(line)


def plan_cells(plan: Plan, is_solved: bool = False) -> list[list[str]]:
    """Return a plan as a table of text for people; what is solved to its optimum has no rate."""
    return [
        [
            row.group,
            row.stage.name,
            f"{row.num_parameters:,}",
            "yes" if row.trained else "-",
            "solved" if is_solved and row.trained else f"{row.rate:g}",
            row.norm,
        ]
        for row in plan.rows
    ]


def _export(backbone: Backbone, folder: RunFolder, metrics: dict[str, Any], images: Tensor) -> None:
    export_model(backbone, backbone.network, folder.model, metrics)
    difference = measure_round_trip(backbone.network, folder.model, images)
    if not difference <= ROUND_TRIP_TOLERANCE:  # so that NaN is refused as well
        found = f"loaded again, its probabilities differ by up to {difference:.2g}"
        fix = "Do not use it; please report this with the backbone's name."
        raise InternalError(f"exporting {folder.model}", found, fix)
