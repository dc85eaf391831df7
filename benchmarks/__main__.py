"""Measure what a question needs, and print its table.

    python -m benchmarks NAME [NAME ...] [--quick] [--only PATTERN,PATTERN] [--page docs/benchmarks.md]

Every measurement is kept at once in a file of results, and the same command goes on after what is there.
``speed`` stands for all questions of docs/benchmarks.md, and ``networks`` for those of docs/networks.md; the
names are those of the files.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

from benchmarks.harness import Bench, Case, Question, run
from benchmarks.machine import CACHE, ROOT, count_cores, describe_machine
from benchmarks.page import fill_page, write_section
from benchmarks.peers_env import PeersEnvironmentError, build_environment, read_versions
from benchmarks.results import DifferentMachineError, Results

SPEED = ("startup", "limits", "pipeline", "overhead", "extract", "gpu", "scaling", "commands")
NETWORKS = ("depth", "modules", "source")
NAMES = (
    *SPEED,
    "predict",
    "safety",
    "draft",
    "strategies",
    "layers",
    "runtimes",
    "transfer",
    "planted",
    "shortcuts",
    "forecast",
    "service",
    "time_to_accuracy",
    "several_labels",
    "budget",
    *NETWORKS,
)
GROUPS = {"speed": SPEED, "networks": NETWORKS}


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with every default filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"names: {', '.join((*NAMES, *GROUPS))}"
    parser.add_argument("names", nargs="+", choices=(*NAMES, *GROUPS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, once: to see that it works")
    parser.add_argument("--only", default="*", help="names or patterns of cases, separated by commas")
    parser.add_argument("--show", action="store_true", help="print what the file holds, measure nothing")
    parser.add_argument("--repeats", type=int, help="turns of each case (seeds), 3 by default")
    parser.add_argument("--again", action="store_true", help="start over instead of going on")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="original images")
    parser.add_argument("--cache", type=Path, default=CACHE, help="images, environment, results")
    parser.add_argument("--results", type=Path, help="file of results; by default in the cache")
    parser.add_argument("--page", type=Path, help="put the tables into this page of docs")
    parser.add_argument("--threads", type=int, default=count_cores(), help="of every tool")
    parser.add_argument("--workers", type=int, default=max(1, count_cores() // 2), help="of every tool")
    options = parser.parse_args(words)
    options.cache = options.cache.absolute()
    options.results = options.results or options.cache / ("quick.jsonl" if options.quick else "results.jsonl")
    options.repeats = options.repeats or (1 if options.quick else 3)
    every = [GROUPS.get(name, (name,)) for name in options.names]
    options.names = list(dict.fromkeys(name for some in every for name in some))
    return options


def plan(questions: list[Question], bench: Bench, patterns: str) -> list[tuple[Question, Case]]:
    """Return the cases whose names match one of the patterns.

    Raises:
        ValueError: a pattern matches nothing.
    """
    cases = [(question, case) for question in questions for case in question.plan(bench)]
    for word in patterns.split(","):
        if cases and not any(fnmatch(case.name, word) for _, case in cases):
            raise ValueError(
                f"no case is called {word}; there are {', '.join(case.name for _, case in cases)}"
            )
    return [pair for pair in cases if any(fnmatch(pair[1].name, word) for word in patterns.split(","))]


def measure(options: argparse.Namespace, questions: list[Question]) -> None:
    """Measure the cases that are asked for and not in the file yet."""
    machine = describe_machine(options.threads, options.workers, options.quick)
    source, cuda = options.data.absolute(), machine["gpu"] is not None
    bench = Bench(source, options.cache, options.threads, options.workers, options.quick, cuda)
    cases = plan(questions, bench, options.only)
    if {"commands", "extract", "time_to_accuracy", "several_labels", "budget"} & set(options.names):
        machine["fastai"] = read_versions(build_environment(bench.peers_folder))["fastai"]
    if options.again:
        options.results.unlink(missing_ok=True)
    results = Results(options.results)
    results.begin(machine)
    for question, case in cases:
        run(question, case, bench, results, options.repeats)


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    options = read_arguments(words)
    questions: list[Question] = [import_module(f"benchmarks.{name}").QUESTION for name in options.names]
    try:
        if not options.show:
            measure(options, questions)
        results = Results(options.results)
        if options.page:
            fill_page(questions, results, options.page)
        else:
            for question in questions:
                sys.stdout.write(
                    "\n".join(["", f"# {question.name}", "", *write_section(question, results), ""])
                )
    except (ValueError, DifferentMachineError, PeersEnvironmentError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
