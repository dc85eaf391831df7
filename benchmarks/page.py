"""From a file of results to ``docs/benchmarks.md`` and its plot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import sections
from benchmarks.cases import NETWORKS, STRATEGIES, TOOLS
from benchmarks.goals import summarize
from benchmarks.results import Results
from benchmarks.wording import table

PLOT = Path(__file__).with_name("plot.py")
INTRODUCTION = """\
Made by `python -m benchmarks run`, never by hand. Whole processes, from the first byte of the command to its
last, with the same files, weights, epochs, batch size and image size, in turns (A B C D A B C D) on one
machine. Figures are medians, with the smallest and the largest in brackets; ratios are of processes that ran
one after the other. Times are in seconds, memory in MB of 10^6 bytes.
"""
QUICK = (
    "**A quick run: smaller cases than the headings say, each timed once. It shows that everything works.**\n"
)


def write_page(results: Results, path: Path, python: Path | None) -> None:
    """Write the page, and the plot beside it where the peers' environment is there.

    Raises:
        ValueError: there are no results.
    """
    if not results.cases():
        raise ValueError(f"{results.path} holds no results; `python -m benchmarks run` makes some")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot = path.with_suffix(".png")
    drawn = draw(results, plot, python)
    path.write_text("\n".join(build_page(results, plot.name if drawn else None)), encoding="utf-8")


def build_page(results: Results, plot: str | None = None) -> list[str]:
    """Return the lines of the page.

    Args:
        results: what was measured.
        plot: file name of the plot; None leaves it out.
    """
    quick = [QUICK] if any(machine.get("quick") for machine in results.machines) else []
    return [
        "# Benchmarks\n",
        *quick,
        INTRODUCTION,
        *describe_machines(results.machines),
        "## Goals\n",
        *table(
            ("goal", "wanted", "measured", ""),
            ((row.goal, row.wanted, row.measured, row.verdict) for row in summarize(results)),
        ),
        "## Whole commands\n",
        *([f"![Seconds of whole commands against epochs]({plot})\n"] if plot else []),
        *sections.commands(results),
        *sections.limits(results),
        *sections.pipeline(results),
        *sections.overhead(results),
        *sections.startup(results),
        *sections.extraction(results),
        *sections.scaling(results),
        *sections.gpu(results),
        *sections.failures(results),
        sections.DIFFERENCES,
    ]


def describe_machines(machines: list[dict[str, Any]]) -> list[str]:
    """Return what the results were taken on, and when; the file holds one machine's only."""
    if not machines:
        return []
    last, first = machines[-1], machines[0]
    dates = dict.fromkeys((first["when"], last["when"]))
    revisions = dict.fromkeys(machine["revision"] for machine in machines)
    names = ("python", "torch", "torchvision", "timm", "fastai", "pillow", "numpy")
    rows = [
        ("processor", f"{last['processor']}, {last['cores']} cores, {last['memory_gb']} GB of memory"),
        ("GPU", last.get("gpu") or "none"),
        ("system", last["system"]),
        ("versions", ", ".join(f"{name} {last[name]}" for name in names if name in last)),
        ("finetune", f"{last['finetune']}, revision {', '.join(revisions)}"),
        ("every tool", f"{last['threads']} threads, {last['workers']} decoding processes"),
        ("date", " to ".join(dates)),
    ]
    return table(("", ""), rows)


def collect_panels(results: Results) -> Iterator[dict[str, Any]]:
    """Yield one panel a network and strategy, with one line a tool."""
    for network in NETWORKS:
        for strategy in STRATEGIES:
            lines = []
            for tool in TOOLS:
                points = []
                for epochs in sections.epochs_of(results, strategy, network):
                    if wall := results.walls(f"{strategy}-{network}-{epochs}", tool):
                        points.append((epochs, *wall))
                if points:
                    lines.append({"tool": tool, "points": points})
            if lines:
                yield {"network": network, "strategy": strategy, "lines": lines}


def draw(results: Results, path: Path, python: Path | None) -> bool:
    """Draw cost against epochs; false where there is nothing to draw, or nothing to draw with."""
    panels = list(collect_panels(results))
    if python is None or not panels:
        return False
    words = [str(python), str(PLOT), str(path)]
    said = subprocess.run(  # noqa: S603 - fixed words
        words, input=json.dumps(panels), capture_output=True, text=True, check=False
    )
    if said.returncode:
        sys.stderr.write(f"the plot was not drawn: {said.stderr}\n")
    return said.returncode == 0
