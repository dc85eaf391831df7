"""Shared parts of the tests: images that a tiny network can tell apart, and a tiny network on disk."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a network is a bug
os.environ["FINETUNE_STALL_TIMEOUT"] = "0"  # no process over each run; tests/faults has its own
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and more threads than cores make all slow

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image
from typer.testing import CliRunner, Result

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, also in the processes of tests

SHARED = Path(__file__).parents[2] / "shared" / "data"
QUICK_RUN = ("--epochs", 5, "--workers", 0, "--batch-size", 8, "--set", "input.augmentation=none")
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}

for profile, examples in (("few", 30), ("full", 2000)):
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Where slow tests are asked for, hypothesis draws its full number of examples."""
    settings.load_profile("full" if _is_asked_for("slow", config) else "few")


def pytest_collection_finish() -> None:
    """Spare what the imports made from garbage collection: a third of a tiny run's time went into it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let libraries find their objects again at the end, or they report leaks."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on a Ray cluster run only where they are named: ``slow or not slow`` is all but them.

    Of the cases of a test with ``sample(number)``, all but so many, evenly spread, are slow.
    """
    cases: dict[tuple[Any, str, int], list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("sample")
        if marker is not None and not item.get_closest_marker("slow"):
            cases.setdefault((item.parent, item.name.partition("[")[0], *marker.args), []).append(item)
    for (_, _, number), same in cases.items():
        step = len(same) / number
        kept = {int(place * step) for place in range(number)}
        for place, item in enumerate(same):
            if place not in kept:
                item.add_marker("slow")
    if not _is_asked_for("ray", config):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("ray")])
        items[:] = [item for item in items if not item.get_closest_marker("ray")]


def _is_asked_for(marker: str, config: pytest.Config) -> bool:
    return re.search(rf"(?<!not )\b{marker}\b", config.option.markexpr) is not None


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept between runs is kept for this session only."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def never_waits() -> Iterator[None]:
    """A test that opens pipes fails after half a minute instead of waiting for ever."""

    def fail(*_: object) -> None:
        pytest.fail("it waits for ever")  # not a TimeoutError, which is an OSError that the program handles

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def draw(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 36)) -> None:
    """A noisy image whose colour tells the class."""
    noise = np.random.default_rng(seed).normal(0, 40, (size[1], size[0], 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


PART_SEEDS = {"val": 100_000, "test": 200_000}
"""So that no part holds the images of another."""


def draw_folder(root: Path, counts: Mapping[str, int]) -> Path:
    """Class folders with ``counts`` images each; names outside COLOURS get grey ones."""
    first = PART_SEEDS.get(root.name, 0)
    for position, (name, count) in enumerate(counts.items()):
        colour = COLOURS.get(name.rpartition("/")[2], (120, 120, 120))
        for number in range(count):
            draw(root / name / f"{number:03}.jpg", colour, seed=first + 1000 * position + number)
    return root


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """``make_once(name, make)`` is a folder of this session, made once by one of pytest-xdist's workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make_folder(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = root / "once" / name, root / "once" / f"{name}.made"
        made.parent.mkdir(exist_ok=True)
        with FileLock(f"{made}.lock"):
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return make_folder


@pytest.fixture(scope="session")
def image_folder(make_once: MakeOnce) -> Path:
    """``train`` and ``val`` of three colours, 12 and 6 images each. Read only."""

    def make(root: Path) -> None:
        draw_folder(root / "train", dict.fromkeys(COLOURS, 12))
        draw_folder(root / "val", dict.fromkeys(COLOURS, 6))

    return make_once("images", make)


def make_tiny(folder: Path) -> Path:
    """A folder in timm's format: a small ResNet with seeded random weights for ten classes, 32 pixels."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 10,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
            "interpolation": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "classifier": "fc",
            "first_conv": "conv1.0",
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny(make_once: MakeOnce) -> Path:
    """:func:`make_tiny`, once a session. Read only."""
    return make_once("tiny", make_tiny)


FinishedRun = Callable[[str], Path]


@pytest.fixture(scope="session")
def finished_run(make_once: MakeOnce, tiny: Path, image_folder: Path) -> FinishedRun:
    """``finished_run("freeze")`` is the folder of a run of that strategy, made once a session. Read only.

    Five epochs on ``image_folder``; what ``--json`` printed is in ``said.json`` beside the folder.
    """
    from finetune.cli.app import app

    def make(strategy: str, folder: Path) -> None:
        words = [
            "run",
            "-b",
            tiny,
            "-d",
            image_folder,
            "-o",
            folder / "run",
            "-s",
            strategy,
            *QUICK_RUN,
            "--json",
        ]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        (folder / "said.json").write_text(result.stdout)

    def find(strategy: str) -> Path:
        return make_once(f"run-{strategy}", lambda folder: make(strategy, folder)) / "run"

    return find


Cli = Callable[..., Result]


@pytest.fixture
def cli() -> Iterator[Cli]:
    """Call the command line in this process: ``cli("run", "--epochs", 1)``; ``given`` is standard input."""
    from finetune.cli.app import app
    from finetune.system.signals import signals_to_stop

    runner = CliRunner()
    before = {number: signal.getsignal(number) for number in signals_to_stop()}
    yield lambda *words, given=None: runner.invoke(app, [str(word) for word in words], input=given)
    for number, handler in before.items():  # a command that was stopped ignores further signals
        signal.signal(number, handler)


@pytest.fixture
def hymenoptera() -> Path:
    """The real photographs, where the folder is beside the project."""
    folder = SHARED / "hymenoptera"
    if not folder.is_dir():
        pytest.skip("the photographs (../shared/data/hymenoptera) are not beside the project")
    return folder


@pytest.fixture
def squeezenet_weights() -> Path:
    """Real ImageNet weights, where they are beside the project."""
    file = SHARED / "squeezenet1_0-imagenet.safetensors"
    if not file.is_file():
        pytest.skip("the weights (../shared/data) are not beside the project")
    return file
