"""Everything that is decided before the output folder is taken: most refusals leave nothing behind."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.loader import Placement
from finetune.data.samples import check_sample, is_sample
from finetune.data.split import SplitConfig
from finetune.errors import EnvironmentFaultError, UsageError
from finetune.features.network import fetch, place_network, prepare_machine, resolve_preprocessing
from finetune.recipe import Facts, Recipe, compute_batch_size, resolve_recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.strategies import AUTO, find_strategy, join_names, starts_random
from finetune.system.device import (
    find_lack_of_shared_memory,
    resolve_most_workers,
    resolve_precision,
    resolve_workers,
    seed_everything,
)
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.training.batch_size import fit_batch_size
from finetune.training.plan import Plan, build_plan
from pretrained.backbone import Backbone, load_backbone
from pretrained.bundle import find_bundled
from pretrained.catalog import Card, find_card
from pretrained.graph.layers import Layers
from pretrained.network import is_convolutional


@dataclass(frozen=True)
class Ready:
    """Everything that is decided before the output folder is taken.

    Attributes:
        recipe: without any "auto".
        dataset: that was found.
        backbone: with its weights.
        placement: device and layout of images.
        plan: what learns, and how fast.
        most_workers: decoding processes that there may be where their number was left to the program.
        source_card: of the backbone as it was published.
    """

    recipe: Recipe
    dataset: Dataset
    backbone: Backbone
    placement: Placement
    plan: Plan
    most_workers: int
    source_card: Card


def prepare(recipe: Recipe, display: Display, distributed: Distributed = SINGLE_PROCESS) -> Ready:
    """Find data and backbone, load the weights, and decide every "auto"."""
    name, data = str(recipe.backbone.name), recipe.data.path
    device = prepare_machine(recipe, distributed)
    with display.count(f"reading {data}") as tell:
        dataset = discover(Path(data or ""), SplitConfig.of(recipe), recipe.data.follow_links, tell)
    card = find_card(name, recipe.backbone.offline)
    if not starts_random(recipe.strategy.name) and not recipe.backbone.weights:
        fetch(card, recipe.backbone.offline, display)
    with display.busy(f"loading {name}"):
        card = card.with_input(resolve_preprocessing(recipe, card))
        backbone = _load_backbone(recipe, card, dataset)
    display.say(f"backbone {backbone.card.name}: {backbone.match}")
    if backbone.match.missing:
        display.warn(f"{len(backbone.match.missing)} tensors of the backbone stay random")
    _check_features(recipe, backbone)
    num_train = len(dataset.of("train"))
    facts = Facts(
        device=str(device),
        precision=resolve_precision(device),
        channels_last=is_convolutional(backbone.network),
        workers=resolve_workers(
            device, _batch_bytes(recipe, num_train, card, distributed), distributed.machine.size
        ),
        num_train=num_train,
        preprocessing=card.preprocessing.to_dict(),
    )
    resolved = resolve_recipe(_with_absolute_paths(recipe), facts)
    placement = Placement(device, bool(resolved.training.channels_last))
    plan = _plan(resolved, backbone)
    batch_bytes, processes = _batch_bytes(resolved, num_train, card, distributed), distributed.machine.size
    asked = None if recipe.data.workers == "auto" else recipe.data.workers
    if lack := find_lack_of_shared_memory(asked, device, batch_bytes, processes):
        display.warn(lack)
    most_workers = resolve_most_workers(batch_bytes, processes) if asked is None else 0
    _check_batch_norm(resolved, device, distributed)
    return Ready(resolved, dataset, backbone, placement, plan, most_workers, card)


def prepare_help(
    recipe: Recipe, dataset: Dataset, card: Card, most_workers: int, distributed: Distributed
) -> Ready:
    """Return what the main process has prepared, for another one; the weights are random as yet.

    Args:
        recipe: without any "auto".
        dataset: the usable images.
        card: of the backbone, as it was published.
        most_workers: of :class:`Ready`.
        distributed: the processes.
    """
    device = prepare_machine(recipe, distributed)
    seed_everything(recipe.seed, "head")
    sized = card.with_input(resolve_preprocessing(recipe, card))
    backbone = load_backbone(
        sized,
        classes=dataset.classes,
        head=recipe.strategy.head,
        dropout=recipe.strategy.dropout,
        offline=True,
        pretrained=False,
    )
    placement = Placement(device, bool(recipe.training.channels_last))
    return Ready(recipe, dataset, backbone, placement, _plan(recipe, backbone), most_workers, card)


def fit_batches(ready: Ready, folder: RunFolder) -> Ready:
    """Halve the batch size until a step fits on the device; an earlier attempt's choice stays.

    What else runs on a GPU changes, and the run must not.
    """
    size = _read_batch_size(folder)
    if size is None:
        wanted = ready.recipe.training.batch_size
        assert wanted != "auto"
        input_size = ready.backbone.card.preprocessing.input_size
        network = place_network(ready.backbone.network, ready.placement)
        size = fit_batch_size(network, ready.plan, input_size, ready.placement, wanted)
    training = ready.recipe.training.model_copy(update={"batch_size": size})
    return replace(ready, recipe=ready.recipe.model_copy(update={"training": training}))


def _read_batch_size(folder: RunFolder) -> int | None:
    before = RunReader(folder, tolerant=True).recipe  # the claim refuses a damaged one
    size = before.training.batch_size if before is not None else None
    return size if isinstance(size, int) else None


def _batch_bytes(recipe: Recipe, num_train: int, card: Card, distributed: Distributed) -> int:
    """Bytes of one process's part of a batch of images, in uint8."""
    asked = recipe.training.batch_size
    batch_size = compute_batch_size(num_train) if asked == "auto" else asked
    return math.ceil(batch_size / distributed.size) * math.prod(card.preprocessing.input_size)


def _check_batch_norm(recipe: Recipe, device: torch.device, distributed: Distributed) -> None:
    asked = "training.sync_batch_norm=true"
    if not recipe.training.sync_batch_norm or distributed.size == 1:
        return
    if device.type != "cuda":
        found = "torch synchronises BatchNorm between GPUs only"
        raise EnvironmentFaultError(asked, found, "Leave it out, or use --gpus.")
    if recipe.training.microbatch:
        found = "training.microbatch may give processes different numbers of parts, which wait for each other"
        raise UsageError(asked, found, "Drop one of the two.")


def _plan(recipe: Recipe, backbone: Backbone) -> Plan:
    rate = recipe.training.lr
    assert not isinstance(rate, str)
    return build_plan(backbone.network, backbone.stages, recipe.strategy, rate, recipe.training.epochs)


def check_asked(recipe: Recipe) -> None:
    """Refuse what cannot be meant, before anything is looked for.

    Raises:
        UsageError: no data were named, or keys exclude each other.
    """
    if not recipe.data.path:
        raise UsageError("finetune run", "no data was named", "Add --data FOLDER, or --data sample:digits.")
    if is_sample(recipe.data.path):
        check_sample(recipe.data.path)
    if recipe.backbone.weights and starts_random(recipe.strategy.name):
        found = f"--strategy {recipe.strategy.name} starts from random weights"
        raise UsageError(f"--weights {recipe.backbone.weights}", found, "Drop one of the two.")
    if recipe.strategy.name != AUTO:  # which has rules of its own (run/auto.py)
        _check_strategy(recipe)


def _check_strategy(recipe: Recipe) -> None:
    """Refuse keys that belong to another strategy, instead of passing over them."""
    strategy = recipe.strategy
    kind = find_strategy(strategy.name)
    if strategy.features is not None and not kind.solvable:
        found = f"--strategy {strategy.name} trains the stages that these features come from"
        fix = f"Take --strategy {join_names(accept=lambda one: one.solvable)}."
        raise UsageError(f"strategy.features={strategy.features}", found, fix)
    if strategy.features is not None and strategy.head == "keep":
        found = "a classifier that is kept is not solved anew"
        raise UsageError(f"strategy.features={strategy.features}", found, "Drop one of the two.")
    given = {"probe_first": strategy.probe_first, "floor": strategy.floor}
    for key, value in given.items():
        if value and not kind.fine_tunes:
            found = f"--strategy {strategy.name} fine-tunes no pretrained stage"
            fix = f"Take --strategy {join_names(accept=lambda one: one.fine_tunes)}."
            raise UsageError(f"strategy.{key}={value}", found, fix)


def _load_backbone(recipe: Recipe, card: Card, dataset: Dataset) -> Backbone:
    seed_everything(recipe.seed, "head")
    return load_backbone(
        card,
        classes=dataset.classes,
        head=recipe.strategy.head,
        dropout=recipe.strategy.dropout,
        weights=recipe.backbone.weights,
        offline=recipe.backbone.offline,
        pretrained=not starts_random(recipe.strategy.name),
    )


def _check_features(recipe: Recipe, backbone: Backbone) -> None:
    """Refuse features that no linear classifier can be put on, before the output folder is taken."""
    strategy = recipe.strategy
    for key, name in (("features", strategy.features), ("floor", strategy.floor)):
        if name is None or name == "last":
            continue
        if backbone.card.taps:
            found = "the backbone is itself a classifier on stages"
            raise UsageError(
                f"strategy.{key}={name}", found, "Take last, or the backbone that it was made from."
            )
        if name in ("best", "all"):
            continue
        layers = Layers(backbone.network.eval(), backbone.stages, backbone.card.preprocessing.input_size)
        try:
            chosen = layers.select([name])
        except UsageError as error:
            raise UsageError(f"strategy.{key}={name}", error.found, error.fix) from None
        if any(layers.reads_head(layer) for layer in chosen):
            found = "it is the classifier, or holds it"
            raise UsageError(f"strategy.{key}={name}", found, "Take last, or a layer before it.")


def reload_backbone(ready: Ready, dataset: Dataset) -> Backbone:
    """Return the backbone as it was before training."""
    return _load_backbone(ready.recipe, ready.source_card, dataset)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the saved recipe mean the same from any folder."""
    name, weights, data = recipe.backbone.name, recipe.backbone.weights, recipe.data.path
    backbone = {
        "name": _absolute_name(name),
        "weights": _absolute(weights) if weights else None,
    }
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "data": recipe.data.model_copy(update={"path": _absolute_data(data or "")}),
        }
    )


def _absolute(path: str) -> str:
    """Without ``..``, and with links as the user knows them."""
    return os.path.abspath(path)  # noqa: PTH100 - Path.resolve follows links


def _absolute_data(path: str) -> str:
    return path if is_sample(path) else _absolute(path)


def _absolute_name(name: str | None) -> str | None:
    if name and name.startswith("local-dir:"):
        return f"local-dir:{_absolute(name.removeprefix('local-dir:'))}"
    is_folder = bool(name) and find_bundled(str(name)) is None and Path(str(name)).is_dir()
    return _absolute(str(name)) if is_folder else name
