"""Seconds until a tool has the accuracy that fastai's ``fine_tune`` ends with, and keeps it.

Whole processes, each with empty caches. A peer's time is that of the end of an epoch, from the start of its
process; ours is that of the whole process, with the model exported and the report written. ``limit`` is what
nobody can go below who looks at every image once: all images decoded by Pillow, then through the network in
the faster of the two runtimes, nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from benchmarks.commands import find_finetune, read_run
from benchmarks.data import NETWORKS, find_folder, find_sets, make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures, Results, Spread, spread
from benchmarks.text import span, table
from benchmarks.timing import run_timed
from finetune.data.loader import Placement
from finetune.evaluation.intervals import compute_wilson
from finetune.features.network import place_network
from finetune.features.runtime import open_forward
from finetune.recipe import Runtime
from finetune.system.display import SilentDisplay
from pretrained.backbone import load_source
from pretrained.catalog import find_card
from pretrained.network import is_convolutional

SETS = ("coffee5", "clothing10", "grocery22", "photographs")
BACKBONES = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")
"""With ImageNet weights, of 4.7 and 6.1 million parameters."""
SCRIPTS = {
    "fastai": "fastai_fine_tune",
    "huggingface": "hf_trainer",
    "timm": "timm_peer",
    "plain": "plain",
}
STRATEGIES = ("auto", "freeze", "top", "full")
LIMIT, LEADER = "limit", "fastai"
TOOLS = (*(f"{OURS} {strategy}" for strategy in STRATEGIES), *SCRIPTS, LIMIT)
EPOCHS, BATCH_SIZE = 5, 32
RUNTIMES: tuple[Runtime, ...] = ("torch", "onnxruntime")


def plan(bench: Bench) -> list[Case]:
    """Return a case for each backbone and set of images."""
    pairs = [(backbone, name) for backbone in BACKBONES for name in SETS]
    return [
        Case(f"time_to_accuracy-{backbone}-{name}", TOOLS, backbone, "", name, epochs=2 if bench.quick else 5)
        for backbone, name in (pairs[3:4] if bench.quick else pairs)
    ]


def measure(turn: Turn) -> Figures:
    """Return what a whole process cost, its accuracy, and that after each epoch."""
    folder = find_images(turn)
    number = sum(1 for path in (folder / "val").rglob("*") if path.is_file())
    if turn.tool == LIMIT:
        return measure_limit(turn, folder) | {"num_val": number}
    if turn.tool in SCRIPTS:
        timed, said = run_timed(build_peer(turn, folder), turn.place)
        facts: Figures = json.loads(said.strip().splitlines()[-1])
        return timed | facts | {"num_val": number}
    timed, _ = run_timed(build_run(turn, folder), turn.place)
    facts = read_run(turn.place / "out")
    return (
        timed
        | facts
        | {"last_accuracy": facts["accuracy"], "curve": [(0.0, facts["accuracy"])]}
        | {"num_val": number}
    )


def find_images(turn: Turn) -> Path:
    """Return a folder with ``train`` and ``val``."""
    if turn.case.dataset == "photographs":
        return find_folder(NETWORKS["squeezenet"], turn.bench)
    return find_sets(turn.bench) / turn.case.dataset


def choose_size(turn: Turn) -> int:
    """Return the pixels of a side: those of the weights."""
    return 64 if turn.bench.quick else find_card(f"timm/{turn.case.network}").preprocessing.size[0]


def build_run(turn: Turn, folder: Path) -> list[str]:
    """Return the command line of a run of ours; ``auto`` with nothing but its defaults."""
    strategy = turn.tool.removeprefix(f"{OURS} ")
    words = [find_finetune(), "run", "--offline", "--device", "cpu", "--strategy", strategy]
    words += ["--backbone", f"timm/{turn.case.network}", "--data", str(folder)]
    words += ["--img-size", str(choose_size(turn)), "--workers", str(turn.bench.workers)]
    words += ["--epochs", str(turn.case.epochs), "--batch-size", str(BATCH_SIZE)]
    return [*words, "--seed", str(turn.repeat), "--output", str(turn.place / "out")]


def build_peer(turn: Turn, folder: Path) -> list[str]:
    """Return the command line of another tool, which trains all weights with its own settings."""
    python = str(turn.bench.peers_folder / "bin" / "python")
    lr = {"timm": 0.1 * BATCH_SIZE / 256}.get(turn.tool, 0.001)  # timm's rule, and the tutorial's rate
    words = [python, "-m", f"benchmarks.peers.{SCRIPTS[turn.tool]}", "--arch", f"timm/{turn.case.network}"]
    words += ["--weights", str(find_state(turn)), "--data", str(folder), "--strategy", "full"]
    words += ["--img-size", str(choose_size(turn)), "--epochs", str(turn.case.epochs), "--lr", f"{lr:g}"]
    words += ["--batch-size", str(BATCH_SIZE), "--seed", str(turn.repeat)]
    words += ["--threads", str(turn.bench.threads), "--workers", str(turn.bench.workers)]
    return [*words, "--output", str(turn.place / "out")]


def find_state(turn: Turn) -> Path:
    """Return the backbone's weights as a .safetensors file in timm's names."""

    def save(target: Path) -> None:
        from safetensors.torch import save_model

        save_model(load_source(find_card(f"timm/{turn.case.network}"), offline=True).network, str(target))

    return make_once(turn.bench.cache / f"{turn.case.network}.safetensors", save)


def measure_limit(turn: Turn, folder: Path) -> Figures:
    """Return the seconds of decoding every image and of a forward pass for each, in all threads."""
    torch.set_num_threads(turn.bench.threads)
    files = [path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png")]
    began = time.perf_counter()
    for path in files:
        with Image.open(path) as image:
            image.convert("RGB")
    decoding = (time.perf_counter() - began) / turn.bench.threads
    forward = len(files) / max(time_forward(turn, runtime) for runtime in RUNTIMES)
    return {"decoding": decoding, "forward": forward, "wall": decoding + forward}


def time_forward(turn: Turn, runtime: Runtime) -> float:
    """Return images a second of the network alone, of the fastest of several batches."""
    card, size = find_card(f"timm/{turn.case.network}"), choose_size(turn)
    network = load_source(card, offline=True).network.eval()
    placement = Placement(torch.device("cpu"), is_convolutional(network))
    place_network(network, placement)
    forward = open_forward(runtime, network, network, placement, (3, size, size), SilentDisplay())
    images = torch.randn(8, 3, size, size).to(memory_format=placement.memory_format)
    seconds = []
    with torch.inference_mode():
        for _ in range(2 if turn.bench.quick else 30):
            began = time.perf_counter()
            forward(images)
            seconds.append(time.perf_counter() - began)
    return len(images) / min(seconds)


# --- the table -----------------------------------------------------------------------------------


def find_reached(figures: Figures, goal: float) -> float | None:
    """Return the seconds from the start of a process to the first epoch from which the goal is kept."""
    reached = None
    for before_end, accuracy in reversed(figures["curve"]):
        if accuracy < goal:
            break
        reached = figures["wall"] - before_end
    return reached


def write(results: Results) -> Iterator[str]:
    """Yield a table for each backbone."""
    head = ["set", "tool", "seconds to fastai's accuracy", "of fastai's", "whole process, s"]
    head += ["accuracy (95 % interval)", "peak MB"]
    for backbone in BACKBONES:
        prefix = f"time_to_accuracy-{backbone}-"
        rows = [_row(results, case, tool, prefix) for case, tool in results.measured(prefix)]
        if rows:
            yield f"### {backbone}\n"
            yield from table(head, rows)
            yield ""


def _row(results: Results, case: str, tool: str, prefix: str) -> list[str]:
    name, wall = case.removeprefix(prefix), span(results.figure(case, tool, "wall"))
    if tool == LIMIT:
        return [name, "limit: every image once", "", "", wall, "", ""]
    times = list(_reached_times(results, case, tool))
    own = spread(time for time, _ in times if time is not None)
    ratios = [leader / time for time, leader in times if time is not None and leader is not None]
    missed = sum(time is None for time, _ in times)
    said = "never" if own is None else span(own) + (f" ({missed} never)" if missed else "")
    shown = f"**{tool}**" if tool.startswith(OURS) else tool
    accuracy, peak = _describe_accuracy(results, case, tool), span(results.figure(case, tool, "peak_mb"))
    return [name, shown, said, span(spread(ratios), "x"), wall, accuracy, peak]


def _reached_times(results: Results, case: str, tool: str) -> Iterator[tuple[float | None, float | None]]:
    """Yield when a tool, and when fastai, had fastai's last accuracy, turn by turn."""
    leaders = {one.repeat: one.figures for one in results.of(case, LEADER)}
    for one in results.of(case, tool):
        if leader := leaders.get(one.repeat):
            goal = leader["last_accuracy"]
            yield find_reached(one.figures, goal), find_reached(leader, goal)


def _describe_accuracy(results: Results, case: str, tool: str) -> str:
    """Return the median accuracy, with the interval of that share of the validation images."""
    value: Spread | None = results.figure(case, tool, "last_accuracy")
    images: Spread | None = results.figure(case, tool, "num_val")
    if value is None or images is None:
        return "-"
    low, high = compute_wilson(round(value.middle * images.middle), round(images.middle))
    return f"{value.middle:.3f} ({low:.3f} to {high:.3f})"


QUESTION = Question("time_to_accuracy", plan, measure, write=write)
