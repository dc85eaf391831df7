"""How the bundled backbone is made, and what it is compared on."""

from __future__ import annotations

import json
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite is not installed, it runs from the checkout

from benchmarks import bundle, tiny_imagenet, transfer
from benchmarks.tiny_imagenet import GROUP_SIZE, draw_groups
from benchmarks.transfer import STRATEGIES, Trial, append_trial, plan, read_trials
from benchmarks.transfer_data import DATASETS, EPOCHS, EVERY, Origin, make_folder
from benchmarks.transfer_page import build_page, draw_plot
from finetune.data.discover import discover
from pretrained.backbone import load_source
from pretrained.catalog import find_card
from tests.conftest import Cli

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
    picture = folder / "picture.webp"
    with zipfile.ZipFile(folder / "tiny.zip", "w") as archive:
        for place, label in enumerate(LABELS):
            for number in range(6):
                Image.new("RGB", (8, 8), (9 * place, 40 * number, 0)).save(picture, lossless=True)
                archive.write(picture, f"{label}/{number}.webp")
    assert tiny_imagenet.main([str(folder / "tiny.zip"), str(folder / "out")]) == 0
    return folder / "out"


def test_the_tables_are_data_sets(tiny_folder: Path) -> None:
    source = discover(tiny_folder / "source.csv", 0.2, 0)
    assert source.classes == tuple(draw_groups(LABELS)["source"])
    assert len(source.samples) == 6 * len(source.classes)


def test_what_judges_does_not_depend_on_what_is_learned_from(tmp_path: Path, tiny_folder: Path) -> None:
    dataset = replace(DATASETS["things"], val=1, test=2)
    origin = Origin(tmp_path, tiny_folder)
    few, every = (make_folder(dataset, number, 0, tmp_path, origin) for number in (1, EVERY))
    other = make_folder(dataset, 1, 1, tmp_path, origin)

    def names(folder: Path, part: str) -> set[str]:
        return {str(path.relative_to(folder / part)) for path in (folder / part).glob("*/*")}

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


def test_photographs_are_judged_on_their_own_part(tmp_path: Path) -> None:
    numbers = {"train/ants": 25, "train/bees": 24, "val/ants": 2, "val/bees": 3}
    for place, number in numbers.items():
        for index in range(number):
            path = tmp_path / "photographs" / place / f"{index:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (5 * index, 0, 0)).save(path)
    origin = Origin(tmp_path / "photographs", tmp_path)
    folder = make_folder(DATASETS["ants-bees"], EVERY, 0, tmp_path, origin)
    assert len(list((folder / "test" / "bees").iterdir())) == 3
    assert len(list((folder / "train" / "ants").iterdir())) == 5


# --- runs and what is made of them ------------------------------------------------------------------------


def test_a_run_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SEEDS", (0,))
    for module in (transfer, transfer.sys.modules["benchmarks.transfer_page"]):
        monkeypatch.setattr(module, "EPOCHS", {10: 1})
    monkeypatch.setattr(transfer, "STRATEGIES", {"freeze": {}})
    results = tmp_path / "results.jsonl"
    words = ["run", "--results", str(results), "--cache", str(tmp_path / "cache"), "--datasets", "digits"]
    assert transfer.main(words) == 0
    (trial,) = read_trials(results).values()
    assert (trial.num_train, trial.num_test, trial.epochs) == (100, 600, 1)
    assert trial.accuracy > 0.1
    with results.open("a") as file:
        file.write('{"dataset": "dig')  # a process that was killed
    monkeypatch.setattr(transfer, "run_trial", lambda *_: pytest.fail("run again"))
    assert transfer.main(words) == 0


def made_up() -> list[Trial]:
    """Transfer is worth 30 points with 10 images, and nothing with all."""
    accuracies = {"freeze": (0.6, 0.7), "top": (0.5, 0.8), "full": (0.4, 0.9), "scratch": (0.3, 0.9)}
    return [
        Trial("digits", per_class, seed, strategy, EPOCHS[per_class], accuracy + 0.01 * seed, 1.0, 100, 600)
        for strategy, pair in accuracies.items()
        for per_class, accuracy in zip((10, EVERY), pair, strict=True)
        for seed in range(3)
    ]


def test_the_table(tmp_path: Path) -> None:
    head, _, few, every = build_page(made_up())
    assert head.startswith("| data set | images a class | images | epochs | `freeze` |")
    assert few == "| digits | 10 | 100 | 20 | **61.0** ± 1.0 | 51.0 ± 1.0 | 41.0 ± 1.0 | 31.0 ± 1.0 | +30.0 |"
    assert "**91.0** ± 1.0 | **91.0** ± 1.0 | +0.0 |" in every
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
    assert list(read_trials(tmp_path / "results.jsonl").values())[:-1] == made_up()
    assert len(read_trials(tmp_path / "results.jsonl")) == len(made_up()) + 1
    keys = list(plan(["digits", "things"]))
    assert len(keys) == len(set(keys)) == 3 * 3 * 2 * len(STRATEGIES)


def test_a_bundle_of_a_run(cli: Cli, tmp_path: Path, pictures: Path, tiny: Path) -> None:
    run = tmp_path / "run"
    done = cli("run", "-b", tiny, "-d", pictures / "train", "-s", "scratch", "--epochs", 1, "-o", run)
    assert done.exit_code == 0, done.output
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    metrics["top5_accuracy"] = 1.0  # of three classes it is not a figure
    (run / "metrics.json").write_text(json.dumps(metrics))
    folder = tmp_path / "test_resnet.three"
    words = [str(run), str(folder), "--data", str(pictures / "train"), "--img-size", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "SIZES", (32,))
        patch.setattr(torch.Tensor, "topk", lambda self, k: torch.topk(self, min(k, 3)))
        assert bundle.main(words) == 0
    card = find_card(str(folder))
    assert (card.tag, card.license, card.num_classes) == ("three", "apache-2.0", 3)
    source = load_source(card)
    assert source.match.matched == source.match.total
    before = load_source(find_card(str(run))).network.state_dict()
    after = source.network.state_dict()
    for name, tensor in before.items():
        expected = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(after[name], expected), name
    readme = (folder / "README.md").read_text("utf-8")
    assert card.sha256 in readme
    assert f"top-1 {100 * metrics['accuracy']:.1f} %" in readme
