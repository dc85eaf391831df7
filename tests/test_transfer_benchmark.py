"""How the bundled backbone is made, and what it is compared on."""

from __future__ import annotations

import json
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite is not installed, it runs from the checkout

from benchmarks import bundle, tiny_imagenet, transfer, transfer_data
from benchmarks.tiny_imagenet import GROUP_SIZE, draw_groups
from benchmarks.transfer import STRATEGIES, Trial, append_trial, describe_weights, plan, read_trials
from benchmarks.transfer_data import DATASETS, EVERY, Origin, make_folder
from benchmarks.transfer_page import build_page, draw_plot
from benchmarks.transfer_seen import compute_likeness
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from pretrained.backbone import load_source
from pretrained.catalog import find_card
from tests.conftest import Cli, draw_folder

ANIMALS = [f"n01{number:06}" for number in range(12)]
THINGS = [f"n{2660000 + 170000 * number:08}" for number in range(14)]
LABELS = ANIMALS + THINGS


def test_groups_are_disjoint_and_always_the_same() -> None:
    groups = draw_groups(LABELS)
    assert groups == draw_groups(LABELS[::-1])
    assert sorted(label for group in groups.values() for label in group) == sorted(LABELS)
    assert {name: len(group) for name, group in groups.items()} == {
        "source": len(LABELS) - 2 * GROUP_SIZE,
        "animals": GROUP_SIZE,
        "things": GROUP_SIZE,
    }
    assert all(label.startswith("n01") for label in groups["animals"])
    assert not any(label.startswith("n01") for label in groups["things"])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive in small, unpacked."""
    folder = tmp_path_factory.mktemp("tiny-imagenet")
    image = folder / "image.webp"
    with zipfile.ZipFile(folder / "tiny.zip", "w") as archive:
        for place, label in enumerate(LABELS):
            for number in range(6):
                Image.new("RGB", (8, 8), (9 * place, 40 * number, 0)).save(image, lossless=True)
                archive.write(image, f"{label}/{number}.webp")
    assert tiny_imagenet.main([str(folder / "tiny.zip"), str(folder / "out")]) == 0
    return folder / "out"


def test_the_tables_are_data_sets(tiny_folder: Path) -> None:
    source = discover(tiny_folder / "source.csv", SplitConfig(0.2, 0))
    assert source.classes == tuple(draw_groups(LABELS)["source"])
    assert len(source.samples) == 6 * len(source.classes)


def names(folder: Path, part: str) -> set[str]:
    return {str(path.relative_to(folder / part)) for path in (folder / part).glob("*/*")}


def test_what_judges_does_not_depend_on_what_is_learned_from(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_data, "SIZES", (1, 50, EVERY))
    monkeypatch.setattr(transfer_data, "find_seen", lambda *_: set())  # images of one colour are all alike
    dataset = replace(DATASETS["things"], val=1, test=2)
    origin = Origin(tmp_path, tiny_folder, tmp_path)
    few, every = (make_folder(dataset, number, 0, origin) for number in (1, EVERY))
    other = make_folder(dataset, 1, 1, origin)
    numbers = {"train": 3, "val": 1, "test": 2}
    for part, number in numbers.items():
        counts = Counter(name.partition("/")[0] for name in names(every, part))
        assert set(counts.values()) == {number} and len(counts) == GROUP_SIZE
    assert names(few, "train") < names(every, "train")
    assert len(names(few, "train")) == GROUP_SIZE
    for part in ("val", "test"):
        assert names(few, part) == names(every, part)
        assert not names(every, part) & names(every, "train")
    assert names(other, "test") != names(few, "test")


def draw_noise(path: Path, seed: int, size: tuple[int, int] = (90, 60)) -> Path:
    """Blobs that survive a smaller size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def test_photographs_that_were_trained_on_are_left_out(tmp_path: Path, tiny_folder: Path) -> None:
    numbers = {"train/ants": 25, "train/bees": 24, "val/ants": 2, "val/bees": 3}
    folder = tmp_path / "photographs"
    for place, number in numbers.items():
        for index in range(number):
            draw_noise(folder / place / f"{index:02}.jpg", crc32(f"{place}{index}".encode()))
    with Image.open(folder / "val" / "bees" / "01.jpg") as image:
        image.resize((64, 64)).save(tmp_path / "small.webp")
    origin = Origin(folder, tmp_path, tmp_path)
    (tmp_path / "source.csv").write_text("path,label\nsmall.webp,bee\n")
    made = make_folder(DATASETS["ants-bees"], EVERY, 0, origin)
    assert names(made, "test") == {"ants/00.jpg", "ants/01.jpg", "bees/00.jpg", "bees/02.jpg"}
    assert len(names(made, "train")) == 5 + 4


def test_copies_at_other_sizes_are_found(tmp_path: Path) -> None:
    photographs = [draw_noise(tmp_path / f"{seed}.png", seed) for seed in range(6)]
    with Image.open(photographs[2]) as image:
        image.crop((15, 0, 75, 60)).resize((64, 64)).save(tmp_path / "cropped.png")
    with Image.open(photographs[4]) as image:
        image.resize((64, 64)).save(tmp_path / "squashed.png")
    source = [tmp_path / "cropped.png", tmp_path / "squashed.png"]
    likeness = compute_likeness(photographs, source)
    assert [place for place, one in enumerate(likeness) if one > 0.95] == [2, 4]
    assert max(likeness[place] for place in (0, 1, 3, 5)) < 0.6


# --- runs and what is made of them ------------------------------------------------------------------------


def test_a_run_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SEEDS", (0,))
    monkeypatch.setattr(transfer, "SIZES", (10,))
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], epochs=(1, 1, 1)))
    monkeypatch.setattr(transfer, "STRATEGIES", {name: STRATEGIES[name] for name in ("freeze", "random")})
    results = tmp_path / "results.jsonl"
    words = ["run", "--results", str(results), "--cache", str(tmp_path / "cache"), "--datasets", "digits"]
    assert transfer.main(words) == 0
    freeze, random = read_trials(results).values()
    for trial in (freeze, random):
        assert (trial.num_train, trial.num_test, trial.epochs) == (100, 600, 1)
    assert freeze.accuracy != random.accuracy, "the same weights twice"
    with results.open("a") as file:
        file.write('{"dataset": "dig')  # a process that was killed
    monkeypatch.setattr(transfer, "run_trial", lambda *_: pytest.fail("run again"))
    assert transfer.main(words) == 0
    monkeypatch.setattr(transfer, "describe_weights", lambda: "others")
    assert not read_trials(results), "results of other weights do not count"


def made_up() -> list[Trial]:
    """Transfer is worth 30 points with 10 images, and nothing with all; validation prefers ``top``."""
    accuracies = {
        "freeze": (0.6, 0.7),
        "top": (0.5, 0.8),
        "full": (0.4, 0.9),
        "scratch": (0.3, 0.9),
        "random": (0.2, 0.2),
    }
    return [
        Trial(
            "digits",
            per_class,
            seed,
            strategy,
            DATASETS["digits"].find_epochs(per_class),
            describe_weights(),
            accuracy + 0.01 * seed,
            float(strategy == "top"),
            1.0,
            100,
            600,
        )
        for strategy, pair in accuracies.items()
        for per_class, accuracy in zip((10, EVERY), pair, strict=True)
        for seed in range(3)
    ]


def test_the_table(tmp_path: Path) -> None:
    head, _, few, every = build_page(made_up())
    assert head.startswith("| data set | images a class | images | epochs | seeds | `freeze` |")
    assert few.startswith(
        "| digits | 10 | 100 | 20 | 3 | **61.0** ± 1.0 | 51.0 ± 1.0 | 41.0 ± 1.0 | 31.0 ± 1.0 |"
    )
    assert few.endswith("| +20.0 ± 0.0 (`top`) |"), "chosen by validation, not by the test part"
    assert "**91.0** ± 1.0 | **91.0** ± 1.0 |" in every and every.endswith("| -10.0 ± 0.0 (`top`) |")
    assert "| all |" in every
    draw_plot(made_up(), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > image.height


def test_results_are_read_back(tmp_path: Path) -> None:
    for trial in made_up():
        append_trial(trial, tmp_path / "results.jsonl")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"dataset": "dig')  # a process that was killed
    append_trial(replace(made_up()[0], seed=7), tmp_path / "results.jsonl")
    append_trial(replace(made_up()[0], seed=8, epochs=99), tmp_path / "results.jsonl")
    assert list(read_trials(tmp_path / "results.jsonl").values())[:-1] == made_up()
    assert len(read_trials(tmp_path / "results.jsonl")) == len(made_up()) + 1
    keys = list(plan(["digits", "things"]))
    assert len(keys) == len(set(keys)) == 3 * 3 * 2 * len(STRATEGIES)


def test_a_bundle_of_a_run(cli: Cli, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw_folder(tmp_path / "data", {f"class{number}": 5 for number in range(6)})
    run = tmp_path / "run"
    words = ("run", "-b", tiny, "-d", data, "-s", "scratch", "--epochs", 1, "-o", run, "--seed", 3)
    done = cli(*words, "--img-size", 32)
    assert done.exit_code == 0, done.output
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    folder = tmp_path / "test_resnet.six"
    monkeypatch.setattr(bundle, "SIZES", (32, 64))
    assert bundle.main([str(run), str(folder), "--data", str(data), "--img-size", "64"]) == 0
    card = find_card(str(folder))
    assert (card.tag, card.license, card.num_classes) == ("six", "apache-2.0", 6)
    assert card.preprocessing.img_size == 64
    source = load_source(card)
    assert source.match.matched == source.match.total
    before = load_source(find_card(str(run))).network.state_dict()
    after = source.network.state_dict()
    for name, tensor in before.items():
        expected = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(after[name], expected), name
    readme = (folder / "README.md").read_text("utf-8")
    top1, top5 = 100 * metrics["accuracy"], 100 * metrics["top5_accuracy"]
    for fact in (card.sha256, f"top-1 {top1:.1f} %, top-5 {top5:.1f} %", "1 epochs, 32 x 32 pixels, seed 3"):
        assert fact in readme
    # Judged again from the file, at the size that it was judged at, it is as good as it was.
    assert f"| 32 | {top1:.1f} | {top5:.1f} |" in readme
