"""Times every process of the chosen cases, in turns, and keeps each result at once."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Case, plan_turns
from benchmarks.results import Result, Results
from benchmarks.timing import Timed, run_timed
from benchmarks.tools import Shop, read_facts


def run_suite(cases: Sequence[Case], shop: Shop, results: Results, repeats: int) -> None:
    """Time what is not there yet; a process that fails is noted, and the next one is started."""
    for case in cases:
        turns = [turn for turn in plan_turns(case, repeats) if not results.has(case.name, turn[1], turn[0])]
        if not turns:
            say(f"{case.name}: all there")
            continue
        warm_up(case, shop)
        for repeat, tool in turns:
            result = run_one(case, tool, repeat, shop)
            results.add(result)
            say(describe(result))
        for leftover in shop.work.glob(f"{case.name}-*"):
            shutil.rmtree(leftover)


def run_one(case: Case, tool: str, repeat: int, shop: Shop) -> Result:
    """Run one process in an empty folder, which is gone afterwards."""
    place = shop.place(case, tool, repeat)
    shutil.rmtree(place, ignore_errors=True)
    timed = run_timed(shop.command(case, tool, repeat))
    try:
        return to_result(case, tool, repeat, place, timed)
    finally:
        shutil.rmtree(place)


def to_result(case: Case, tool: str, repeat: int, place: Path, timed: Timed) -> Result:
    """Return the result of a process that has ended."""
    failed, facts = "", {}
    if timed.code == 0:
        facts = read_facts(case, tool, place, timed)
        if facts.get("attempt", 1) > 1:  # our supervisor started it again: its time is that of two
            failed = f"it took {facts['attempt']} attempts"
    else:
        last = "\n".join(timed.stderr.strip().splitlines()[-5:])
        failed = f"exit status {timed.code}: {last}"
    return Result(
        case=case.name,
        tool=tool,
        repeat=repeat,
        wall=round(timed.wall, 4),
        cpu=round(timed.cpu, 3),
        peak_mb=round(timed.peak_mb, 1),
        rss_mb=round(timed.rss_mb, 1),
        appeared=timed.appeared,
        facts=facts,
        failed=failed,
    )


def warm_up(case: Case, shop: Shop) -> None:
    """Fill the cache for a case of a second run, and run each tool of the start-up case once, untimed.

    The first start after an installation compiles and reads everything.
    """
    if case.kind == "second":
        first = shop.warm_up(case)
        if not (first.folder / "out" / "metrics.json").exists():
            timed = run_timed(first)
            say(f"{case.name}: the first run {'FAILED ' + timed.stderr if timed.code else 'is done'}")
    if case.kind == "startup":
        for tool in case.tools:
            run_one(case, tool, 0, shop)


def describe(result: Result) -> str:
    """Return a line for people."""
    figures = f"{result.wall:8.2f} s  {result.peak_mb:6.0f} MB"
    accuracy = "" if result.accuracy is None else f"  accuracy {result.accuracy:.3f}"
    failed = f"  FAILED {result.failed}" if result.failed else ""
    return f"{result.case:24} {result.tool:16} {result.repeat}  {figures}{accuracy}{failed}"


def say(line: str) -> None:
    """Print a line with the time of day, to stderr."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {line}\n")
