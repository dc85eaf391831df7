"""``advise.verify``: a brief training of the last stage against the linear classifier, by cross-validation.

Both train on cached features: the frozen trunk runs once over the training images, and every fold uses its
output. Full fine-tuning has no frozen trunk, so it cannot be tried this way and is not verified.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.data.prepare import draw_evenly, read_images
from finetune.data.scan import scan_images
from finetune.features.folds import draw_folds
from finetune.features.network import place_network
from finetune.features.rows import SubsetRows
from finetune.pipeline.batches import open_loaders
from finetune.pipeline.context import FitContext
from finetune.pipeline.rule import TOP, Decision, Evidence
from finetune.pipeline.setup import RunSetup, prepare
from finetune.recipe import Recipe
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.system.display import Display, SilentDisplay
from finetune.system.temporary import temporary_folder
from finetune.targets import METRIC_NAMES
from finetune.training.checkpoint import CheckpointStore
from finetune.training.freeze import digest_frozen
from finetune.training.state import find_score
from finetune.training.task import Task
from finetune.training.trainer import Trainer
from finetune.training.trunk import FeatureLoader
from pretrained.graph.cut_network import CutNetwork

NUM_FOLDS = 3
EPOCHS = 5
"""Epochs of the brief training. The last one counts; choosing the best would use the held-out images."""
MOST_IMAGES = 2_000
"""Largest number of training images, over all folds."""


def verify(
    recipe: Recipe,
    evidence: Evidence,
    decision: Decision,
    groups: Mapping[str, int],
    metric: str,
    display: Display,
) -> tuple[Decision, dict[str, float] | None]:
    """Return the decision for the better of its linear classifier and a briefly trained last stage.

    Args:
        recipe: recipe of the run.
        evidence: evidence that the decision was made from.
        decision: decision of the rule.
        groups: number of the group of each image, by path; the images of a group are held out together.
        metric: score by which training is measured.
        display: progress display.

    Returns:
        The decision, and the two scores by strategy; None if nothing could be tried.
    """
    if evidence.metric != metric:
        names = METRIC_NAMES[evidence.metric], METRIC_NAMES[metric]
        display.say(f"not verified: the classifier is measured by {names[0]}, and training by {names[1]}")
        return decision, None
    if decision.cell.name == "full":
        display.say("not verified: full fine-tuning cannot be tried on cached features")
        return decision, None
    trained = _try_top(recipe, groups, display)
    if trained is None:
        display.say("not verified: the network cannot be cut below its last stage")
        return decision, None
    solved = next(c for c in evidence.candidates if c.features == decision.features).score
    name = METRIC_NAMES[metric]
    reason = (
        f"verified: {name} {trained:.3f} of the last stage trained briefly, {solved:.3f} of the classifier"
    )
    if trained > solved:
        keys = {"name": "top", **TOP.keys, "probe_first": True, "floor": decision.features}
    else:
        keys = {"name": "freeze", "features": decision.features}
    decision = replace(decision, keys=keys, reasons=(*decision.reasons, reason))
    return decision, {"top": trained, "freeze": solved}


def _try_top(recipe: Recipe, groups: Mapping[str, int], display: Display) -> float | None:
    """Return the cross-validated score of a briefly trained last stage; None if it cannot be cut off."""
    changes = {
        "strategy": recipe.strategy.model_copy(update={"name": "top"}),
        "input": recipe.input.model_copy(update={"augmentation": "none"}),
        "training": recipe.training.model_copy(update={"epochs": EPOCHS}),
    }
    setup, found = prepare(recipe.model_copy(update=changes), display)
    network = place_network(setup.backbone.network, setup.placement)
    few = draw_evenly(read_images(recipe, found, display), MOST_IMAGES, recipe.seed)
    checked = scan_images(
        few, display, "checking images", is_subset=True, channels=setup.backbone.card.preprocessing.channels
    )
    dataset = few.prepared(checked.digests, checked.bad, few.value_range).readable
    setup = setup.with_value_range(few.value_range)
    with temporary_folder() as folder:
        context = FitContext(setup, dataset, Claim(RunFolder(folder)), display)
        with open_loaders(context, digest_frozen(network, setup.plan)) as loaders:
            whole = loaders.batches["train"]
            if not isinstance(whole, FeatureLoader) or loaders.cut_network is None:
                return None
            labels = whole.labels
            pretrained = copy.deepcopy(network.state_dict())
            strata = labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.int64)
            folds = draw_folds(strata, NUM_FOLDS, recipe.seed, _number(whole.samples, groups))
            scores, total = 0.0, int((folds >= 0).sum())
            with display.track("training briefly", int(folds.max()) + 1) as advance:
                for fold in range(int(folds.max()) + 1):
                    network.load_state_dict(pretrained)
                    train, held = _subset(whole, folds != fold, True), _subset(whole, folds == fold, False)
                    task = _task(setup, train, held, dataset.num_classes, loaders.cut_network)
                    scores += _train(setup, task, folder / str(fold)) * len(held.samples)
                    advance(1, "")
            return scores / max(total, 1)


def _number(samples: Sequence[Sample], groups: Mapping[str, int]) -> Tensor:
    """Return the group of each image, (N,) int64; an image that was not measured is alone."""
    alone = max(groups.values(), default=-1) + 1
    return torch.tensor([groups.get(sample.path, alone + i) for i, sample in enumerate(samples)])


def _subset(whole: FeatureLoader, chosen: Tensor, shuffle: bool) -> FeatureLoader:
    """Return a loader of the chosen rows (N,) bool of another."""
    indices = chosen.nonzero().flatten()
    return FeatureLoader(
        [SubsetRows(whole.views[0], indices)],
        [whole.samples[index] for index in indices.tolist()],
        whole.labels[indices],
        whole.target,
        batch_size=whole.batch_size,
        placement=whole.placement,
        seed=whole.seed,
        shuffle=shuffle,
    )


def _task(
    setup: RunSetup, train: FeatureLoader, held: FeatureLoader, num_classes: int, cut_network: CutNetwork
) -> Task:
    settings = setup.recipe.training
    loss = train.target.build_loss(
        train.labels, num_classes, settings.class_weights, settings.label_smoothing, settings.huber_delta
    )
    loss = loss.to(setup.placement.device)
    return Task(
        setup.backbone.network,
        setup.plan,
        loss,
        train,
        held,
        num_classes=num_classes,
        cut_network=cut_network,
    )


def _train(setup: RunSetup, task: Task, path: Path) -> float:
    """Return the score of the last epoch on the held-out images."""
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True)
    precision = setup.recipe.training.precision
    trainer = Trainer(
        task,
        setup.recipe.training,
        precision=precision,
        seed=setup.recipe.seed,
        folder=folder,
        store=CheckpointStore(folder.checkpoints, 1, lambda: None),
        display=SilentDisplay(),
    )
    trainer.standardize_head()
    row = trainer.fit().history[-1]
    return row[f"eval_{find_score(row)}"]
