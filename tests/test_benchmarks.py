"""The benchmarks: what they measure, how they go on, and what they make of the metrics."""

from __future__ import annotations

import json
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # the benchmarks are not installed, they run from the checkout

import finetune
from benchmarks import __main__ as command
from benchmarks import (
    accuracy,
    first_hour,
    gpu,
    harness,
    peers_env,
    safety,
    several_labels,
    strategies,
    time_to_accuracy,
    transfer,
)
from benchmarks.data import SQUEEZENET, find_cifar, find_cifar_curves, find_folder, find_network
from benchmarks.harness import Bench, Case, Question, Turn, measure_apart, plan_turns
from benchmarks.machine import describe_machine
from benchmarks.page import fill_page, write_section
from benchmarks.results import DifferentMachineError, Figures, Result, Results
from benchmarks.source import SOURCE, TARGET
from benchmarks.timing import ProcessFailedError, run_timed
from finetune.errors import ExitCode

MACHINE = {"processor": "a processor", "cores": 2, "memory_gb": 8, "torch": "2.15.0", "threads": 2}
MACHINE |= {"system": "Linux", "revision": "abc", "finetune": "0.1.0", "workers": 1, "when": "2026-01-01"}
MACHINE |= {"gpu": None, "python": "3.11"}


SPLITS = ("train", "val", "test")


def load(name: str) -> Question:
    question: Question = __import__(f"benchmarks.{name}", fromlist=["QUESTION"]).QUESTION
    return question


def draw(path: Path, seed: int, size: tuple[int, int] = (90, 70)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The original images and weights in small, and our own Python in place of the peers'."""
    import torch
    from safetensors.torch import save_file
    from torchvision import models

    source, cache = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("cache")
    for seed in range(40):
        split = "train" if seed < 28 else "val"
        draw(source / "hymenoptera" / split / ("ants", "bees")[seed % 2] / f"{seed}.jpg", seed)
    (source / "hymenoptera" / "train" / "ants" / "imageNotFound.gif").write_bytes(b"GIF")
    with zipfile.ZipFile(source / "sets.zip", "w") as archive:
        for seed in range(36):
            split, label = "train" if seed < 30 else "val", f"class{seed % 2}"
            draw(source / "image.png", 100 + seed)
            archive.write(source / "image.png", f"wbc4/{split}/{label}/{seed}.png")
    with zipfile.ZipFile(source / "cifar10.zip", "w") as archive:
        for seed in range(120):
            label, part = (*SOURCE, *TARGET)[seed % 10], "train" if seed < 80 else "test"
            draw(source / "image.jpg", seed, (32, 32))
            archive.write(source / "image.jpg", f"{part}/{label}/{seed:04}.jpg")
    torch.manual_seed(0)
    save_file(models.squeezenet1_0(weights=None).state_dict(), source / SQUEEZENET)
    python = cache / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return Bench(source, cache, quick=True)


# --- results ---------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(tmp_path / "results.jsonl")
    results.begin(MACHINE)
    for tool, walls in {"finetune": (10, 20, 10), "fastai": (200, 220, 180)}.items():
        for repeat, wall in enumerate(walls):
            figures = {"wall": wall, "accuracy": 0.9, "training": wall / 2}
            results.add(Result("commands-freeze-squeezenet-20", tool, repeat, figures))
    return results


def test_ratios_are_of_the_same_turn(results: Results) -> None:
    case = "commands-freeze-squeezenet-20"
    ratios = results.ratios(case, "fastai", "finetune")
    assert ratios == (18.0, 11.0, 20.0)  # of 20, 11 and 18; the ratio of the medians would be 20
    results.add(Result(case, "fastai", 3, {"wall": 9999}))
    assert results.ratios(case, "fastai", "finetune") == ratios
    assert results.ratios("commands-top-squeezenet-20", "fastai", "finetune") is None


def test_a_line_that_was_cut_off_is_measured_again_and_spoils_no_other(results: Results) -> None:
    results.path.write_text(results.path.read_text()[:-30])
    again = Results(results.path)
    assert not again.has("commands-freeze-squeezenet-20", "fastai", 2)
    again.add(Result("commands-freeze-squeezenet-20", "fastai", 2, {"wall": 1}))
    assert Results(results.path).has("commands-freeze-squeezenet-20", "fastai", 2)


def test_another_machine_does_not_go_on(results: Results) -> None:
    results.begin(MACHINE | {"when": "later", "revision": "def"})
    with pytest.raises(DifferentMachineError, match="threads 2 -> 1"):
        results.begin(MACHINE | {"threads": 1})


# --- the harness -----------------------------------------------------------------------------------------


def test_tools_take_turns_and_what_failed_is_tried_again(
    results: Results, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, started = Case("commands-freeze-squeezenet-20", ("finetune", "fastai")), []
    results.add(Result(case.name, "finetune", 1, {}, "exit status 1"))

    def measure(question: Question, turn: Turn) -> Result:
        started.append((turn.tool, turn.repeat))
        return Result(turn.case.name, turn.tool, turn.repeat, {"wall": 1.0})

    monkeypatch.setattr(harness, "measure_apart", measure)
    assert [(turn.repeat, turn.tool) for turn in plan_turns(case, 2, bench)] == [
        (0, "finetune"),
        (0, "fastai"),
        (1, "finetune"),
        (1, "fastai"),
    ]
    harness.run(load("commands"), case, bench, Results(results.path), 4)
    assert started == [("finetune", 1), ("finetune", 3), ("fastai", 3)]
    harness.run(load("commands"), case, bench, Results(results.path), 4)
    assert len(started) == 3


def test_a_measurement_that_fails_says_why_and_leaves_nothing(bench: Bench) -> None:
    case = Case("startup-second-2", network="no such network")
    result = measure_apart(load("startup"), Turn(case, "finetune", 0, bench.cache / "work" / "failed", bench))
    assert result.failed.startswith("KeyError") and result.figures == {}
    assert not (bench.cache / "work" / "failed").exists()


def test_every_question_plans_cases_of_its_own_name(bench: Bench) -> None:
    for name in command.NAMES:
        question = load(name)
        for quick in (False, True):
            cases = question.plan(replace(bench, quick=quick, cuda=True))
            assert cases and question.name == name
            assert all(case.name.startswith(f"{name}-") and case.tools for case in cases)
            assert len({case.name for case in cases}) == len(cases)


def test_a_misspelt_name_is_refused(bench: Bench) -> None:
    with pytest.raises(SystemExit):
        command.main(["comands"])
    questions, whole = [load("commands"), load("transfer")], replace(bench, quick=False)
    with pytest.raises(ValueError, match="frieze"):
        command.plan(questions, whole, "*-resnet18-*,frieze")
    chosen = [case.name for _, case in command.plan(questions, whole, "*top-resnet18-*")]
    assert chosen == [f"commands-top-resnet18-{number}" for number in (1, 5, 20)]


def test_a_quick_run_does_not_mix_with_a_whole_one() -> None:
    quick, whole = (command.read_arguments(["speed", *more]) for more in (["--quick"], []))
    assert quick.results != whole.results and (quick.repeats, whole.repeats) == (1, 3)
    assert whole.names == list(command.SPEED)


def test_the_peers_are_pinned_and_bring_no_torch() -> None:
    lines = peers_env.REQUIREMENTS.read_text().splitlines()
    names = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert "fastai" in names and not {"torch", "torchvision", "timm"} & set(names)


# --- pages -----------------------------------------------------------------------------------------------


def test_a_page_gets_its_tables_and_keeps_its_words(results: Results, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- measured: commands -->\nold\n<!-- end -->\nAfter <!-- end -->.\n")
    results.add(Result("commands-top-squeezenet-20", "fastai", 0, {}, "exit status 1: a | b\nc"))
    fill_page([load("commands")], results, page)
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After <!-- end -->.\n") and "old" not in text
    row = (
        "| freeze-squeezenet-20 | fastai | 18.00x [11.00..20.00] | 200 [180..220] | 100 [90.0..110] | 0.900 |"
    )
    assert row.replace("18.00x [11.00..20.00]", "18.0x [11.0..20.0]") in text
    assert "| commands-top-squeezenet-20 | fastai | 0 | exit status 1: a / b c |" in text
    with Image.open(page.with_suffix(".png")) as image:
        assert min(image.size) > 100
    with pytest.raises(ValueError, match="measured: limits"):
        fill_page([load("limits")], results, page)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("benchmarks", command.SPEED),
        ("transfer", ["transfer"]),
        ("advise", ["strategies"]),
        ("faults", ["safety"]),
        ("data", ["draft"]),
        ("predict", ["predict"]),
        ("time-to-accuracy", ["time_to_accuracy", "several_labels"]),
    ],
)
def test_every_question_has_its_place_in_docs(page: str, names: list[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text("utf-8")
    for name in names:
        assert text.count(f"<!-- measured: {name} -->\n") == 1, name
    assert text.count("<!-- measured: ") == text.count("<!-- end -->")


# --- one process -----------------------------------------------------------------------------------------


def test_a_process_is_watched_to_its_end(tmp_path: Path) -> None:
    code = "import pathlib, time; pathlib.Path('here').touch(); time.sleep(0.2); print(input.__name__)"
    figures, said = run_timed((sys.executable, "-c", code), tmp_path, tmp_path / "here")
    assert said == "input\n" and 0 < figures["appeared"] < figures["wall"]
    assert figures["rss_mb"] > 1 and figures["peak_mb"] > 1
    with pytest.raises(ProcessFailedError, match="exit status 3: the reason"):
        code = "import sys; sys.stderr.write('the reason'); sys.exit(3)"
        run_timed((sys.executable, "-c", code), tmp_path)
    with pytest.raises(ProcessFailedError, match="exit status -9"):
        run_timed((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path, limit=0.1)


# --- data sets and accuracy ------------------------------------------------------------------------------


def names(folder: Path, split: str) -> set[str]:
    return {str(path.relative_to(folder / split)) for path in (folder / split).glob("*/*")}


def test_photographs_are_those_that_every_peer_reads(bench: Bench) -> None:
    folder = find_folder(find_network("squeezenet", bench), bench)
    assert len(names(folder, "train")) == 28 and len(names(folder, "val")) == 12


def test_what_judges_does_not_depend_on_what_is_learned_from(bench: Bench) -> None:
    few, every, other = (
        accuracy.make_folder("wbc4", size, seed, bench)
        for size, seed in ((3, 0), (accuracy.EVERY, 0), (3, 1))
    )
    assert names(few, "train") < names(every, "train")
    assert (len(names(few, "train")), len(names(every, "train")), len(names(few, "val"))) == (6, 20, 10)
    assert names(few, "test") == names(every, "test") == names(other, "test") and len(names(few, "test")) == 6
    assert names(few, "val") == names(every, "val") != names(other, "val")
    assert not names(every, "val") & names(every, "train")


def record(results: Results, case: str, values: dict[str, tuple[float, ...]], **more: object) -> Results:
    for tool, accuracies in values.items():
        for seed, value in enumerate(accuracies):
            figures: Figures = {"accuracy": value, "val_accuracy": float(tool == "top"), "strategy": tool}
            figures |= {"num_train": 40, "num_test": 100, "cpu": 1.0} | more
            results.add(Result(case, tool, seed, figures))
    return results


def test_regret_is_against_the_best_by_mean_and_against_the_best_of_each_seed(tmp_path: Path) -> None:
    values = {"freeze": (0.8, 0.6), "top": (0.7, 0.9), "auto": (0.8, 0.7)}
    results = record(Results(tmp_path / "a.jsonl"), "strategies-lite0-wbc4-10-20", values)
    (runs,) = accuracy.collect(results, "strategies-lite0").values()
    assert strategies.regrets(runs, "auto") == (pytest.approx(0.05), pytest.approx(0.1))
    record(results, "strategies-lite0-wbc4-10-20", {"full": (1.0,)})
    (runs,) = accuracy.collect(results, "strategies-lite0").values()  # seeds that all have finished
    assert {len(some) for some in runs.values()} == {1}


def test_the_table_of_strategies(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.jsonl")
    record(results, "strategies-lite0-wbc4-10-20", {"freeze": (0.8, 0.8), "top": (0.9, 0.9)})
    record(results, "strategies-lite0-coffee5-10-20", {"freeze": (0.6, 0.6), "top": (0.5, 0.5)})
    record(results, "strategies-lite0-wbc4-10-20", {"auto": (0.9, 0.88)}, strategy="top")
    record(results, "strategies-lite0-coffee5-10-20", {"auto": (0.6, 0.5)}, strategy="freeze")
    text = "\n".join(write_section(load("strategies"), results))
    assert "| wbc4-10-20 | 40 | 2 | 100 | 3.0 | 80.0 | **90.0** | 89.0 | top | +1.0 | +1.0 |" in text
    assert "- always `freeze`: 5.00 ± 5.00 and 5.00 ± 5.00" in text
    assert "- `auto`: 3.00 ± 2.00 and 3.00 ± 2.00" in text
    assert "In 3 of 4 runs" in text and "in 2 none was better" in text


def test_the_table_of_transfer(tmp_path: Path) -> None:
    spread: Callable[[float], tuple[float, ...]] = lambda value: (value, value + 0.01, value + 0.02)  # noqa: E731
    values = {
        tool: spread(one) for tool, one in {"freeze": 0.6, "top": 0.5, "full": 0.4, "auto": 0.45}.items()
    }
    results = record(Results(tmp_path / "a.jsonl"), "strategies-lite0-digits-10-20", values)
    record(results, "transfer-lite0-digits-10-20", {"scratch": spread(0.3)})
    record(results, "transfer-squeezenet-digits-10-20", {"scratch": spread(0.3)})
    text = "\n".join(write_section(load("transfer"), results))
    cells = "**61.0 ± 1.0** | 51.0 ± 1.0 | 41.0 ± 1.0 | 46.0 ± 1.0 | 31.0 ± 1.0"
    assert f"| digits-10-20 | 40 | 3 | {cells} |" in text
    assert text.count("Not measured.") == 1
    assert "| +20.0 ± 0.0 (`top`) |" in text, "chosen by validation images, not by the test images"
    transfer.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("goal", "seconds"), [(0.5, 10.0), (0.7, 40.0), (0.8, 40.0), (0.9, None), (0.0, 10.0)]
)
def test_an_accuracy_counts_from_when_it_is_kept(goal: float, seconds: float | None) -> None:
    """The process took 50 s; its epochs ended after 10, 20, 30, 40 s. That of 20 s was not kept."""
    curve = [(40.0, 0.6), (30.0, 0.8), (20.0, 0.6), (10.0, 0.8)]
    assert time_to_accuracy.find_reached({"wall": 50.0, "curve": curve}, goal) == seconds


def test_the_table_of_times_compares_with_fastai_of_the_same_turn(tmp_path: Path) -> None:
    results, case = Results(tmp_path / "a.jsonl"), "time_to_accuracy-tf_efficientnet_lite0-coffee5"
    for turn, (goal, ours) in enumerate([(0.8, 0.9), (0.8, 0.7)]):
        found = {"wall": 110.0, "last_accuracy": goal, "num_val": 100, "curve": [(60.0, 0.1), (10.0, goal)]}
        results.add(Result(case, "fastai", turn, found))
        own = {"wall": 20.0, "last_accuracy": ours, "num_val": 100, "curve": [(0.0, ours)]}
        results.add(Result(case, "finetune auto", turn, own))
        results.add(Result(case, "limit", turn, {"wall": 7.0, "num_val": 100}))
    text = "\n".join(write_section(load("time_to_accuracy"), results))
    assert "| coffee5 | fastai | 100 | 1.00x | 110 | 0.800 (0.711 to 0.867) | - |" in text
    assert "| coffee5 | **finetune auto** | 20.0 (1 never) | 5.00x | 20.0 |" in text
    assert "| coffee5 | limit: every image once |  |  | 7.00 |  |  |" in text


def test_pairs_have_the_classes_of_their_halves(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sets.zip", "w") as archive:
        for seed in range(60):
            split, label = ("train" if seed < 40 else "val"), f"class{seed % 3}"
            draw(tmp_path / "image.jpg", seed)
            archive.write(tmp_path / "image.jpg", f"grocery22/{split}/{label}/{seed}.jpg")
    table = several_labels.find_pairs(Bench(tmp_path, tmp_path / "cache", quick=True))
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    assert {split for _, _, split in rows} == {"train", "val"}
    assert {len(labels.split("|")) for _, labels, _ in rows} == {1, 2}  # 1: both halves of one class
    with Image.open(table.parent / rows[0][0]) as image:
        assert image.size == (2 * several_labels.SIDE, several_labels.SIDE)


def test_the_machine_is_described_with_every_version() -> None:
    found = describe_machine(1, 0, quick=True)
    assert found["finetune"] == finetune.__version__ and found["timm"] == timm.__version__


# --- the first hour on a GPU -----------------------------------------------------------------------------


def test_the_first_hour_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--first-hour", "--cache", str(tmp_path)]) == ExitCode.ENVIRONMENT
    said = capsys.readouterr()
    assert "No GPU was found" in said.err and "--device cpu" in said.err and not said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_first_hour_runs_items_and_goes_on_after_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For real, on a CPU; the images of the third cannot be had."""
    (tmp_path / "blobs-40-32").write_text("not a folder")
    words = ["--first-hour", "--device", "cpu", "--cache", str(tmp_path), "tests", "versions", "freeze"]
    assert gpu.main(words) == 1
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[-1]) for row in rows[2:]] == [
        ("| versions", "ok |"),
        ("| tests", "- |"),
        ("| freeze", "FAIL |"),
    ]
    assert rows[2][1].startswith("torch ") and rows[3][1] == "needs 1 GPU" and "exit status 1" in rows[4][1]
    (tmp_path / "blobs-40-32").unlink()
    assert gpu.main(words) == 0
    said = capsys.readouterr()
    assert "| freeze | load " in said.out and "versions" not in said.err, "it was done, and is not run again"


def test_an_item_of_the_first_hour_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_hour, "QUICK_SECONDS", 0.2)
    options = Namespace(cache=tmp_path, device="cpu", quick=True)
    assert "exit status -9" in first_hour.run_item(first_hour.ITEMS[0], options).failed


def test_the_first_hour_is_the_list_of_its_page() -> None:
    page = (Path(__file__).parent / "gpu" / "README.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines()]
    rows = [row for row in rows if len(row) == 3][1:]
    assert [(row[0], row[2]) for row in rows] == [(item.name, item.expected) for item in first_hour.ITEMS]


# --- a small pass of each --------------------------------------------------------------------------------


def measure_quickly(name: str, bench: Bench, tool: str | None = None) -> Figures:
    """Return what a process of its own found for the last case."""
    question = load(name)
    case = question.plan(bench)[-1]
    turn = Turn(case, tool or case.tools[0], 0, bench.cache / "work" / f"{name}-{tool}", bench)
    result = measure_apart(question, turn)
    assert not result.failed, result.failed
    assert json.loads(json.dumps(result.figures)) == result.figures
    assert set(question.columns.values()) - {"accuracy", "images_per_second", "training"} <= set(
        result.figures
    )
    return result.figures


def test_parts_that_safety_times_are_there() -> None:
    with safety.timed_parts() as seconds:
        assert set(seconds) == set(safety.PARTS)


@pytest.mark.slow
def test_bare_speed(bench: Bench) -> None:
    assert min(measure_quickly("limits", bench).values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pillow", "finetune-training", "plain-training", "timm-training"])
def test_pipeline(bench: Bench, tool: str) -> None:
    assert measure_quickly("pipeline", bench, tool)["images_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["finetune", "plain", "timm"])  # fastai is not among our requirements
def test_commands(bench: Bench, tool: str) -> None:
    figures = measure_quickly("commands", bench, tool)
    assert 0 <= figures["accuracy"] <= 1 and 0 < figures["training"] <= figures["wall"]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["finetune", "torchvision"])
def test_extract(bench: Bench, tool: str) -> None:
    assert measure_quickly("extract", bench, tool)["wall"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["startup", "scaling", "overhead", "safety", "predict"])
def test_a_small_pass(name: str, bench: Bench) -> None:
    assert all(isinstance(value, int | float) for value in measure_quickly(name, bench).values())


@pytest.mark.slow
def test_a_small_pass_of_each_network(bench: Bench) -> None:
    figures = measure_quickly("depth", bench)
    assert len(figures["train_loss"]) == len(figures["test_accuracy"]) == 2
    reduced = measure_quickly("modules", bench, "reduced")
    naive = measure_quickly("modules", bench, "naive")
    assert reduced["macs"] < naive["macs"] and reduced["forward"] > 0 < reduced["forward_backward"]
    for tool in ("top", "scratch"):
        assert 0 <= measure_quickly("source", bench, tool)["accuracy"] <= 1
    kept = bench.cache / "source"
    assert [path.name for path in kept.iterdir()] == ["cifar_resnet20-6-1-0"]


@pytest.mark.slow
def test_a_small_pass_of_each_runtime(bench: Bench) -> None:
    results = Results(bench.cache / "runtimes.jsonl")
    for tool in ("torch", "onnxruntime"):
        results.add(Result("runtimes-x", tool, 0, measure_quickly("runtimes", bench, tool)))
    [row] = [line for line in load("runtimes").lines(results) if line.startswith("| x")]
    assert row.count("|") == 6


def test_parts_of_cifar_share_no_image(bench: Bench) -> None:
    folder = find_cifar(6, bench, TARGET)
    files = {split: sorted(path.name for path in (folder / split).rglob("*.jpg")) for split in SPLITS}
    assert [len(files[split]) for split in SPLITS] == [30, 10, 20]
    assert len({name for names in files.values() for name in names}) == 60
    assert {path.name for path in (folder / "val").iterdir()} == set(TARGET)
    assert find_cifar(6, bench) != folder
    curves = find_cifar_curves(6, bench)
    assert sorted(path.name for path in curves.iterdir()) == ["train", "val"]
    seen = {path.name for path in (find_cifar(6, bench) / "test").rglob("*.jpg")}
    assert {path.name for path in (curves / "val").rglob("*.jpg")} == seen


def test_networks_are_written_as_tables_and_curves(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.begin(MACHINE)
    for tool, loss in {"cifar_plain20": 1.0, "cifar_plain56": 1.5}.items():
        for repeat in range(2):
            figures = {
                "train_loss": [2.0, loss],
                "test_accuracy": [0.3, 1 - loss / 2],
                "cpu": 9,
            }
            results.add(Result("depth-6-2", tool, repeat, figures))
    for tool, cost in {"one of 5x5": 25, "two of 3x3": 18}.items():
        figures = {"parameters": cost, "macs": cost, "forward": 100.0, "forward_backward": 50.0}
        results.add(Result("modules-5x5", tool, 0, figures))
    for tool in ("freeze", "scratch"):
        results.add(
            Result("source-10-40", tool, 0, {"accuracy": 0.5 if tool == "scratch" else 0.75, "cpu": 3})
        )
    page = tmp_path / "networks.md"
    names = ("depth", "modules", "source")
    page.write_text("".join(f"<!-- measured: {name} -->\n<!-- end -->\n" for name in names))
    fill_page([load(name) for name in names], results, page)
    text = page.read_text()
    assert "| 6-2 | plain56 | 2 | 1.500 | 25.0 ± 0.0 | 9 |" in text
    assert "- plain, 56 layers instead of 20: training loss +0.500, test accuracy -25.0 ± 0.0 points" in text
    assert "| 5x5: two of 3x3 | 18.0 (0.72x) | 18.0 (0.72x) | 100 (1.00x) | 50.0 (1.00x) |" in text
    assert "**75.0 ± 0.0**" in text and "resnet, 56" not in text
    assert Image.open(page.with_suffix(".png")).width > 600


def draw_of(left_out: list[float], lead: float, test: list[float]) -> dict[str, list[float]]:
    return {"left_out": left_out, "lead": [0.0, 0.0, lead], "lead_error": [0.01] * 3, "test": test}


def test_what_each_choice_of_features_loses(tmp_path: Path) -> None:
    lucky = draw_of([0.9, 0.8, 0.8], 0.0, [0.5, 0.6, 0.7])
    lucky["lead"][0] = 0.1  # a stage that is the best by luck
    led = draw_of([0.1, 0.8, 0.7], -0.1, [0.4, 0.9, 0.8])
    results = Results(tmp_path / "results.jsonl")
    results.add(Result("layers-lite0-digits", "finetune", 0, {"draws": [lucky, led]}))
    [row] = [line for line in load("layers").lines(results) if "lite0-digits" in line]
    assert row == "| lite0-digits | 2 | 80.0 | 5.0 | 5.0 | 0.0 | 10.0 |"


@pytest.mark.slow
def test_features_are_judged(bench: Bench) -> None:
    [draw] = measure_quickly("layers", bench)["draws"]
    assert {len(values) for values in draw.values()} == {9} and all(0 <= one <= 1 for one in draw["test"])


def test_the_regret_of_a_tool_is_that_of_its_turn(tmp_path: Path) -> None:
    results, case = Results(tmp_path / "a.jsonl"), "budget-coffee5-90"
    for turn, (ours, peer) in enumerate([(0.9, 0.8), (0.7, 0.8)]):
        own = {"wall": 80.0, "tried": 6, "accuracy": ours, "optimistic": 0.95}
        results.add(Result(case, "finetune budget", turn, own))
        other = {"wall": 99.0, "tried": 1, "accuracy": peer, "optimistic": None}
        results.add(Result(case, "fastai", turn, other))
    text = "\n".join(write_section(load("budget"), results))
    row = "**finetune budget** | 80 | 6 | 80.0 ± 14.1 | 95.0 ± 0.0 | 5.0 ± 7.1 |"
    assert f"| coffee5 | 90 | {row}" in text and f"| **all** |  | {row}" in text
    assert "| coffee5 | 90 | fastai | 99 | 1 | 80.0 ± 0.0 | - | 5.0 ± 7.1 |" in text


def forecast_of(name: str, truth: float, needed: list[int | None], answer: str) -> dict[str, object]:
    facts = {"set": name, "times": 2, "seen": 50, "images": 100.0, "tested": 100.0, "softmax": truth + 0.02}
    facts |= {"forecast": 0.8, "low": 0.75, "high": 0.85}
    return facts | {"truth": truth, "answer": answer, "needed": needed}


def test_how_often_a_forecast_holds(tmp_path: Path) -> None:
    held = forecast_of("digits", 0.84, [90, 100, None], "images")
    missed = forecast_of("digits", 0.74, [40, 60, 90], "images")
    silent = forecast_of("wbc4", 0.8, [None, None, None], "cannot say")
    results = Results(tmp_path / "results.jsonl")
    results.add(Result("forecast-lite0-digits", "finetune", 0, {"forecasts": [held, missed]}))
    results.add(Result("forecast-lite0-wbc4", "finetune", 0, {"forecasts": [silent]}))
    lines = [*load("forecast").lines(results)]
    said = "50 | 2x | 2 | 1 of 2 (50%) | 10.0 | 5.0 | +1.0 | 50% | 1 of 2; cannot say 0 |"
    assert f"| handwritten digits | {said}" in lines and f"| **the other three** | {said}" in lines
    assert (
        "| **all** | 50 | 2x | 3 | 2 of 3 (67%) | 10.0 | 3.3 | +0.7 | 67% | 1 of 2; cannot say 1 |" in lines
    )
    assert len(lines) == 2 + 5


@pytest.mark.slow
def test_a_forecast_of_digits_is_judged(bench: Bench) -> None:
    twice, four_times = measure_quickly("forecast", bench)["forecasts"]
    assert (twice["times"], four_times["times"]) == (2, 4) and four_times["images"] == 1797
    assert abs(twice["images"] - 2 * twice["seen"]) <= 10 and twice["tested"] < four_times["tested"]
    assert abs(four_times["forecast"] - four_times["truth"]) < 0.15


@pytest.mark.slow
def test_reduced_images(bench: Bench) -> None:
    assert set(measure_quickly("draft", bench, "whole")) == {"accuracy", "loss"}
    assert 0 <= measure_quickly("draft", bench, "time")["reduced"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tool"), [("strategies", "auto"), ("transfer", "scratch")])
def test_a_small_run_on_digits(name: str, tool: str, bench: Bench) -> None:
    figures = measure_quickly(name, bench, tool)
    assert (figures["num_train"], figures["num_test"]) == (100, 600)


def test_what_an_audit_found_is_written(tmp_path: Path) -> None:
    alarms = {
        "none 0.0": [[], [], ["size"], []],
        "stamp 0.1": [["surroundings"], ["border", "quality"]],
        "order 0.8": [["order"], ["order"]],
    }
    results = Results(tmp_path / "results.jsonl")
    results.add(Result("shortcuts-wbc4", "finetune", 0, {"num_images": 80, "alarms": alarms}))
    lines = [*load("shortcuts").lines(results)]
    assert "| wbc4 | stamp | 50 | - | - | - | - |" in lines
    assert "| wbc4 | order | - | - | - | - | 100 |" in lines
    [row] = [line for line in lines if line.startswith("| all |")]
    assert row.startswith("| all | 25.0 (4.6 to 69.9) of 4 | 25.0 (4.6 to 69.9) of 4 |")


@pytest.mark.slow
def test_shortcuts_are_planted(bench: Bench) -> None:
    found = measure_quickly("shortcuts", bench)
    assert len(found["alarms"]["none 0.0"]) == 2 and len(found["alarms"]) == 16
