"""What was aimed for, and whether it was reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.cases import NETWORKS, SCALES, SECOND_EPOCHS, STRATEGIES, TOOLS
from benchmarks.results import OURS, Results, Spread, spread
from benchmarks.sections import epochs_of
from benchmarks.wording import number, span, times

PEERS = tuple(tool for tool in TOOLS if tool != OURS)
BYTES_PER_IMAGE = 2_000
"""What the table of samples may take for one image: path, label, digest."""
STRAIGHT = 1.15
"""Among 100,000 a further image may cost this many times as much as among 10,000."""


@dataclass(frozen=True)
class Row:
    """One goal.

    Attributes:
        goal: what was aimed for.
        wanted: the number.
        measured: what it is.
        met: whether it is reached; None where it was not measured.
    """

    goal: str
    wanted: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """One or two words."""
        return {True: "met", False: "**missed**", None: "not measured"}[self.met]


def summarize(results: Results) -> list[Row]:
    """Return all goals, with what was measured of each."""
    rows: list[Row] = []
    for network in NETWORKS:
        if network == "squeezenet" or any(epochs_of(results, strategy, network) for strategy in STRATEGIES):
            rows += judge_network(results, network)
    return [*rows, *judge_alone(results)]


def judge_network(results: Results, network: str) -> Iterator[Row]:
    """Yield the goals that compare whole commands."""
    for epochs, strategy, factor in ((20, "freeze", 10.0), (5, "freeze", 3.0), (20, "top", 3.0)):
        for peer in ("fastai", "plain"):
            ratio = results.ratios(f"{strategy}-{network}-{epochs}", peer)
            yield at_least(f"{strategy}, {epochs} epochs, {network}: faster than {peer}", ratio, factor)
    yield judge_accuracy(results, f"freeze-{network}-20")
    longest = max(epochs_of(results, "full", network), default=20)  # that was timed
    case = f"full-{network}-{longest}"
    slowest = [ratio for peer in PEERS if (ratio := results.ratios(case, peer))]
    nearest = min(slowest, key=lambda ratio: ratio.middle) if len(slowest) == len(PEERS) else None
    yield at_least(f"full, {longest} epochs, {network}: the fastest peer", nearest, 1.0)
    yield at_least(
        f"full, {longest} epochs, {network}: faster than plain", results.ratios(case, "plain"), 1.5
    )
    for strategy in ("freeze", "top"):
        yield judge_memory(results, f"{strategy}-{network}-20")


def at_least(goal: str, ratio: Spread | None, factor: float) -> Row:
    """Return the row of a ratio that should be large."""
    met = None if ratio is None else ratio.middle >= factor
    return Row(goal, f"at least {factor:g}x", times(ratio), met)


def at_most(goal: str, measured: float | None, limit: float, unit: str, words: str = "") -> Row:
    """Return the row of a figure that should be below a limit."""
    shown = "-" if measured is None else f"{number(measured)} {unit}{words}"
    return Row(goal, f"under {limit:g} {unit}", shown, None if measured is None else measured < limit)


def judge_accuracy(results: Results, case: str) -> Row:
    """Return whether ours is as accurate as fastai and the plain loop."""
    found = {tool: results.facts(case, tool, "accuracy") for tool in (OURS, "fastai", "plain")}
    shown = ", ".join(f"{tool} {value.middle:.3f}" for tool, value in found.items() if value)
    values = {tool: value.middle for tool, value in found.items() if value}
    met = None
    if len(values) == len(found):
        met = values[OURS] >= max(values["fastai"], values["plain"])
    return Row(f"{describe(case)}: accuracy", "no lower", shown or "-", met)


def judge_memory(results: Results, case: str) -> Row:
    """Return whether ours takes the least memory of all."""
    peaks = {tool: spread(result.peak_mb for result in results.of(case, tool)) for tool in TOOLS}
    shown = ", ".join(f"{tool} {value.middle:,.0f}" for tool, value in peaks.items() if value)
    met = None
    if (ours := peaks.pop(OURS)) and all(peaks.values()):
        met = ours.middle < min(value.middle for value in peaks.values() if value)
    return Row(f"{describe(case)}: peak memory, MB", "below every peer", shown or "-", met)


def describe(case: str) -> str:
    """Return ``freeze-squeezenet-20`` in words."""
    strategy, network, epochs = case.split("-")
    return f"{strategy}, {epochs} epochs, {network}"


def judge_alone(results: Results) -> Iterator[Row]:
    """Yield the goals that need no peer."""
    second = f"second-squeezenet-{SECOND_EPOCHS}"
    trained = results.facts(second, OURS, "seconds", "training")
    goal = f"second freeze run on the same folder, {SECOND_EPOCHS} epochs: training"
    yield at_most(goal, trained.high if trained else None, 3, "s", " (slowest)")
    for name in NETWORKS:
        over = results.facts(f"overhead-{name}", "bare", "over_loop")
        if over or name == "resnet18":
            share = 100 * over.middle if over else None
            yield at_most(f"our loop over a bare one, {name}, data in memory", share, 3, "%")
    shown = results.walls("startup", "finetune --help")
    yield at_most("`finetune --help`", shown.middle if shown else None, 0.4, "s")
    yield judge_first_step(results, second)
    yield from judge_scaling(results)


def judge_first_step(results: Results, second: str) -> Row:
    """Return the time to the end of the first epoch, which is later than that of the first step."""
    seen = [result.appeared for result in results.of(second, OURS) if result.appeared is not None]
    torch = results.walls("startup", "import torch")
    words = f" to the end of the first epoch; importing torch alone {span(torch)} s" if torch else ""
    return at_most("first training step of a cached run", median(seen) if seen else None, 6, "s", words)


def judge_scaling(results: Results) -> Iterator[Row]:
    """Yield whether seconds and bytes of a further image stay the same."""
    walls = [results.walls(f"scaling-{size}", OURS) for size in SCALES]
    peaks = [spread(r.peak_mb for r in results.of(f"scaling-{size}", OURS)) for size in SCALES]
    goal, wanted = "a further image among 100,000 costs as much as among 10,000", f"at most {STRAIGHT:g}x"
    if not all(walls) or not all(peaks):
        yield Row(goal, wanted, "-", None)
        yield Row("memory for a further image", f"under {BYTES_PER_IMAGE} bytes", "-", None)
        return
    small, middle, large = (wall.middle for wall in walls if wall)
    before, after = (middle - small) / (SCALES[1] - SCALES[0]), (large - middle) / (SCALES[2] - SCALES[1])
    shown = f"{after / before:.2f}x ({1e3 * before:.3f} and {1e3 * after:.3f} ms)"
    yield Row(goal, wanted, shown, after <= STRAIGHT * before)
    grown = [peak.middle for peak in peaks if peak]
    each = 1e6 * (grown[2] - grown[0]) / (SCALES[2] - SCALES[0])
    yield at_most("memory for a further image", each, BYTES_PER_IMAGE, "bytes")
