"""Whole commands of ours beside fastai, the tutorials' loop and timm's pieces: seconds, memory, accuracy."""

from __future__ import annotations

import csv
import json
import sys
from itertools import product
from pathlib import Path
from statistics import median

from benchmarks.data import Network, find_folder, find_network, find_weights, list_networks
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.plot import Panels, draw_panels
from benchmarks.results import OURS, Figures, Results
from benchmarks.timing import run_timed

STRATEGIES = ("freeze", "top", "full")
EPOCHS = (1, 5, 20)
SCRIPTS = {"fastai": "fastai_peer", "plain": "plain", "timm": "timm_peer", "torchvision": "extract"}
PEERS = ("fastai", "plain", "timm")
TOOLS = (OURS, *PEERS)
TRAINING = ("trunk", "measure", "train")
"""Phases of a run of ours that count as training: everything between the data check and the metrics."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each network, number of epochs and strategy."""
    epochs = (2,) if bench.quick else EPOCHS
    return [
        Case(f"commands-{strategy}-{network}-{number}", TOOLS, network, strategy, epochs=number)
        for network, number, strategy in product(list_networks(bench), epochs, STRATEGIES)
    ]


def measure(turn: Turn) -> Figures:
    """Return what a whole process of a tool cost, and what it reports."""
    network, output = find_network(turn.case.network, turn.bench), turn.place / "out"
    if turn.tool == OURS:
        timed, _ = run_timed(build_run(turn, output), turn.place)
        return timed | read_run(output)
    timed, said = run_timed(build_peer(turn, network, output), turn.place)
    facts: Figures = json.loads(said.strip().splitlines()[-1])
    return timed | facts


def find_finetune() -> str:
    """Return the installed command of this interpreter."""
    return str(Path(sys.executable).with_name("finetune"))


def build_job(turn: Turn) -> list[str]:
    """Return the words of network, data and sizes, which our commands and the peers have in common."""
    network = find_network(turn.case.network, turn.bench)
    words = ["--data", str(find_folder(network, turn.bench)), "--img-size", str(network.img_size)]
    words += ["--weights", str(find_weights(network.arch, turn.bench))]
    return [*words, "--workers", str(turn.bench.workers)]


def build_run(turn: Turn, output: Path) -> list[str]:
    """Return the command line of a run of ours."""
    network = find_network(turn.case.network, turn.bench)
    words = [find_finetune(), "run", "--offline", "--device", "cpu"]
    words += ["--backbone", f"torchvision/{network.arch}"]
    words += ["--strategy", turn.case.strategy, "--epochs", str(turn.case.epochs), *build_job(turn)]
    return [*words, "--batch-size", str(network.batch_size), "--output", str(output)]


def build_peer(turn: Turn, network: Network, output: Path) -> list[str]:
    """Return the command line of another tool."""
    python = str(turn.bench.peers_folder / "bin" / "python")
    words = [python, "-m", f"benchmarks.peers.{SCRIPTS[turn.tool]}", "--arch", network.arch]
    words += ["--lr", f"{choose_lr(turn.tool, network):g}", "--threads", str(turn.bench.threads)]
    words += ["--strategy", turn.case.strategy, "--epochs", str(turn.case.epochs), *build_job(turn)]
    return [*words, "--batch-size", str(network.batch_size), "--output", str(output)]


def choose_lr(tool: str, network: Network) -> float:
    """Return a peer's lr: the tutorial's, timm's rule, and for fastai ours, since its own is for Adam.

    SqueezeNet's classifier ends in a ReLU. Measured on the photographs, 0.001 left it at chance after four
    epochs, and timm's rule near it; at 0.0001 both learn.
    """
    if tool == "fastai":
        return 0.01
    if network.arch.startswith("squeezenet"):
        return 1e-4
    return 0.1 * network.batch_size / 256 if tool == "timm" else 0.001


def read_run(folder: Path) -> Figures:
    """Return the figures of one of our runs.

    Raises:
        ValueError: the supervisor started it again, so that its time is that of several attempts.
    """
    names = ("metrics.json", "outcome.json")
    metrics, outcome = (json.loads((folder / name).read_text("utf-8")) for name in names)
    if outcome["attempt"] > 1:
        raise ValueError(f"it took {outcome['attempt']} attempts")
    history = folder / "history.csv"  # a solved head has none
    lines = history.read_text("utf-8").splitlines() if history.exists() else []
    speeds = [float(row["images_per_second"]) for row in csv.DictReader(lines)]
    return {
        "accuracy": metrics["val_accuracy"],
        "num_train": metrics["num_train"],
        "training": sum(metrics["seconds"].get(phase, 0.0) for phase in TRAINING),
        **({"images_per_second": median(speeds)} if speeds else {}),
    }


def draw(results: Results, path: Path) -> None:
    """Draw seconds against epochs, a panel for each strategy and network."""
    panels: Panels = {}
    for case, tool in results.measured("commands-"):
        title, _, epochs = case.removeprefix("commands-").rpartition("-")
        if wall := results.figure(case, tool, "wall"):
            panels.setdefault(title, {}).setdefault(tool, []).append((int(epochs), *wall))
    draw_panels(panels, ("epochs", "seconds, whole command"), path)


COLUMNS = {
    "seconds": "wall",
    "training alone": "training",
    "accuracy": "accuracy",
    "images/s": "images_per_second",
    "peak MB": "peak_mb",
}
QUESTION = Question("commands", plan, measure, COLUMNS, draw=draw)
