"""``finetune run --dry-run``: what a run would train, cache, need and take. Nothing is trained or written.

Times are those of a forward pass, a training step and the decoding of a few images, which are measured, times
their numbers in the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from finetune.data.dataset import SPLITS, Dataset
from finetune.data.decode import BadImageError
from finetune.data.prepare import check_outside, describe_data
from finetune.data.transforms import build_train_transform
from finetune.features.network import place_network
from finetune.features.store import row_bytes
from finetune.pipeline.batches import count_rows, find_lack_of_room
from finetune.pipeline.context import Clock
from finetune.pipeline.run import default_output, plan_cells, resolve_strategy
from finetune.pipeline.setup import RunSetup, fit_batches, open_trial, prepare
from finetune.recipe import Recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.folder import RunFolder
from finetune.system.device import available_cores
from finetune.system.display import Display
from finetune.system.forward import time_forward
from finetune.system.memory import measure_peak_memory
from finetune.system.progress_line import format_time
from finetune.training.checkpoint import NUM_KEPT
from finetune.training.plan import PLAN_COLUMNS
from finetune.training.trunk import CutChoice, choose_cut, find_reason_against
from pretrained.graph.layers import Layers

_NUM_DECODED = 16
"""Images whose decoding is timed."""
_STATES = {"sgd": 1, "adamw": 2}
"""Numbers that an optimizer keeps for each trained one."""


def dry_run(recipe: Recipe, output: Path | None, display: Display) -> dict[str, Any]:
    """Show what a run would do, in one process, and return the same as plain JSON.

    With ``strategy.name: auto`` the images are measured for the advice, and the features are cached.

    Args:
        recipe: recipe of the run.
        output: run folder, if one was named; it is not created.
        display: shows the plan.

    Raises:
        FinetuneError: any refusal of the run itself before it claims its folder.
    """
    recipe, _ = resolve_strategy(recipe, output, display, Clock())
    setup, found = prepare(recipe, display)
    output = output or default_output(setup)
    check_outside(output, found)
    if setup.placement.device.type == "cuda" and recipe.training.batch_size == "auto":
        setup = fit_batches(setup, RunFolder(output))
    place_network(setup.backbone.network, setup.placement).eval()
    with display.busy("measuring a training step"):
        choice, costs = _choose(setup, found), _measure(setup, found)
    rows, each = _count_rows(setup, found, choice)
    facts = {
        "backbone": setup.backbone.card.name,
        "output": str(output),
        "recipe": setup.recipe.to_dict(),
        "num_images": {split: len(found.of(split)) for split in SPLITS},
        "plan": [dict(zip(PLAN_COLUMNS, row.cells(), strict=True)) for row in setup.plan.rows],
        "cut": choice.cut_network.cut.name if choice.cut_network else None,
        "trunk": choice.reason,
        "num_cached_rows": rows,
        "cached_bytes": rows * each,
        "run_folder_bytes": _estimate_folder(setup),
        "measured_seconds": costs,
        "seconds": _estimate(setup, found, choice, costs),
        **measure_peak_memory(setup.placement.device),
    }
    _show(setup, found, facts, display)
    return facts


def _choose(setup: RunSetup, found: Dataset) -> CutChoice:
    """Return where the run would cut the network."""
    recipe = setup.recipe
    if recipe.strategy.features is not None:
        return CutChoice(None, "")
    reason = find_reason_against(recipe, setup.plan)
    if reason is not None:
        return CutChoice(None, reason)
    return choose_cut(
        setup.backbone.network,
        setup.plan,
        setup.backbone.card.preprocessing.input_size,
        setup.placement,
        precision=recipe.training.precision,
        find_obstacle=partial(find_lack_of_room, recipe, found, FeatureCacheDir(recipe.cache.max_gb * 1e9)),
    )


def _count_rows(setup: RunSetup, found: Dataset, choice: CutChoice) -> tuple[int, int]:
    """Return how many rows of features would be cached, and the bytes of each."""
    recipe = setup.recipe
    if choice.cut_network is not None:
        return count_rows(recipe, found), row_bytes(choice.cut_network.packing.numel, recipe.cache.dtype)
    if (wanted := recipe.strategy.features) is None:
        return 0, 0
    card = setup.backbone.card
    layers = Layers(setup.backbone.network.eval(), setup.backbone.stages, card.preprocessing.input_size)
    chosen = layers.all if wanted in ("best", "all") else layers.select([wanted])
    return len(found.samples), sum(row_bytes(layer.num_features("auto"), "float32") for layer in chosen)


def _estimate_folder(setup: RunSetup) -> int:
    """Return the most bytes of the model and, where it is trained by epochs, of what is kept of them."""
    recipe, trained = setup.recipe, setup.plan.num_trained
    model = sum(row.num_parameters for row in setup.plan.rows)
    if recipe.strategy.features is not None:
        return 4 * model
    averaged = 1 if recipe.training.ema_decay is not None else 0
    state = (1 + _STATES[recipe.training.optimizer] + averaged) * trained
    best = (1 + averaged) * trained
    kept = trained * sum(number <= recipe.training.epochs for number in recipe.training.keep_epochs)
    return 4 * (model + NUM_KEPT * (2 * state + best) + kept)  # now, at the start of the epoch, and the best


# --- time ----------------------------------------------------------------------------------------


def _measure(setup: RunSetup, found: Dataset) -> dict[str, float]:
    """Return the seconds of one image in a forward pass, in a training step, and to decode."""
    card, placement = setup.backbone.card, setup.placement
    size = card.preprocessing.input_size
    costs = {"forward": time_forward(setup.backbone.network, size, placement.device, placement.channels_last)}
    if setup.recipe.strategy.features is None:
        costs["step"] = open_trial(setup).time_step()
    return costs | {"decode": _time_decoding(setup, found)}


def _time_decoding(setup: RunSetup, found: Dataset) -> float:
    """Return the seconds to decode an image, with every core decoding."""
    transform = build_train_transform(setup.backbone.card.preprocessing, setup.recipe.input.augmentation)
    samples = found.of("train")[:: max(1, len(found.of("train")) // _NUM_DECODED)][:_NUM_DECODED]
    began = time.perf_counter()
    for sample in samples:
        with suppress(BadImageError):
            transform(transform.open(found.file(sample)))
    return (time.perf_counter() - began) / len(samples) / available_cores()


def _estimate(
    setup: RunSetup, found: Dataset, choice: CutChoice, costs: Mapping[str, float]
) -> dict[str, float]:
    """Return the seconds of each phase; decoding goes on beside the others where cores are free."""
    recipe = setup.recipe
    train, val, images = (len(part) for part in (found.of("train"), found.of("val"), found.samples))
    epochs, forward = recipe.training.epochs, costs["forward"]
    passes = 1 if recipe.cache.pictures or choice.cut_network or recipe.strategy.features else epochs
    seconds = {"decode": passes * images * costs["decode"]}
    if recipe.strategy.features is not None:
        return seconds | {"features": images * forward}
    share = choice.cut_network.cut.share if choice.cut_network is not None else 0.0
    if choice.cut_network is not None:
        seconds["trunk"] = count_rows(setup.recipe, found) * share * forward
    rest = max(0.0, costs["step"] - share * forward)
    return seconds | {"train": epochs * train * rest, "validate": epochs * val * (1 - share) * forward}


# --- what is shown -------------------------------------------------------------------------------


def _show(setup: RunSetup, found: Dataset, facts: Mapping[str, Any], display: Display) -> None:
    is_solved = setup.recipe.strategy.features is not None
    display.say(f"data {setup.recipe.data.path}: {describe_data(found)}")
    display.table(PLAN_COLUMNS, plan_cells(setup.plan, is_solved), numbers=("parameters", "rate"))
    for line in setup.plan.describe_phases():
        display.say(line)
    if facts["trunk"]:
        display.say(f"trunk: {facts['trunk']}")
    if facts["num_cached_rows"]:
        rows, total = facts["num_cached_rows"], facts["cached_bytes"]
        where = FeatureCacheDir().folder
        display.say(f"cache: {rows:,} rows of features, {total / 1e6:,.0f} MB, in {where}")
    display.say(f"run folder: {facts['output']}, up to about {facts['run_folder_bytes'] / 1e6:,.0f} MB")
    display.say(_describe_memory(facts))
    display.say(_describe_time(facts))
    display.say("nothing was trained: this was --dry-run")


def _describe_memory(facts: Mapping[str, Any]) -> str:
    batch = facts["recipe"]["training"]["batch_size"]
    gpu = facts.get("peak_gpu_memory_reserved_bytes")
    on_gpu = f" and {gpu / 1e9:.1f} GB of the GPU" if gpu is not None else ""
    return f"memory: {facts['peak_memory_bytes'] / 1e9:.1f} GB{on_gpu}, measured here (batches of {batch})"


def _describe_time(facts: Mapping[str, Any]) -> str:
    phases = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in facts["seconds"].items())
    costs = ", ".join(f"{1e3 * value:.3g} ms {name}" for name, value in facts["measured_seconds"].items())
    total = format_time(sum(facts["seconds"].values()))
    return f"time: about {total} ({phases}; measured for one image: {costs}), and seconds to check and report"
