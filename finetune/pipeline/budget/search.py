"""The search: which candidate is measured next, and what is not started because it could not finish.

::

    probe    seconds of a step on a few images, for each view
    halve    cross-validated score on few training images; the better half of the views goes on with twice as
             many, until some have seen all (successive halving, arXiv:1502.07943)
    tune     the best view, trained on from its classifier, if that fits twice: on a part of the training
             images to judge it, and on all of them for the model
    rest     if it does not fit, further views on all images

Time for the model of the best candidate so far is always held back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from finetune.errors import FinetuneError, UsageError
from finetune.pipeline.budget.candidates import FINE_TUNED, Candidate, View
from finetune.pipeline.budget.ledger import Cost, Ledger, Trial
from finetune.system.progress_line import format_time

CAUTION = 1.2
"""Factor on measured costs before something is started: other work on the machine makes it slower."""
PROBE_SHARE = 0.2
"""Largest share of the budget in which steps are measured; the first view is always measured."""
FEWEST_IMAGES, FEWEST_A_CLASS = 64, 4
"""Fewest training images of the first comparison, if there are so many."""
SOLVE_SECONDS = 6e-3
"""Seconds for each training image to solve the final classifier; on two cores 5 to 10 ms were measured."""
FEWEST_EPOCHS = 3
"""Fewest epochs of a fine-tuning; shorter ones are not tried."""
NUM_FOLDS = 4
"""Parts of the training images, of which one judges a fine-tuning: three quarters train."""


class Measurer(Protocol):
    """Measures candidates on training images; each call takes its time."""

    def probe(self, view: View) -> Cost:
        """Return the seconds of a step on a few images.

        Raises:
            FinetuneError: the network cannot be loaded, or does not take images of this size.
        """

    def score(self, view: View, num_images: int) -> tuple[list[Trial], bool]:
        """Return the scored linear classifiers of a view, and whether all features were computed for them."""

    def time_step(self, view: View, strategy: str) -> float:
        """Return the seconds for each image of a training step."""

    def tune(self, candidate: Candidate) -> Trial:
        """Return the score of a fine-tuning, and of its classifier, on training images that are held out."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of images.

    Attributes:
        train: training images.
        searched: training images that the search may see, the most.
        judged: validation and test images.
        classes: number of classes.
        epochs: most epochs of a fine-tuning.
    """

    train: int
    searched: int
    judged: int
    classes: int
    epochs: int


class Search:
    """Looks for the best candidate within a budget.

    Args:
        measurer: measures candidates.
        ledger: what is known already, and where everything is kept.
        views: the backbones and input sizes, the best known first.
        sizes: numbers of images.
        budget: seconds of wall clock, over all attempts.
        overhead: seconds of the final run besides features and classifier: checks, export, report.
        began: time at which this attempt began, on the clock of ``now``.
        now: the clock.
        tell: shows a message.
    """

    def __init__(
        self,
        measurer: Measurer,
        ledger: Ledger,
        views: Sequence[View],
        sizes: Sizes,
        budget: float,
        overhead: float,
        began: float,
        now: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.measurer, self.ledger, self.views, self.sizes = measurer, ledger, views, sizes
        self.budget, self.overhead, self._began = budget, overhead, began
        self._now, self._tell = now, tell
        self._rungs = plan_rungs(len(views), sizes)

    @property
    def elapsed(self) -> float:
        """Seconds since the budget began, over all attempts."""
        return self.ledger.spent + self._now() - self._began

    def save(self) -> None:
        """Write the ledger."""
        self.ledger.save(self.elapsed)

    # --- costs -----------------------------------------------------------------------------------

    def finish(self, view: View, num_images: int) -> float:
        """Return the seconds of the final run with a view's classifier that was scored on some images."""
        cost, sizes = self.ledger.costs[view], self.sizes
        has_rows = num_images == sizes.train  # a part of the images has rows of its own
        rows = sizes.judged + (0 if has_rows else sizes.train)
        return self.overhead + 2 * cost.load + cost.image * rows + SOLVE_SECONDS * sizes.train

    def _needed(self, view: View, num_images: int) -> float:
        """Return the seconds to score a view, and to make its model or that of the best, with caution."""
        cost, best = self.ledger.costs[view], self.ledger.find_best()
        finish = self.finish(view, num_images)
        if best is not None:
            finish = max(finish, self.finish(best.candidate.view, best.num_images))
        return CAUTION * (cost.load + cost.image * num_images + finish)

    def _describe_left(self) -> str:
        return f"{format_time(max(0.0, self.budget - self.elapsed))} were left, the final model included"

    # --- linear classifiers ----------------------------------------------------------------------

    def probe(self) -> None:
        """Measure a step of each view, the smaller sizes first.

        Raises:
            UsageError: the budget is too small for the cheapest candidate.
            FinetuneError: no view can be measured.
        """
        fault: FinetuneError | None = None
        for view in reversed(self.views):
            if view in self.ledger.costs:
                continue
            if self.ledger.costs and self.elapsed > PROBE_SHARE * self.budget:
                self._skip(view, f"measuring steps took {PROBE_SHARE:.0%} of the budget")
                continue
            try:
                self.ledger.costs[view] = self.measurer.probe(view)
            except FinetuneError as error:
                fault = error
                self._skip(view, error.found)
        if not self.ledger.costs and fault is not None:
            raise fault
        self._check_budget()

    def _skip(self, view: View, reason: str) -> None:
        self.ledger.add(Trial(Candidate(view, "freeze", "last"), reason=reason))

    def _find_cheapest(self) -> View:
        return min(self.ledger.costs, key=lambda view: self._needed(view, self._rungs[0]))

    def _check_budget(self) -> None:
        cheapest = self._find_cheapest()
        needed = self.elapsed + self._needed(cheapest, self._rungs[0])
        if needed > self.budget and not self.ledger.solved:
            finish = format_time(CAUTION * self.finish(cheapest, self._rungs[0]))
            found = (
                f"the cheapest candidate ({cheapest.name}) takes about {format_time(needed)} here, of which "
                f"{finish} make and save its model"
            )
            fix = f"Give --budget {_round_up(needed)} or more, or a smaller --img-size."
            raise UsageError(f"--budget {self.ledger.recipe.budget}", found, fix)

    def run(self) -> Candidate:
        """Return the best candidate; :meth:`probe` comes first."""
        if not self.ledger.solved:
            self._score(self._find_cheapest(), self._rungs[0])  # the refusal has made room for it
        self._halve()
        tuned = self._tune()
        if tuned is None:
            self._use_rest()
        best = self._find_best()
        is_better = tuned is not None and tuned.lead > 0
        if tuned is not None and is_better and self.elapsed + self.reserve(tuned) <= self.budget:
            best = tuned
        self.ledger.chosen = best
        self.save()
        held = format_time(self.reserve(best))
        self._tell(f"chosen after {format_time(self.elapsed)}: {best.candidate.name}; its model takes {held}")
        return best.candidate

    def _find_best(self) -> Trial:
        best = self.ledger.find_best()
        assert best is not None  # one was scored before anything else
        return best

    def _halve(self) -> None:
        """Score the views on more and more images, and keep the better half."""
        views = sorted(self.ledger.costs, key=lambda view: self._needed(view, self._rungs[0]))
        for num_images in self._rungs:
            scored = {view: found for view in views if (found := self._find_or_score(view, num_images))}
            ranked = sorted(scored, key=lambda view: (-(scored[view].score or 0.0), view.rank))
            views = ranked[: math.ceil(len(ranked) / 2)]

    def _use_rest(self) -> None:
        """Score further views on all images while there is time, those with the best score so far first."""
        known = {one.candidate.view: one.score or 0.0 for one in self.ledger.solved}
        for view in sorted(
            self.ledger.costs, key=lambda view: (-known.get(view, 0.0), self.views.index(view))
        ):
            self._find_or_score(view, self.sizes.searched)

    def _find_or_score(self, view: View, num_images: int) -> Trial | None:
        """Return the score of a view; None if it cannot be measured in time."""
        if (known := self.ledger.find(view, num_images)) is not None:
            return known
        needed = self._needed(view, num_images)
        if self.elapsed + needed > self.budget:
            self._skip(
                view, f"{num_images:,} images and a model take {format_time(needed)}; {self._describe_left()}"
            )
            return None
        return self._score(view, num_images)

    def _score(self, view: View, num_images: int) -> Trial:
        began = self._now()
        trials, is_fresh = self.measurer.score(view, num_images)
        seconds = self._now() - began
        if is_fresh:
            self.ledger.costs[view] = replace(self.ledger.costs[view], image=seconds / num_images)
        for trial in trials:
            self.ledger.add(replace(trial, seconds=seconds, ended=self.elapsed))
        best = max(trials, key=lambda one: one.score or 0.0)
        self._say(best, f" on {num_images:,} images")
        self.save()
        return best

    def _say(self, trial: Trial, more: str) -> None:
        times = f"{format_time(self.elapsed)} of {format_time(self.budget)}"
        self._tell(f"  {times}: {trial.candidate.name}: {trial.score:.3f} ± {trial.error:.3f}{more}")

    # --- fine-tuning -----------------------------------------------------------------------------

    def _tune(self) -> Trial | None:
        """Return the measured fine-tuning of the best classifier; None if there is no time for one."""
        tuned = self.ledger.tuned
        if tuned is None and (candidate := self._plan_tuning(self._find_best())) is not None:
            began = self._now()
            tuned = self.measurer.tune(candidate)
            tuned = replace(tuned, seconds=self._now() - began, ended=self.elapsed)
            self.ledger.add(tuned)
            self._say(tuned, f", {tuned.lead:+.3f} against its classifier on the same images")
            self.save()
        return tuned

    def _plan_tuning(self, best: Trial) -> Candidate | None:
        """Return the dearest fine-tuning that can be trained twice, with its epochs; None if none can."""
        view, cost = best.candidate.view, self.ledger.costs[best.candidate.view]
        finish = self.finish(view, best.num_images)
        for strategy in FINE_TUNED:
            candidate = Candidate(view, strategy, "last", self.sizes.epochs)
            guess = 2 * cost.load + 2 * 16 * 3 * cost.image  # two steps of three forward passes
            if self.elapsed + CAUTION * (guess + finish) > self.budget:
                self._skip_tuning(candidate, "measuring its step does not fit")
                continue
            step = self.measurer.time_step(view, strategy)
            epochs = self._find_epochs(view, step, finish)
            if epochs >= FEWEST_EPOCHS:
                return replace(candidate, epochs=epochs)
            what = f"{FEWEST_EPOCHS} epochs, twice, at {1e3 * step:.3g} ms an image, do not fit"
            self._skip_tuning(candidate, what)
        return None

    def _skip_tuning(self, candidate: Candidate, what: str) -> None:
        self.ledger.add(Trial(candidate, reason=f"{what}; {self._describe_left()}"))

    def _find_epochs(self, view: View, step: float, finish: float) -> int:
        """Return the most epochs that can be trained twice: on a part to judge, and on all for the model."""
        cost, sizes = self.ledger.costs[view], self.sizes
        trained = sizes.train + sizes.searched * (NUM_FOLDS - 1) / NUM_FOLDS
        epoch = step * trained + cost.image * (sizes.searched / NUM_FOLDS + sizes.judged)
        # The features of the held-out part and of the rest, and a classifier on them, twice.
        once = 2 * cost.load + (cost.image + 2 * SOLVE_SECONDS) * sizes.searched
        left = (self.budget - self.elapsed) / CAUTION - finish - once
        return max(0, min(sizes.epochs, int(left / epoch)))

    def reserve(self, chosen: Trial) -> float:
        """Return the seconds that the final run of a candidate takes."""
        if chosen.candidate.strategy == "freeze":
            return self.finish(chosen.candidate.view, chosen.num_images)
        larger = self.sizes.train / self.sizes.searched * NUM_FOLDS / (NUM_FOLDS - 1)
        return self.finish(chosen.candidate.view, chosen.num_images) + chosen.seconds * larger


def plan_rungs(num_views: int, sizes: Sizes) -> list[int]:
    """Return the numbers of images of the comparisons, each twice the one before, the last all of them."""
    fewest = max(FEWEST_IMAGES, FEWEST_A_CLASS * sizes.classes)
    rungs = [sizes.searched]
    for _ in range(math.ceil(math.log2(max(num_views, 1)))):
        if rungs[0] // 2 < fewest:
            break
        rungs.insert(0, rungs[0] // 2)
    return rungs


def _round_up(seconds: float) -> str:
    """Return a duration that is not shorter, as ``--budget`` takes it."""
    return f"{math.ceil(seconds / 60)}m" if seconds > 120 else f"{math.ceil(seconds / 5) * 5}s"
