"""The search of ``--budget``, with scripted measurements on a scripted clock."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from finetune.errors import EnvironmentFaultError, ExitCode, UsageError
from finetune.pipeline.budget.candidates import Candidate, View
from finetune.pipeline.budget.ledger import COLUMNS, Cost, Trial, read_ledger
from finetune.pipeline.budget.search import CAUTION, Search, Sizes, plan_rungs
from finetune.recipe import Recipe, load_recipe
from finetune.runs.folder import RunFolder

SMALL, MIDDLE, LARGE, HUGE = (View("net", size) for size in (64, 96, 128, 192))
VIEWS = (HUGE, LARGE, MIDDLE, SMALL)
SIZES = Sizes(train=400, searched=400, judged=100, classes=2, epochs=10)
COSTS = {SMALL: 0.01, MIDDLE: 0.02, LARGE: 0.04, HUGE: 0.08}
SCORES = {SMALL: 0.7, MIDDLE: 0.9, LARGE: 0.8, HUGE: 0.95}
OVERHEAD = 10.0


class KilledError(Exception):
    """The process ends here."""


@dataclass
class Scripted:
    """Measurements that cost what a script says, on a clock that only they move."""

    costs: Mapping[View, float] = field(default_factory=lambda: COSTS)
    scores: Mapping[View, float] = field(default_factory=lambda: SCORES)
    step: float = 0.05
    tuned: float = 0.97
    clock: float = 0.0
    calls: list[tuple[object, ...]] = field(default_factory=list)
    most_calls: int = 1000

    def _note(self, *call: object) -> None:
        if len(self.calls) == self.most_calls:
            raise KilledError
        self.calls.append(call)

    def probe(self, view: View) -> Cost:
        self._note("probe", view)
        self.clock += 0.5
        return Cost(0.5, self.costs[view])

    def score(self, view: View, num_images: int) -> tuple[list[Trial], bool]:
        self._note("score", view, num_images)
        self.clock += self.costs[view] * num_images
        score = self.scores[view]
        found = {"last": score, "all": score - 0.1}
        return [
            Trial(Candidate(view, "freeze", name), num_images, one, 0.01, 9) for name, one in found.items()
        ], True

    def time_step(self, view: View, strategy: str) -> float:
        self._note("step", view, strategy)
        self.clock += 1.0
        return self.step / (4 if strategy == "top" else 1)

    def tune(self, candidate: Candidate) -> Trial:
        self._note("tune", candidate.view, candidate.strategy, candidate.epochs)
        self.clock += self.step * 300 * candidate.epochs
        return Trial(candidate, 400, self.tuned, 0.01, 100, solved=0.9)


def recipe_of(budget: str = "90s") -> Recipe:
    return load_recipe(None, {"data.path": "/data", "budget": budget, "backbone.name": "net"})


def open_search(path: Path, script: Scripted, budget: float, sizes: Sizes = SIZES) -> Search:
    ledger = read_ledger(RunFolder(path), recipe_of(), "images")
    now = script.clock
    return Search(script, ledger, VIEWS, sizes, budget, OVERHEAD, now, lambda: script.clock)


def search(path: Path, script: Scripted, budget: float, sizes: Sizes = SIZES) -> Candidate:
    one = open_search(path, script, budget, sizes)
    one.probe()
    path.mkdir(exist_ok=True)
    return one.run()


def read(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((path / "budget.json").read_text())
    return content


def test_each_comparison_has_twice_the_images() -> None:
    assert plan_rungs(4, SIZES) == [100, 200, 400]
    assert plan_rungs(1, SIZES) == [400]
    assert plan_rungs(100, SIZES) == [100, 200, 400]  # 50 would be too few
    assert plan_rungs(4, Sizes(400, 400, 0, 60, 10)) == [400]  # 200 have less than four a class


def test_the_better_half_goes_on(tmp_path: Path) -> None:
    """With time for everything the highest score wins, and only the best half sees more images."""
    script = Scripted(step=1e9)
    assert search(tmp_path, script, 600.0) == Candidate(HUGE, "freeze", "last")
    scored = [call[1:] for call in script.calls if call[0] == "score"]
    first = {(view, 100) for view in VIEWS}
    assert set(scored[:4]) == first and scored[4:7] == [(HUGE, 200), (MIDDLE, 200), (HUGE, 400)]
    # No fine-tuning fits, so that the rest of the time goes to the others, in the order of their scores.
    assert scored[7:] == [(MIDDLE, 400), (LARGE, 400), (SMALL, 400)]


@pytest.mark.parametrize("budget", [27.0, 40.0, 60.0, 90.0, 150.0, 300.0, 1000.0])
@pytest.mark.parametrize("slower", [1.0, 1.19])
def test_the_model_is_finished_in_time(tmp_path: Path, budget: float, slower: float) -> None:
    """Whatever the budget, the search leaves the time that the final run takes."""
    script = Scripted()
    one = open_search(tmp_path, script, budget)
    one.probe()
    script.costs = {view: slower * cost for view, cost in COSTS.items()}
    script.step *= slower
    chosen = one.run()
    own = [trial for trial in one.ledger.trials if trial.candidate == chosen and trial.score]
    most = max(own, key=lambda trial: trial.num_images)
    assert one.elapsed + one.reserve(most) <= budget
    if budget == 1000:
        assert chosen.strategy == "full"


def test_a_view_that_cannot_finish_is_not_started(tmp_path: Path) -> None:
    script = Scripted(costs=COSTS | {HUGE: 1.0}, step=1e9)
    assert search(tmp_path, script, 90.0).view == MIDDLE
    assert ("score", HUGE, 100) not in script.calls
    rows = list(csv.DictReader((tmp_path / "budget.csv").open()))
    reasons = [row["reason"] for row in rows if row["img_size"] == "192"]
    assert len(reasons) == 1 and "take" in reasons[0] and "left" in reasons[0]
    assert tuple(rows[0]) == COLUMNS


def test_a_budget_that_is_too_small_says_what_would_do(tmp_path: Path) -> None:
    needed = 4 * 0.5 + CAUTION * (0.5 + 1 + 100 * 0.01 + OVERHEAD + 500 * 0.01 + 400 * 6e-3)
    with pytest.raises(UsageError) as caught:
        search(tmp_path, Scripted(), needed - 0.5)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "net at 64 px" in caught.value.found and "0:26" in caught.value.found
    assert "--budget 30s or more" in caught.value.fix
    assert list(tmp_path.iterdir()) == []  # nothing was left behind
    assert search(tmp_path, Scripted(), needed + 0.5).view == SMALL


def test_networks_that_cannot_be_measured_are_left_out(tmp_path: Path) -> None:
    class Refusing(Scripted):
        def probe(self, view: View) -> Cost:
            if view != MIDDLE:
                raise EnvironmentFaultError("net", "it does not take this size", "Take another.")
            return super().probe(view)

    assert search(tmp_path, Refusing(step=1e9), 90.0).view == MIDDLE
    nothing = RefusingAll()
    with pytest.raises(EnvironmentFaultError, match="does not take this size"):
        search(tmp_path / "other", nothing, 90.0)


class RefusingAll(Scripted):
    def probe(self, view: View) -> Cost:
        raise EnvironmentFaultError("net", "it does not take this size", "Take another.")


# --- fine-tuning ---------------------------------------------------------------------------------


def test_fine_tuning_is_chosen_where_it_is_better(tmp_path: Path) -> None:
    script = Scripted()
    chosen = search(tmp_path / "better", script, 1000.0)
    assert (chosen.view, chosen.strategy, chosen.epochs) == (HUGE, "full", 10)
    worse = Scripted(tuned=0.9)  # no better than the classifier on the same images
    assert search(tmp_path / "worse", worse, 1000.0) == Candidate(HUGE, "freeze", "last")
    assert ("tune", HUGE, "full", 10) in worse.calls


def test_fewer_epochs_or_stages_are_trained_in_less_time(tmp_path: Path) -> None:
    found = {
        budget: search(tmp_path / f"{budget}", Scripted(), budget) for budget in (200.0, 250.0, 350.0, 500.0)
    }
    assert [one.strategy for one in found.values()] == ["freeze", "top", "full", "full"]
    epochs = [one.epochs for one in found.values()]
    assert epochs[0] == 0 and epochs[1] >= 3 and 3 <= epochs[2] < epochs[3] < SIZES.epochs


def test_the_figure_that_chose_is_that_of_the_choice(tmp_path: Path) -> None:
    search(tmp_path, Scripted(), 1000.0)
    content = read(tmp_path)
    assert content["best"]["strategy"] == "full" and content["best"]["score"] == 0.97  # type: ignore[index]
    assert content["chosen"]["strategy.name"] == "full"  # type: ignore[index]
    assert content["chosen"]["training.monitor"] == "last"  # type: ignore[index]


# --- kill and resume -----------------------------------------------------------------------------


def test_a_kill_leaves_the_best_so_far_and_the_search_goes_on(tmp_path: Path) -> None:
    """Killed before each measurement in turn, the search ends with the choice of one that was not."""
    whole = Scripted()
    chosen = search(tmp_path / "whole", whole, 1000.0)
    for number in range(5, len(whole.calls)):
        path = tmp_path / str(number)
        script = Scripted(most_calls=number)
        with pytest.raises(KilledError):
            search(path, script, 1000.0)
        best = load_recipe(str(path / "best.yaml"))
        assert best.budget is None and best.strategy.name == "freeze"
        spent = float(str(read(path)["spent_seconds"]))
        again = Scripted(clock=5000.0)
        assert search(path, again, 1000.0) == chosen
        scored = {call for call in script.calls if call[0] in ("score", "tune")}
        assert not scored & set(again.calls)  # nothing is measured twice
        assert {call for call in whole.calls if call[0] in ("score", "tune")} <= scored | set(again.calls)
        assert float(str(read(path)["spent_seconds"])) > spent > 0


def test_the_time_of_earlier_attempts_counts(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        search(tmp_path, Scripted(most_calls=8), 90.0)
    content = read(tmp_path)
    content["spent_seconds"] = 89.0
    (tmp_path / "budget.json").write_text(json.dumps(content))
    script = Scripted()
    chosen = search(tmp_path, script, 90.0)
    assert chosen.view == HUGE and script.calls == []


def test_a_ledger_of_other_images_or_a_damaged_one_starts_over(tmp_path: Path) -> None:
    search(tmp_path, Scripted(), 90.0)
    assert read_ledger(RunFolder(tmp_path), recipe_of(), "images").solved
    assert not read_ledger(RunFolder(tmp_path), recipe_of(), "others").solved
    for damage in ({"candidates": 3}, {"costs": [{}]}, {"spent_seconds": None}):
        (tmp_path / "budget.json").write_text(json.dumps(read(tmp_path) | damage))
        assert not read_ledger(RunFolder(tmp_path), recipe_of(), "images").trials
