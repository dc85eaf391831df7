"""How well ``--strategy auto`` chooses, with ImageNet backbones on data of other kinds.

Regret is what a strategy loses, in accuracy, to the fixed one that is best in hindsight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev

from benchmarks.accuracy import BACKBONES, Runs, average, collect, describe_backbone, plan_cases, train
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures, Results
from benchmarks.text import bold_best, table

AUTO = "auto"
STRATEGIES: dict[str, dict[str, object]] = {
    "freeze": {"strategy.name": "freeze"},
    "probe": {"strategy.name": "freeze", "strategy.features": "last"},
    "top": {"strategy.name": "top"},
    "full": {"strategy.name": "full"},
    AUTO: {"strategy.name": AUTO},
}
"""What is compared, with its keys of the recipe. All but ``auto`` are fixed."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each backbone, data set and number of images."""
    return plan_cases("strategies", STRATEGIES, bench)


def measure(turn: Turn) -> Figures:
    """Return what a strategy found."""
    return train(turn, describe_backbone(turn.case, turn.bench) | STRATEGIES[turn.tool])


def best_of_each(runs: Runs) -> list[float]:
    """Return the accuracy of the best fixed strategy, for each seed. That best is partly luck."""
    fixed = [some for tool, some in runs.items() if tool != AUTO]
    return [max(run["accuracy"] for run in seed) for seed in zip(*fixed, strict=True)]


def regrets(runs: Runs, tool: str) -> tuple[float, float]:
    """Return what a strategy loses to the fixed one of the best mean, and to the best of each seed."""
    means = average(runs)
    best = max(value for name, value in means.items() if name != AUTO)
    return best - means[tool], mean(best_of_each(runs)) - means[tool]


def standard_error(accuracy: float, number: int) -> float:
    """Return one standard error of a share of test images."""
    return float((accuracy * (1 - accuracy) / number) ** 0.5)


def write(results: Results) -> Iterator[str]:
    """Yield a section for each backbone."""
    for backbone, name in BACKBONES.items():
        yield f"### {name.partition('/')[2]}\n"
        yield from _write_backbone(collect(results, f"strategies-{backbone}"))
        yield ""


def _write_backbone(cases: Mapping[str, Runs]) -> Iterator[str]:
    """Yield the table, the cost, and the regret over all cases in which ``auto`` can be compared."""
    found = {case: runs for case, runs in cases.items() if AUTO in runs and len(runs) > 1}
    tools = [tool for tool in STRATEGIES if found and all(tool in runs for runs in found.values())]
    head = ["data set, images a class, epochs", "images", "seeds", "test images", "one s.e."]
    head += [*(f"`{tool}`" for tool in tools), "`auto` chose", "regret, means", "regret, each seed"]
    yield from table(head, (_row(case, runs, tools) for case, runs in found.items()))
    if not found:
        return
    seconds = [
        f"`{tool}` {mean(average(runs, 'cpu')[tool] for runs in found.values()):.0f}" for tool in tools
    ]
    yield f"\nProcessor seconds a run, mean: {', '.join(seconds)}.\n"
    yield f"Mean regret over {len(found)} rows, in points:\n"
    for tool in tools:
        pairs = zip(*(regrets(runs, tool) for runs in found.values()), strict=True)
        yield f"- {'' if tool == AUTO else 'always '}`{tool}`: {' and '.join(map(_with_error, pairs))}"
    yield f"\n{_count_hits(list(found.values()))}"


def _row(case: str, runs: Runs, tools: Sequence[str]) -> list[str]:
    means, some = average(runs), runs[AUTO][0]
    fixed = {tool: value for tool, value in means.items() if tool != AUTO}
    error = standard_error(max(fixed.values()), some["num_test"])
    cells = bold_best({tool: f"{100 * means[tool]:.1f}" for tool in tools}, fixed)
    counts = [f"{some['num_train']:,}", f"{len(runs[AUTO])}", f"{some['num_test']}", f"{100 * error:.1f}"]
    chosen = ", ".join(dict.fromkeys(run["strategy"] for run in runs[AUTO]))
    return [case, *counts, *cells.values(), chosen, *(f"{100 * value:+.1f}" for value in regrets(runs, AUTO))]


def _with_error(values: Sequence[float]) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * mean(values):.2f} ± {100 * error:.2f}"


def _count_hits(found: Sequence[Runs]) -> str:
    """Return how often ``auto`` was the best, and how often no test of this size could tell."""
    pairs = [pair for runs in found for pair in zip(runs[AUTO], best_of_each(runs), strict=True)]
    best = sum(run["accuracy"] >= highest for run, highest in pairs)
    close = sum(run["accuracy"] >= high - standard_error(high, run["num_test"]) for run, high in pairs)
    return (
        f"In {close} of {len(pairs)} runs `auto` was the best or within one standard error of that seed's "
        f"best fixed strategy; in {best} none was better."
    )


QUESTION = Question("strategies", plan, measure, write=write)
