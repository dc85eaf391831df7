"""The first hour on a GPU, as a list: what to run, in which order, and what is expected of each.

Every item is a process of its own with a time limit, so that one which fails or hangs does not end the list.
Images are drawn, or scikit-learn's digits, and weights are random or come with the package, so that a bare
machine can do it. ``tests/gpu/README.md`` says the same list in commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.first_hour_items import ITEMS, Item, Trial
from benchmarks.harness import Bench
from benchmarks.machine import ROOT, describe_machine
from benchmarks.results import OURS, Result, Results
from benchmarks.text import table
from benchmarks.timing import ProcessFailedError, run_timed

QUICK_SECONDS = 600
"""Time limit of an item with the smallest sizes."""


def count_gpus() -> int:
    """Return the GPUs that torch sees, asked in another process: this one needs no CUDA context."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    return int(said.stdout)


def run_list(options: argparse.Namespace, names: Iterable[str]) -> list[Result]:
    """Run the items that are not done yet, print the table, and return the results in the order of the list.

    Args:
        options: ``device``, ``cache``, ``again``, and ``quick`` for the smallest sizes.
        names: names of items; empty for all.
    """
    chosen = [item for item in ITEMS if not names or item.name in names]
    path = options.cache / f"first-hour-{options.device.replace(':', '-')}{'-quick' * options.quick}.jsonl"
    if options.again:
        path.unlink(missing_ok=True)
    results, num_gpus = Results(path), 0 if options.device == "cpu" else count_gpus()
    results.begin(describe_machine(0, 0, options.quick))
    for item in chosen:
        if item.gpus <= num_gpus and not results.has(item.name, OURS, 0):
            began = time.perf_counter()
            result = run_item(item, options)
            results.add(result)
            seconds = time.perf_counter() - began
            sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {item.name}: {_judge(result)}, {seconds:.0f} s\n")
    found = {one.case: one for one in results.of_cases("")}
    rows = [_row(item, found.get(item.name), num_gpus) for item in chosen]
    sys.stdout.write("\n".join(table(("item", "result", "expected", "ok"), rows)) + "\n")
    return [found[item.name] for item in chosen if item.name in found]


def run_item(item: Item, options: argparse.Namespace) -> Result:
    """Run an item in a process of its own; an unexpected result counts as failed, so that it is run again."""
    place = options.cache / "work" / f"first-hour-{item.name}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    words = [sys.executable, "-m", "benchmarks.gpu", "--item", item.name, "--device", options.device]
    words += ["--cache", str(options.cache), *["--quick"] * options.quick]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    os.environ.update(hidden | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})
    limit = QUICK_SECONDS if options.quick else item.seconds
    try:
        _, said = run_timed(words, place, limit=limit)
    except ProcessFailedError as error:
        lines = str(error).splitlines()
        return Result(item.name, OURS, 0, {}, f"{lines[0][:60]} {lines[-1][:200]}".replace("|", "/"))
    outcome = json.loads(said.splitlines()[-1])
    shutil.rmtree(place)
    return Result(item.name, OURS, 0, outcome, "" if outcome["ok"] else outcome["result"])


def act(options: argparse.Namespace) -> None:
    """Run one item in this process, in this folder; the last line that it prints is the outcome as JSON."""
    (item,) = (item for item in ITEMS if item.name == options.item)
    bench = Bench(options.cache, options.cache, quick=options.quick, cuda=options.device != "cpu")
    result, ok = item.act(Trial(options.device, Path.cwd(), bench))
    sys.stdout.write("\n" + json.dumps({"result": result, "ok": bool(ok)}) + "\n")


def _row(item: Item, result: Result | None, num_gpus: int) -> list[str]:
    if item.gpus > num_gpus:
        return [item.name, f"needs {item.gpus} GPU{'s' * (item.gpus > 1)}", item.expected, "-"]
    if result is None:
        return [item.name, "not run", item.expected, "-"]
    return [item.name, result.failed or result.figures["result"], item.expected, _judge(result)]


def _judge(result: Result) -> str:
    return "FAIL" if result.failed else "ok"
