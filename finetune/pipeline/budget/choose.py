"""``--budget``: choose the recipe of a run by searching, and say afterwards what the choice is worth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.data.dataset import PreparedDataset
from finetune.data.prepare import check_outside, keep_split, require_classes
from finetune.data.quality.usable import find_usable
from finetune.data.scan import scan_images
from finetune.errors import UsageError
from finetune.evaluation.intervals import compute_wilson
from finetune.features.network import take_channels
from finetune.features.store import describe_images
from finetune.pipeline.budget.candidates import FINE_TUNED, find_views
from finetune.pipeline.budget.ledger import apply_keys, describe_asked, read_ledger
from finetune.pipeline.budget.measurer import ImageMeasurer
from finetune.pipeline.budget.search import Search, Sizes
from finetune.pipeline.run_inputs import find_run_images
from finetune.recipe import Recipe, StrategySettings
from finetune.recipe.validators import parse_duration
from finetune.runs.claim import check_name, create_folder, locked
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder, default_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader
from finetune.strategies import AUTO
from finetune.system.display import Display
from finetune.system.progress_line import format_time
from pretrained.preprocessing import IMAGE_CHANNELS

FIXED_SECONDS = 14.0
"""Seconds of a run that depend neither on the images nor on the network: start, checks, export, report."""
_DECIDED = ("features", "probe_first", "floor", "head_factor", "body_factor", "head")
"""Keys of the section ``strategy`` that the budget sets, or cannot be combined with."""


def choose_by_budget(recipe: Recipe, output: Path | None, display: Display) -> tuple[Recipe, Path]:
    """Return the recipe that a budget chose, and its run folder.

    A search that was interrupted goes on with what it had measured; one that has ended keeps its choice.

    Args:
        recipe: recipe with a budget.
        output: run folder; by default ``runs/<time>-budget``.
        display: shows progress.

    Raises:
        UsageError: the budget is too small, or keys are given that it sets.
        DataError: the labels are not one class an image, or the images cannot be used.
        FinetuneError: every other refusal and failure.
    """
    began = time.monotonic()
    _check_keys(recipe)
    path = output or default_folder("budget")
    check_name(path)
    folder = RunFolder(path)
    _check_same_search(folder, recipe)
    chosen = RunReader(folder, tolerant=True).budget.get("chosen")
    if isinstance(chosen, dict) and "strategy.name" in chosen:
        display.say(f"the search of {path} has ended, and keeps its choice")
        return apply_keys(recipe, chosen), path
    with translated_errors(str(path)):
        return _search(recipe, folder, began, display), path


def _check_keys(recipe: Recipe) -> None:
    """Refuse keys that the budget decides."""
    asked, strategy = f"--budget {recipe.budget}", recipe.strategy
    if strategy.name not in (StrategySettings().name, AUTO):
        found = f"it chooses the strategy itself, and --strategy {strategy.name} was given"
        raise UsageError(asked, found, "Drop one of the two.")
    for key in _DECIDED:
        if (value := getattr(strategy, key)) != getattr(StrategySettings(), key):
            found = "--budget sets this key itself"
            raise UsageError(f"strategy.{key}={value}", found, "Drop one of the two.")
    if recipe.backbone.weights and not recipe.backbone.name:
        found = "no backbone was named for these weights"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, "Add --backbone NAME.")


def _check_same_search(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse a folder that holds anything but this search."""
    before = RunReader(folder, tolerant=True).budget.get("asked")
    fix = "Name a new folder with --output, or give the earlier command again."
    if before is not None and before != describe_asked(recipe):
        raise UsageError(f"--output {folder.path}", "it holds a search with other settings", fix)
    if before is None and folder.recipe.exists():
        raise UsageError(f"--output {folder.path}", "it holds a run without a budget", fix)


# --- the search ----------------------------------------------------------------------------------


def _search(recipe: Recipe, folder: RunFolder, began: float, display: Display) -> Recipe:
    dataset = _read_images(recipe, folder, display)
    reading = time.monotonic() - began  # the final run reads and checks them again
    asked = take_channels(recipe, dataset)
    with display.busy("looking for weights on this machine"):
        views = find_views(asked)
    measurer = ImageMeasurer(asked, dataset, display)
    sizes = Sizes(
        train=len(dataset.of("train")),
        searched=len(measurer.searched.samples),
        judged=len(dataset.of("val")) + len(dataset.of("test")),
        classes=dataset.num_classes,
        epochs=asked.training.epochs,
    )
    images = describe_images([dataset.digests[sample.path] for sample in dataset.readable.of("train")])
    ledger = read_ledger(folder, recipe, str(images["images"]))
    budget, overhead = parse_duration(str(recipe.budget)), FIXED_SECONDS + reading
    search = Search(measurer, ledger, views, sizes, budget, overhead, began, tell=display.say)
    _tell_start(search, display)
    search.probe()
    create_folder(folder.path)
    with locked(folder.path):
        display.heartbeat.send({"folder": str(folder.path.absolute())})
        search.save()
        chosen = search.run()
    if left := sum(one.score is None for one in ledger.trials):
        display.say(f"not tried: {left} more candidates; {folder.budget_table} says why")
    return apply_keys(recipe, chosen.keys)


def _read_images(recipe: Recipe, folder: RunFolder, display: Display) -> PreparedDataset:
    """Read and check the images as a run does, so that the run refuses nothing after the search."""
    found = find_run_images(recipe, display)
    require_classes(found, recipe)
    check_outside(folder.path, found)
    found = keep_split(found, folder, recipe)
    asked = take_channels(recipe, found).input.channels
    channels = asked if isinstance(asked, int) else {"grey": 1}.get(asked, IMAGE_CHANNELS)
    checked = scan_images(found, display, "checking images", channels=channels)
    return find_usable(found, checked, folder, recipe, forget=True)


def _tell_start(search: Search, display: Display) -> None:
    ledger, backbones = search.ledger, {view.backbone for view in search.views}
    before = ""
    if ledger.solved:
        before = f"; {len(ledger.solved)} scores are known, {format_time(ledger.spent)} are spent"
    display.say(
        f"budget {ledger.recipe.budget}: {len(search.views)} inputs of {len(backbones)} backbones, and "
        f"{' or '.join(FINE_TUNED)} fine-tuning of the best{before}"
    )


# --- what the choice is worth --------------------------------------------------------------------


def judge_choice(folder: RunFolder, metrics: Mapping[str, Any], display: Display) -> None:
    """Write the accuracy on images that chose nothing beside the one that chose; without a budget do nothing.

    The score that chose is too good: the best of several is partly luck. Both go into ``budget.json`` as
    ``figures``.

    Raises:
        DiskError: the file cannot be written.
    """
    content = dict(RunReader(folder, tolerant=True).budget)
    best, trials = content.get("best"), content.get("candidates")
    if not isinstance(best, dict) or not isinstance(trials, list) or metrics["split_chose_checkpoint"]:
        return
    number, candidates = int(best["num_held"]), {_name(row) for row in trials if row["score"] is not None}
    first = {
        "accuracy": best["score"],
        "interval": list(compute_wilson(round(best["score"] * number), number)),
        "num_images": number,
        "num_candidates": len(candidates),
    }
    judged = {
        "accuracy": metrics["accuracy"],
        "interval": list(metrics["intervals"]["accuracy"]),
        "num_images": metrics["num_samples"],
        "split": metrics["split"],
    }
    write_json(folder.budget, content | {"figures": {"chose": first, "judged": judged}})
    display.say(
        f"budget: accuracy {_show(judged)} on {judged['num_images']:,} {judged['split']} images that chose "
        f"nothing; the {_show(first)} of {number:,} training images, left out, is the best of "
        f"{len(candidates)} candidates, and so partly luck"
    )


def _name(row: Mapping[str, Any]) -> str:
    return str([row[key] for key in ("backbone", "img_size", "strategy", "features")])


def _show(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['accuracy']:.3f} ({low:.3f} to {high:.3f})"
