"""The command line of each tool for each case, and what it says of itself afterwards."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case
from benchmarks.data import Store
from benchmarks.machine import ROOT
from benchmarks.peers_env import PEERS
from benchmarks.results import OURS
from benchmarks.timing import Command, Timed

SQUEEZENET_RATE = 1e-4
"""For the plain loop and timm. SqueezeNet's classifier ends in a ReLU: measured on the photographs, 0.001
(the tutorial's) left it at chance after four epochs, and timm's rule near it; at this rate both learn."""
TRAINING = ("trunk", "measure", "train")
"""Phases of a run of ours that count as training: everything between the check and the figures."""
SCRIPTS = {
    "fastai": "fastai_peer.py",
    "plain": "plain.py",
    "timm": "timm_peer.py",
    "torchvision": "extract.py",
}


@dataclass(frozen=True)
class Shop:
    """Everything that command lines are made of.

    Attributes:
        store: images and weights.
        peers: the Python of the peers' environment.
        work: folder for what the runs leave.
        threads: for computing.
        workers: decoding processes.
        quick: small cases.
    """

    store: Store
    peers: Path
    work: Path
    threads: int
    workers: int
    quick: bool

    def place(self, case: Case, tool: str, repeat: int) -> Path:
        """Return the folder of one process; nothing is in it before."""
        return self.work / f"{case.name}-{tool.partition(' ')[0]}-{repeat}"

    def command(self, case: Case, tool: str, repeat: int) -> Command:
        """Return what is to be timed."""
        place = self.place(case, tool, repeat)
        cache = self.warm_cache(case) if case.kind == "second" else place / "cache"
        environment = {
            "XDG_CACHE_HOME": str(cache),
            "FASTAI_HOME": str(place / "fastai"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        if case.kind in ("limit", "pipeline", "overhead", "gpu"):
            environment["PYTHONPATH"] = str(ROOT)
        watch = place / "out" / "history.csv" if case.kind == "second" else None
        return Command(tuple(self._words(case, tool, place)), environment, place, watch)

    def warm_cache(self, case: Case) -> Path:
        """Return the cache folder that the first run of a case filled for the second."""
        return self.work / f"{case.name}-warm"

    def warm_up(self, case: Case) -> Command:
        """Return the first run of a case of two: the same recipe, but for the rate."""
        place = self.work / f"{case.name}-first"
        command = self.command(case, OURS, 0)
        words = [*self._finetune(case, place), "--lr", "0.02"]
        return Command(tuple(words), command.environment, place)

    def _words(self, case: Case, tool: str, place: Path) -> list[str]:
        if tool == "finetune --help":
            return [find_finetune(), "--help"]
        if tool == "import torch":
            return [sys.executable, "-c", "import torch"]
        if tool == OURS:
            return self._finetune(case, place)
        if tool in SCRIPTS:
            return self._peer(case, tool, place)
        scripts = {"limit": "limits", "pipeline": "pipeline", "overhead": "overhead", "gpu": "gpu"}
        module = f"benchmarks.{scripts[case.kind]}"
        return [sys.executable, "-m", module, *self._job(case), *(["--quick"] if self.quick else [])]

    def _finetune(self, case: Case, place: Path) -> list[str]:
        if case.kind == "extract":
            return self._extract(case, place)
        words = [
            find_finetune(),
            "run",
            "--offline",
            "--device",
            "cpu",
            "--strategy",
            case.strategy,
            "--output",
            str(place / "out"),
        ]
        words += ["--epochs", str(case.epochs), "--batch-size", str(case.network.batch_size)]
        words += ["--img-size", str(case.network.img_size), "--workers", str(self.workers)]
        if case.kind == "scaling":
            data, network = self.store.folder(str(case.size)), self.store.small_network()
            return [*words, "--data", str(data), "--backbone", str(network)]
        words += ["--data", str(self.store.folder(case.network.data))]
        words += ["--backbone", f"torchvision/{case.network.arch}"]
        return [*words, "--weights", str(self.store.weights(case.network.arch))]

    def _extract(self, case: Case, place: Path) -> list[str]:
        words = [find_finetune(), "extract", "--offline", "--device", "cpu", "--layers", "last"]
        words += ["--img-size", str(case.network.img_size), "--workers", str(self.workers)]
        words += ["--data", str(self.store.folder(case.network.data))]
        words += ["--backbone", f"torchvision/{case.network.arch}"]
        words += ["--weights", str(self.store.weights(case.network.arch))]
        return [*words, "--output", str(place / "out" / "features.csv")]

    def _peer(self, case: Case, tool: str, place: Path) -> list[str]:
        rate = choose_rate(case, tool)
        words = [str(self.peers), str(PEERS / SCRIPTS[tool]), *self._job(case), "--lr", f"{rate:g}"]
        words += ["--strategy", case.strategy, "--epochs", str(case.epochs)]
        return [*words, "--workers", str(self.workers), "--output", str(place / "out")]

    def _job(self, case: Case) -> list[str]:
        network = case.network
        words = ["--arch", network.arch, "--img-size", str(network.img_size)]
        words += ["--batch-size", str(network.batch_size), "--threads", str(self.threads)]
        if network.data:
            words += ["--data", str(self.store.folder(network.data))]
            words += ["--weights", str(self.store.weights(network.arch))]
        return words


def choose_rate(case: Case, tool: str) -> float:
    """Return a peer's rate: the tutorial's, timm's rule, and for fastai ours, since its own is for Adam."""
    if tool == "fastai":
        return 0.01
    if case.network.arch.startswith("squeezenet"):
        return SQUEEZENET_RATE
    return 0.1 * case.network.batch_size / 256 if tool == "timm" else 0.001


def find_finetune() -> str:
    """Return the installed command of this very interpreter."""
    return str(Path(sys.executable).with_name("finetune"))


def read_facts(case: Case, tool: str, place: Path, timed: Timed) -> dict[str, Any]:
    """Return what a tool said: its last line, or the figures in the run folder."""
    if case.kind == "startup" or (case.kind == "extract" and tool == OURS):
        return {}
    if tool == OURS:
        return read_run(place / "out")
    facts: dict[str, Any] = json.loads(timed.stdout.strip().splitlines()[-1])
    return facts


def read_run(folder: Path) -> dict[str, Any]:
    """Return the figures of one of our runs."""
    metrics, outcome = (
        json.loads((folder / name).read_text("utf-8")) for name in ("metrics.json", "outcome.json")
    )
    seconds = metrics["seconds"]
    with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "accuracy": metrics["val_accuracy"],
        "num_train": metrics["num_train"],
        "seconds": seconds | {"training": sum(seconds.get(phase, 0.0) for phase in TRAINING)},
        "attempt": outcome["attempt"],
        "images_per_second": median(float(row["images_per_second"]) for row in rows),
        "data_wait_fraction": median(float(row["data_wait_fraction"]) for row in rows),
        "first_epoch_seconds": float(rows[0]["seconds"]),
    }
