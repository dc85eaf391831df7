"""The benchmark suite.

    python -m benchmarks run [--quick] [--cases freeze-squeezenet-20,second-*]
    python -m benchmarks page
    python -m benchmarks list

Every timed process is kept at once in a file of results; the same command goes on after what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.cases import expand, pick
from benchmarks.data import Store
from benchmarks.machine import ROOT, count_cores, describe_machine
from benchmarks.page import write_page
from benchmarks.peers_env import PeersEnvironmentError, build_environment, find_python, read_versions
from benchmarks.results import DifferentMachineError, Results
from benchmarks.suite import run_suite
from benchmarks.tools import Shop


def default_cache() -> Path:
    """Return where images, the peers' environment and results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-benchmarks"


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with every default filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("run", "page", "list"))
    parser.add_argument("--quick", action="store_true", help="small cases, once: to see that it works")
    parser.add_argument("--cases", help="names or patterns, parted by commas; all by default")
    parser.add_argument("--repeats", type=int, help="turns of each case, 3 by default")
    parser.add_argument("--again", action="store_true", help="start over instead of going on")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of originals"
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="images, environment, results")
    parser.add_argument("--results", type=Path, help="file of results; by default in the cache")
    parser.add_argument("--page", type=Path, help="page to write, docs/benchmarks.md by default")
    parser.add_argument("--threads", type=int, default=count_cores(), help="of every tool")
    parser.add_argument("--workers", type=int, default=max(1, count_cores() // 2), help="of every tool")
    options = parser.parse_args(words)
    name = "quick" if options.quick else "results"
    options.cache = options.cache.absolute()
    options.results = options.results or options.cache / f"{name}.jsonl"
    options.page = options.page or (
        options.cache / "quick.md" if options.quick else ROOT / "docs/benchmarks.md"
    )
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


def run(options: argparse.Namespace) -> None:
    """Time the cases."""
    python = build_environment(options.cache / "env")
    machine = describe_machine(options.threads, options.workers, options.quick)
    machine["fastai"] = read_versions(python)["fastai"]
    cases = pick(expand(options.quick, machine["gpu"] is not None), options.cases)
    if options.again:
        options.results.unlink(missing_ok=True)
    results = Results(options.results)
    results.begin(machine)
    store = Store(options.data.absolute(), options.cache / "pictures", options.quick)
    work = options.cache / "work"
    shop = Shop(store, python, work, options.threads, options.workers, options.quick)
    run_suite(cases, shop, results, options.repeats)


def main() -> int:
    """Carry out the command."""
    options = read_arguments()
    try:
        if options.command == "list":
            names = [case.name for case in pick(expand(options.quick, cuda=True), options.cases)]
            sys.stdout.write("\n".join(names) + "\n")
            return 0
        if options.command == "run":
            run(options)
        write_page(Results(options.results), options.page, find_python(options.cache / "env"))
    except (ValueError, DifferentMachineError, PeersEnvironmentError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stderr.write(f"{options.page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
