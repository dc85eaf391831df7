"""Kill real runs at random moments until enough kills have hit, and compare every result bit for bit.

    python -m tests.faults.random_kills --kills 200 --output kills

Each trial runs one of three recipes from the command line, under its parent process as users run it, and
ends it again and again: SIGKILL to the parent (both die), to the working process alone (the parent starts
it again), or SIGTERM (a checkpoint inside an epoch). The same command then goes on, each time with another
number of decoding processes. One line a trial goes to ``trials.jsonl``; started again, it counts on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import draw_folder, make_tiny
from tests.faults.results import assert_same_run, fault_of

RECIPES: dict[str, list[str]] = {
    "freeze": ["-s", "freeze", "--set", "training.optimizer=adamw", "--set", "training.patience=6"],
    "top": ["-s", "top", "--set", "training.schedule=plateau", "--set", "input.augmentation=medium"],
    "full": [
        *("-s", "full", "--set", "training.mixup=0.3", "--set", "training.cutmix=1.0"),
        *("--set", "training.ema_decay=0.95", "--set", "strategy.dropout=0.2"),
        *("--set", "strategy.norm=train"),
        *("--set", "input.augmentation=heavy", "--set", "training.patience=6"),
    ],
}
SIGNALS = {"all": 9, "worker": 9, "stop": 15}
WEIGHTS = (5, 3, 2)


class Trials:
    """Runs, kills and comparisons in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.data, self.tiny = folder / "data", folder / "tiny"
        if not self.tiny.is_dir():
            draw_folder(self.data, {"red": 100, "blue": 100})
            make_tiny(self.tiny)
        self.seconds: dict[str, float] = {}

    def start(self, recipe: str, output: Path, workers: int) -> subprocess.Popen[bytes]:
        words = ["run", "-b", str(self.tiny), "-d", str(self.data), "-o", str(output), "--epochs", "20"]
        words += ["--batch-size", "8", "--workers", str(workers), *RECIPES[recipe]]
        with (self.folder / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "finetune", *words],
                stderr=said,
                stdout=said,
                env=os.environ
                | {"FINETUNE_STALL_TIMEOUT": "120", "OMP_NUM_THREADS": "1"}
                | {"XDG_CACHE_HOME": str(output.with_suffix(".cache"))},  # kept features are killed as well
            )

    def reference(self, recipe: str) -> Path:
        """Return the run that nothing disturbs; it is made once."""
        output = self.folder / f"whole-{recipe}"
        took = self.folder / f"{recipe}.seconds"
        if not took.exists():
            process = self.start(recipe, output, 1)
            wait_until_begun(process, output)
            began = time.monotonic()
            assert process.wait() == 0
            took.write_text(str(time.monotonic() - began))
        self.seconds[recipe] = float(took.read_text())
        return output

    def trial(self, recipe: str, number: int) -> dict[str, Any]:
        """Run until done with signals in between, and compare; return what was done."""
        whole, output = self.reference(recipe), self.folder / f"trial-{number}"
        hits: Counter[str] = Counter()
        while True:
            process = self.start(recipe, output, self.random.choice((0, 1, 2)))
            how = self.random.choices(list(SIGNALS), WEIGHTS)[0]
            if self.disturb(process, output, how, recipe):
                hits[how] += 1
            code = process.wait()
            if code == 0:
                break
            assert code in (-9, 75, 137), f"exit code {code}, see said.txt"
            assert fault_of(output) == ""
        assert_same_run(whole, output)
        attempt = json.loads((output / "outcome.json").read_text())["attempt"]
        shutil.rmtree(output)
        shutil.rmtree(output.with_suffix(".cache"))
        return {"recipe": recipe, "trial": number, **hits, "attempts": attempt, "same": True}

    def disturb(self, process: subprocess.Popen[bytes], output: Path, how: str, recipe: str) -> bool:
        """Wait for a random moment and send the signal; false when the run was done before."""
        if self.random.random() < 0.85:  # otherwise the moment may come while Python is still starting
            wait_until_begun(process, output)
        # Mostly soon, so that a run is hit several times; what is left of it becomes less and less.
        longest = self.seconds[recipe] * self.random.choice((0.2, 0.4, 1.0))
        deadline = time.monotonic() + self.random.uniform(0, longest)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        pid = child_of(process.pid) if how == "worker" else process.pid
        if pid is None or process.poll() is not None:
            return False
        os.kill(pid, SIGNALS[how])
        return True


def wait_until_begun(process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for a new attempt to claim its folder."""
    outcome = output / "outcome.json"
    before = outcome.stat().st_mtime_ns if outcome.exists() else 0
    while process.poll() is None and not (outcome.exists() and outcome.stat().st_mtime_ns != before):
        time.sleep(0.02)


def child_of(pid: int) -> int | None:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return None
    return int(children[0]) if children else None


def summarise(lines: list[dict[str, Any]]) -> str:
    """Return one row a recipe."""
    rows = []
    for recipe in RECIPES:
        own = [line for line in lines if line["recipe"] == recipe]
        hits = {how: sum(line.get(how, 0) for line in own) for how in SIGNALS}
        same = sum(line["same"] for line in own)
        rows.append(f"{recipe}: {len(own)} runs, {hits}, {same} of {len(own)} bit-identical")
    return "\n".join(rows)


def kills_in(lines: list[dict[str, Any]]) -> int:
    return sum(line.get("all", 0) + line.get("worker", 0) for line in lines)


def run_trials(folder: Path, kills: int, seed: int = 0) -> list[dict[str, Any]]:
    """Run trials until enough kills have hit."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "trials.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    trials = Trials(folder, seed + len(lines))
    while kills_in(lines) < kills:
        recipe = list(RECIPES)[len(lines) % len(RECIPES)]
        lines.append(trials.trial(recipe, len(lines)))
        with journal.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        sys.stderr.write(f"{kills_in(lines)} kills: {lines[-1]}\n")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.write(summarise(run_trials(options.output, options.kills, options.seed)) + "\n")
