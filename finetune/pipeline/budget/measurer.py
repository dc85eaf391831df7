"""Measure candidates on training images: features by the existing store, classifiers, a short fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from finetune.data.dataset import PreparedDataset, sample_order
from finetune.data.prepare import draw_evenly
from finetune.features.extraction import Features, open_features, open_source
from finetune.features.folds import draw_folds
from finetune.features.look_alikes import find_groups
from finetune.features.network import Network, open_network, place_network
from finetune.features.ridge import score_left_out
from finetune.features.rows import ConcatRows
from finetune.features.runtime import choose_runtime
from finetune.features.transferability import MOST_IMAGES
from finetune.pipeline.budget.candidates import Candidate, View
from finetune.pipeline.budget.ledger import Cost, Trial, apply_keys
from finetune.pipeline.budget.search import NUM_FOLDS
from finetune.pipeline.context import FitContext
from finetune.pipeline.fit import fit_network
from finetune.pipeline.linear_head import solve_head
from finetune.pipeline.setup import RunSetup, open_trial, prepare
from finetune.recipe import Recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.system.display import Display, SilentDisplay
from finetune.system.temporary import temporary_folder

PROBED = (2, 2, 16)
"""Images of the measured steps: the first is up to three times as slow, and the second says what any number
takes; at most three quarters of the third are taken for that."""
_MOST_OPEN = 4
"""Networks that stay in memory."""


class ImageMeasurer:
    """A :class:`finetune.pipeline.budget.search.Measurer` of real images.

    Args:
        recipe: what was asked for.
        dataset: the images that a run would use, with their final splits.
        display: shows progress.
    """

    def __init__(self, recipe: Recipe, dataset: PreparedDataset, display: Display) -> None:
        self.recipe, self.dataset, self.display = recipe, dataset, display
        self.searched = draw_evenly(dataset.readable, MOST_IMAGES, recipe.seed)
        self._load = lru_cache(_MOST_OPEN)(self._open_network)

    def probe(self, view: View) -> Cost:
        """Return the seconds of a step on a few images, whose features are computed afresh."""
        began = time.monotonic()
        self._load(view)
        loaded = time.monotonic()
        _, fixed, whole = (self._time_rows(view, number) for number in PROBED)
        return Cost(
            loaded - began + fixed,
            max(whole - fixed, whole / 4) / min(PROBED[-1], len(self.searched.samples)),
        )

    def _time_rows(self, view: View, num_images: int) -> float:
        """Return the seconds of features that are not cached."""
        began = time.monotonic()
        with temporary_folder() as folder, self._open_rows(view, num_images, FeatureCacheDir(folder=folder)):
            return time.monotonic() - began

    def score(self, view: View, num_images: int) -> tuple[list[Trial], bool]:
        """Return the leave-one-out scores of a view's classifiers, and whether all features were computed."""
        with self._open_rows(view, num_images) as features, self.display.busy(f"scoring {view.name}"):
            usable, labels, groups = self._label(features, num_images)
            read = {"last": features.rows[-1]}
            if len(features.rows) > 1 and not self._load(view).backbone.card.taps:
                read["all"] = ConcatRows(features.rows)  # a classifier on stages takes no others
            target, classes = self.dataset.target, self.dataset.num_classes
            device = self._load(view).placement.device
            trials = []
            for name, rows in read.items():
                hits = score_left_out(rows, usable, labels, classes, target, device, groups)
                trials.append(_to_trial(Candidate(view, "freeze", name), num_images, hits))
            return trials, features.kept.num_computed >= len(usable)

    def time_step(self, view: View, strategy: str) -> float:
        """Return the seconds for each image of a training step."""
        setup = self._prepare(Candidate(view, strategy, "last", 1))
        with self.display.busy("measuring a training step"):
            return open_trial(setup).time_step()

    def tune(self, candidate: Candidate) -> Trial:
        """Train from the classifier on, on three quarters of the images, and judge both on the others."""
        most = len(self.searched.samples)
        with self._open_rows(candidate.view, most) as features:
            usable, labels, groups = self._label(features, most)
        folds = draw_folds(labels, NUM_FOLDS, self.recipe.seed, groups)
        apart = self._hold_out([self.searched.samples[index].path for index in usable[folds == 0].tolist()])
        setup = self._prepare(candidate)
        with temporary_folder() as path, self.display.busy(f"training {candidate.name}"):
            folder = RunFolder(path)
            folder.checkpoints.mkdir()
            context = FitContext(setup, apart, Claim(folder), _quiet(self.display))
            solved = solve_head(context, "last").predictions["val"]
            tuned = fit_network(context).predictions
        score = self.dataset.target.score_each
        trial = _to_trial(candidate, most, score(tuned.logits, tuned.labels))
        return replace(trial, solved=score(solved.logits, solved.labels).mean().item())

    # --- the parts -------------------------------------------------------------------------------

    def _open_network(self, view: View) -> Network:
        with self.display.busy(f"loading {view.name}"):
            return open_network(apply_keys(self.recipe, view.keys), _quiet(self.display))

    @contextmanager
    def _open_rows(
        self, view: View, num_images: int, cache_dir: FeatureCacheDir | None = None
    ) -> Iterator[Features]:
        """Give the features of so many training images; those of all images are those of the final run."""
        network, recipe = self._load(view), apply_keys(self.recipe, view.keys)
        few = draw_evenly(self.searched, num_images, recipe.seed)
        if len(few.samples) == len(self.searched.samples):
            height, width = network.backbone.card.preprocessing.size
            pixels = len(self.dataset.samples) * height * width
            own, device = network.backbone.network, network.placement.device
            runtime = choose_runtime(recipe.runtime, own, device, "float32", pixels)
            recipe = recipe.model_copy(update={"runtime": runtime})
        source = open_source(recipe, network, few, self.display)
        layers = network.layers.all
        with open_features(source, layers, "auto", splits=("train",), cache_dir=cache_dir) as features:
            yield features

    def _label(self, features: Features, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images with features (N,), their labels (N,), and their groups of look-alikes (N,)."""
        samples = draw_evenly(self.searched, num_images, self.recipe.seed).samples
        usable = features.usable(samples)
        chosen = [samples[index] for index in usable.tolist()]
        labels = torch.tensor([sample.label for sample in chosen])
        return usable, labels, find_groups(features.rows[-1], usable, labels, [one.group for one in chosen])

    def _hold_out(self, paths: list[str]) -> PreparedDataset:
        """Return the searched images, of which these are the validation split."""
        held = frozenset(paths)
        apart = [
            replace(sample, split="val") if sample.path in held else sample
            for sample in self.searched.samples
        ]
        return replace(self.searched, samples=tuple(sorted(apart, key=sample_order)), unreadable=())

    def _prepare(self, candidate: Candidate) -> RunSetup:
        recipe = apply_keys(self.recipe, candidate.keys)
        with self.display.busy(f"loading {candidate.view.name}"):
            setup, _ = prepare(recipe, _quiet(self.display))
            place_network(setup.backbone.network, setup.placement)
        return setup.with_value_range(self.dataset.value_range)


def _quiet(display: Display) -> Display:
    """Return a display without messages, whose work counts as progress."""
    quiet = SilentDisplay()
    quiet.heartbeat = display.heartbeat
    return quiet


def _to_trial(candidate: Candidate, num_images: int, hits: Tensor) -> Trial:
    """Return the score of a candidate from whether it was right of each held-out image, (N,) float64."""
    error = hits.std(correction=0).item() / len(hits) ** 0.5
    return Trial(candidate, num_images, hits.mean().item(), error, len(hits))
