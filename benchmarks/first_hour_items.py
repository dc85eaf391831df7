"""The items of the first hour: each returns what it found, in words, and whether that is as expected."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import data
from benchmarks.harness import Bench, Case, Turn
from benchmarks.machine import ROOT

Outcome = tuple[str, bool]
SMALL = "tf_efficientnet_lite0"
"""The network whose weights are installed with the package; it has BatchNorm."""
MOST_DIFFERENCE = 0.02
MOST_OVERHEAD = 5.0
"""Percent that our steps may take longer than bare ones."""


class Trial(NamedTuple):
    """Where an item runs.

    Attributes:
        device: ``cuda``, ``cuda:N`` or ``cpu``.
        place: an empty folder.
        bench: the folder with the images that are drawn once; ``quick`` for the smallest sizes.
    """

    device: str
    place: Path
    bench: Bench

    def size(self, whole: int, quick: int) -> int:
        """Return a number of images, or pixels."""
        return quick if self.bench.quick else whole


@dataclass(frozen=True)
class Item:
    """One line of the list.

    Attributes:
        name: unique.
        act: runs it.
        expected: the result that is expected.
        gpus: GPUs that it needs; 0: the CPU can run it as well, to try the harness.
        seconds: time limit.
    """

    name: str
    act: Callable[[Trial], Outcome]
    expected: str
    gpus: int = 0
    seconds: int = 600


# --- commands ------------------------------------------------------------------------------------


def finetune(*words: object) -> dict[str, Any]:
    """Run a command, and return the JSON object that it prints.

    Raises:
        RuntimeError: it ended with an error; the text is its last line.
    """
    command = [sys.executable, "-m", "finetune", *(str(word) for word in words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode:
        last = " ".join(done.stderr.split())[-300:]
        raise RuntimeError(f"finetune {words[0]} ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train(trial: Trial, name: str, *words: object, backbone: str = SMALL) -> dict[str, Any]:
    """Run a training into ``trial.place / name``, of the digits unless told otherwise."""
    images = () if "--data" in words else ("--data", find_digits(trial))
    device = () if "--device" in words or "--gpus" in words else ("--device", trial.device)
    size = () if "--img-size" in words else ("--img-size", trial.size(64, 32))
    return finetune(
        "run", "--backbone", backbone, "--output", trial.place / name, *images, *device, *size, *words
    )


def find_digits(trial: Trial) -> str:
    """Return the digits that come with scikit-learn, which can be learned; a few drawn images to be quick."""
    return str(draw(trial, 0, 0)) if trial.bench.quick else "sample:digits"


def read_history(folder: Path) -> list[dict[str, str]]:
    """Return the epochs of a run; none before the first has ended."""
    path = folder / "history.csv"
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.exists() else []


def draw(trial: Trial, number: int, size: int) -> Path:
    """Return a folder with drawn JPEG files."""
    return data.find_blobs(trial.size(number, 40), trial.bench, trial.size(size, 32))


def use_weights(trial: Trial, arch: str) -> tuple[str, object]:
    """Return the option for random weights, which are drawn once."""
    return ("--weights", data.find_weights(arch, trial.bench))


def run_tests(trial: Trial, path: str) -> Outcome:
    """Run tests; the result is the summary."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return last, done.returncode == 0 and (trial.device == "cpu" or "passed" in last)


# --- does it run ---------------------------------------------------------------------------------


def show_versions(trial: Trial) -> Outcome:
    """Versions, driver, and the architectures that torch was built for."""
    import torch

    from finetune.system.device import describe_environment, resolve_device, resolve_precision

    device = resolve_device(trial.device)
    found = describe_environment(device)
    words = f"torch {found['torch']}, {found['gpu'] or found['processor']}, {resolve_precision(device)}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        built = " ".join(torch.cuda.get_arch_list())
        words += f", CUDA {found['cuda']}, cuDNN {cudnn}, sm_{major}{minor} of {built}"
        words += f", {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB"
    return words, True


def train_twice(optimizer: str, trial: Trial) -> Outcome:
    """One epoch, then a second in the same folder: everything comes back from a checkpoint."""
    words = ("--strategy", "full", "--set", f"training.optimizer={optimizer}", "--epochs")
    train(trial, "run", *words, 1)
    metrics = train(trial, "run", *words, 2)
    rows = read_history(trial.place / "run")
    losses = [float(row["eval_loss"]) for row in rows]
    said = f"{len(rows)} epochs, losses {', '.join(f'{loss:.3f}' for loss in losses)}"
    return f"{said}, accuracy {metrics['accuracy']:.3f}", len(rows) == 2 and all(map(math.isfinite, losses))


def train_same_bits(optimizer: str, trial: Trial) -> Outcome:
    """Two deterministic runs are the same in every bit."""
    words = ("--strategy", "full", "--set", f"training.optimizer={optimizer}", "--set", "deterministic=true")
    for name in ("one", "two"):
        train(trial, name, *words, "--epochs", 2)
    rows = [read_history(trial.place / name) for name in ("one", "two")]
    losses = [[(row["train_loss"], row["eval_loss"]) for row in run] for run in rows]
    tables = [(trial.place / name / "predictions.csv").read_bytes() for name in ("one", "two")]
    same = losses[0] == losses[1], tables[0] == tables[1]
    said = f"losses {'equal' if same[0] else losses}, predictions {'equal' if same[1] else 'differ'}"
    return said, all(same)


def train_float16(trial: Trial) -> Outcome:
    """float16 with SGD, which begins with steps that overflow."""
    words = ("--strategy", "full", "--set", "training.precision=float16", "--epochs", 2)
    metrics = train(trial, "run", *words)
    said = f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.3f}"
    return said, trial.bench.quick or metrics["accuracy"] > 0.3


def train_with_little_memory(trial: Trial) -> Outcome:
    """With a twentieth of the GPU's memory: batches are halved until they fit."""
    import torch

    from finetune.pipeline.run import run
    from finetune.recipe import load_recipe

    torch.cuda.set_per_process_memory_fraction(0.05)
    recipe: dict[str, Any] = {
        "backbone.name": SMALL,
        "data.path": find_digits(trial),
        "input.img_size": 224,
        "device": trial.device,
    }
    recipe |= {"strategy.name": "full", "training.epochs": 1, "training.batch_size": 1024}
    metrics = run(load_recipe(None, recipe), trial.place / "run").metrics
    return f"microbatch {metrics['microbatch']} of 1024", bool(metrics["microbatch"])


# --- how fast it runs ----------------------------------------------------------------------------


def measure_bare_rate(trial: Trial) -> Outcome:
    """ResNet-50 on images in the GPU's memory, beside the rate of large matrix products."""
    from benchmarks.gpu import measure

    found = measure(Turn(Case("gpu-resnet50", (), "resnet50-gpu"), "bare", 0, trial.place, trial.bench))
    said = f"{found['training_images_per_second']:,.0f} images/s, {found['training_percent']:.0f} %"
    return f"{said} of {found['matrix_rate']:,.0f} Tflop/s", True


def measure_overhead(trial: Trial) -> Outcome:
    """Our steps beside bare ones, in turns."""
    from benchmarks.overhead import measure

    found = measure(Turn(Case("overhead-drawn", (), "resnet50-drawn"), "bare", 0, trial.place, trial.bench))
    rates = f"{found['bare_images_per_second']:,.0f} bare, {found['images_per_second']:,.0f} ours"
    # The smallest sizes only show that it works.
    return f"{found['over_loop']:.1f} % ({rates})", trial.bench.quick or found["over_loop"] <= MOST_OVERHEAD


def train_full(augmentation: str, trial: Trial) -> Outcome:
    """All of ResNet-50 on 4,000 images: what the pipeline gives, and what the GPU waits for."""
    backbone = SMALL if trial.bench.quick else "torchvision/resnet50"
    weights = () if trial.bench.quick else use_weights(trial, "resnet50")
    words = ("--strategy", "full", "--set", f"input.augmentation={augmentation}", "--epochs", 2, *weights)
    words += ("--data", draw(trial, 4000, 400), "--img-size", trial.size(224, 32))
    train(trial, "run", *words, backbone=backbone)
    rows = read_history(trial.place / "run")
    said = ", then ".join(
        f"{float(row['images_per_second']):,.0f} images/s, {float(row['data_wait_fraction']):.0%} waiting"
        for row in rows
    )
    return said, len(rows) == 2


def profile_steps(trial: Trial) -> Outcome:
    """Ten steps, each under torch's profiler, after five others; a step waits at every synchronisation."""
    from torch.profiler import ProfilerActivity, profile

    from finetune.pipeline.run import run
    from finetune.recipe import load_recipe
    from finetune.training.trainer import Trainer

    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (trial.device != "cpu")]
    step, counts = Trainer._train_step, Counter[str]()

    def step_watched(trainer: Trainer, *words: Any) -> bool:
        if not 5 <= trainer.progress.step < 15:
            return step(trainer, *words)
        with profile(activities=kinds) as profiler:
            goes_on = step(trainer, *words)
        counts.update({event.key: event.count for event in profiler.key_averages()})
        return goes_on

    recipe: dict[str, Any] = {"backbone.name": SMALL, "data.path": find_digits(trial), "device": trial.device}
    recipe |= {"strategy.name": "full", "training.epochs": 1, "training.batch_size": trial.size(32, 2)}
    recipe |= {"input.img_size": trial.size(64, 32)}
    recipe |= {"data.workers": 0}  # decoding is not counted
    with mock.patch.object(Trainer, "_train_step", step_watched):
        run(load_recipe(None, recipe), trial.place / "run")
    items = counts["aten::_local_scalar_dense"] / 10
    waits = (
        sum(count for key, count in counts.items() if key.startswith("cuda") and "Synchronize" in key) / 10
    )
    launches = sum(count for key, count in counts.items() if "LaunchKernel" in key) / 10
    said = f"{items:.1f} .item(), {waits:.1f} waits and {launches:.0f} kernels a step"
    return f"{said}; one wait is the profiler's", sum(counts.values()) > 0 and items <= 1 and waits <= 2


def train_frozen(trial: Trial) -> Outcome:
    """``freeze`` on 10,000 images: the seconds of each phase."""
    backbone = SMALL if trial.bench.quick else "torchvision/resnet50"
    weights = () if trial.bench.quick else use_weights(trial, "resnet50")
    words = ("--strategy", "freeze", "--data", draw(trial, 10_000, 400), "--img-size", trial.size(224, 32))
    seconds = train(trial, "run", *words, *weights, backbone=backbone)["seconds"]
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), True


def train_vit(compiles: bool, trial: Trial) -> Outcome:
    """ViT-B/16, plain and compiled."""
    backbone = "vit_tiny_patch16_224" if trial.bench.quick else "vit_base_patch16_224"
    words = ("--strategy", "scratch", "--data", draw(trial, 4000, 400), "--img-size", 224, "--epochs", 2)
    compiled = ("--set", f"training.compile={str(compiles).lower()}")
    metrics = train(trial, "run", *words, *compiled, backbone=backbone)
    rate = float(read_history(trial.place / "run")[-1]["images_per_second"])
    gigabytes = metrics.get("peak_gpu_memory_bytes", 0) / 1e9
    return f"{rate:,.0f} images/s in the second epoch, {gigabytes:.1f} GB", True


# --- the same answers, the right card, lost processes --------------------------------------------


def compare_devices(trial: Trial) -> Outcome:
    """Predictions, metrics and an exported model, of the device and of the CPU."""
    train(trial, "run", "--strategy", "freeze", "--epochs", 1)
    finetune("export", trial.place / "run", "--output", trial.place / "model")
    images, tables, losses = draw(trial, 400, 64), [], []
    for number, device in enumerate(dict.fromkeys((trial.device, "cpu"))):
        for source in ("run", "model"):
            target = trial.place / f"{source}-{number}.csv"
            finetune("predict", trial.place / source, images, "--output", target, "--device", device)
            tables.append(read_probabilities(target))
        words = ("--output", trial.place / f"evaluated-{number}", "--device", device)
        losses.append(finetune("evaluate", trial.place / "run", *words)["loss"])
    pairs = [pair for table in tables[1:] for pair in zip(tables[0], table, strict=True)]
    worst, apart = max(abs(one - other) for one, other in pairs), max(losses) - min(losses)
    return f"probabilities {worst:.5f}, losses {apart:.5f}", max(worst, apart) < MOST_DIFFERENCE


def read_probabilities(path: Path) -> list[float]:
    """Return the probabilities of a table of predictions, row by row."""
    with path.open(encoding="utf-8", newline="") as file:
        return [float(row[key]) for row in csv.DictReader(file) for key in row if key.startswith("prob_")]


def use_second_card(trial: Trial) -> Outcome:
    """A run on ``cuda:1``, while the memory of card 0 is watched; a CUDA context takes some hundred MB."""
    before = most = read_used_memory()
    with start_run(trial, "--device", "cuda:1", "--epochs", 5) as process:
        while process.poll() is None:
            most = max(most, read_used_memory())
            time.sleep(0.5)
    return f"{most - before} MB on card 0, exit code {process.returncode}", most - before < 100


def read_used_memory() -> int:
    """Return the MB in use on card 0."""
    words = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)  # noqa: S603


def lose_process(trial: Trial) -> Outcome:
    """``kill -9`` of one of two processes: the supervisor starts both again, and the run goes on."""
    two = ("--processes", 2, "--device", "cpu") if trial.device == "cpu" else ("--gpus", 2)
    folder = trial.place / "run"
    with start_run(trial, *two, "--epochs", 10) as process:
        while not (rows := read_history(folder)):
            if process.poll() is not None:
                return f"ended with {process.returncode} before its first epoch", False
            time.sleep(0.05)
        os.kill(next(find_rank(1, folder)), signal.SIGKILL)
        began = time.perf_counter()
        while len(read_history(folder)) <= len(rows) and process.poll() is None:
            time.sleep(0.05)
        seconds = time.perf_counter() - began
    said = f"an epoch more after {seconds:.1f} s, exit code {process.returncode}"
    return said, process.returncode == 0 and len(read_history(folder)) == 10


def start_run(trial: Trial, *words: object) -> subprocess.Popen[bytes]:
    """Start a training in the background; the end of the block waits for it."""
    command = ["-m", "finetune", "run", "--backbone", SMALL, "--strategy", "full"]
    command += ["--data", find_digits(trial), "--img-size", str(trial.size(64, 32))]
    command += ["--output", str(trial.place / "run")]
    return subprocess.Popen([sys.executable, *command, *map(str, words)])  # noqa: S603 - our own words


def find_rank(rank: int, folder: Path) -> Iterator[int]:
    """Yield the process of a rank that trains into a folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            is_ours = str(folder).encode() in (entry / "cmdline").read_bytes()
            if is_ours and f"RANK={rank}".encode() in variables:
                yield int(entry.name)


ITEMS = (
    Item("versions", show_versions, "torch was built for the card's architecture"),
    Item("tests", partial(run_tests, path="tests/gpu"), "all pass", gpus=1, seconds=1800),
    Item("epochs-sgd", partial(train_twice, "sgd"), "2 epochs, finite losses"),
    Item("epochs-adamw", partial(train_twice, "adamw"), "2 epochs, finite losses"),
    Item("bits-sgd", partial(train_same_bits, "sgd"), "two runs are equal"),
    Item("bits-adamw", partial(train_same_bits, "adamw"), "two runs are equal"),
    Item("float16-sgd", train_float16, "accuracy above 0.3", gpus=1),
    Item("memory", train_with_little_memory, "batches are halved, and it ends with 0", gpus=1),
    Item("bare-rate", measure_bare_rate, "no error; the share is to be read", gpus=1),
    Item("overhead", measure_overhead, f"at most {MOST_OVERHEAD:g} %"),
    Item("full-light", partial(train_full, "light"), "ends with 0; the waiting is to be read", seconds=1200),
    Item(
        "full-medium", partial(train_full, "medium"), "ends with 0; the waiting is to be read", seconds=1200
    ),
    Item("profile", profile_steps, "at most one .item() a step"),
    Item("freeze", train_frozen, "ends with 0; the phases are to be read", seconds=1200),
    Item("vit", partial(train_vit, False), "ends with 0", gpus=1, seconds=1200),
    Item(
        "vit-compiled", partial(train_vit, True), "ends with 0; to be compared with vit", gpus=1, seconds=1800
    ),
    Item("answers", compare_devices, f"differences under {MOST_DIFFERENCE:g}", seconds=900),
    Item("second-card", use_second_card, "under 100 MB on card 0", gpus=2),
    Item(
        "processes", partial(run_tests, path="tests/gpu/test_processes.py"), "all pass", gpus=2, seconds=1800
    ),
    Item("lost-process", lose_process, "goes on within seconds, and ends with 0", gpus=2),
)
