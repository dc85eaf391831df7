"""The comparison of strategies: its images, how it goes on, and what it makes of the figures."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite is not installed, it runs from the checkout

from benchmarks import strategies
from benchmarks.data import TINY_IMAGENET
from benchmarks.strategies import Bench, RunFailedError, plan_runs, read_arguments, run_all, run_command
from benchmarks.strategies_data import (
    DATASETS,
    PARTS,
    PATTERNS,
    SIDE,
    DataSet,
    encode,
    grid,
    make_folder,
    place_ellipses,
)
from benchmarks.strategies_results import (
    STRATEGIES,
    Trial,
    append_trial,
    build_page,
    collect_rows,
    describe_setup,
    read_trials,
)

FIRST, SECOND = DATASETS[:2]
FIXED = ("freeze", "top", "full")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Originals in small: photographs of two classes, an archive of twelve."""
    folder = tmp_path_factory.mktemp("shared")
    for part, number in (("train", 9), ("val", 3)):
        for label in ("ants", "bees"):
            place = folder / "hymenoptera" / part / label
            place.mkdir(parents=True)
            for index in range(number):
                colour = (len(part) * 40, 200 * (label == "ants"), index * 25)
                Image.new("RGB", (8, 8), colour).save(place / f"{label}{index}.jpg")
    (folder / "hymenoptera" / "train" / "ants" / "imageNotFound.gif").write_bytes(b"GIF")
    with zipfile.ZipFile(folder / TINY_IMAGENET, "w") as archive:
        for label in range(12):
            for index in range(7):
                archive.writestr(
                    f"n{label:02}/{index}.webp", encode(Image.new("RGB", (8, 8), (label, index, 0)))
                )
    return folder


def read_parts(folder: Path) -> dict[str, list[bytes]]:
    return {part: [file.read_bytes() for file in sorted((folder / part).rglob("*.*"))] for part in PARTS}


# --- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("hymenoptera", 2), ("tiny_imagenet", 10), ("digits", 10), ("textures", 8), ("counting", 6)],
)
def test_a_seed_draws_the_same_images_and_another_seed_others(
    kind: str, classes: int, shared: Path, tmp_path: Path
) -> None:
    dataset = DataSet(kind, kind, "", train=2, test=None if kind == "hymenoptera" else 3, epochs=1)
    one, two, other = (
        read_parts(make_folder(dataset, seed, tmp_path / place, shared))
        for seed, place in ((0, "a"), (0, "b"), (1, "a"))
    )
    assert one == two != other
    assert {part: len(files) for part, files in one.items()} == {
        "train": 2 * classes,
        "val": 2 * classes,
        "test": 3 * classes,
    }
    files = [content for part in PARTS for content in one[part]]
    assert len(set(files)) == len(files)  # no image is in two parts


def test_photographs_are_judged_on_their_own_part_whatever_the_seed(shared: Path, tmp_path: Path) -> None:
    dataset = DataSet("a", "hymenoptera", "", 2, None, 1)
    one, other = (read_parts(make_folder(dataset, seed, tmp_path, shared)) for seed in (0, 1))
    kept = sorted(file.read_bytes() for file in (shared / "hymenoptera" / "val").rglob("*.jpg"))
    assert sorted(one["test"]) == sorted(other["test"]) == kept


def test_small_and_large_ones_of_a_kind_have_the_same_classes(shared: Path, tmp_path: Path) -> None:
    small, large = (
        make_folder(DataSet("a", "tiny_imagenet", "", number, 1, 1), 5, tmp_path, shared) for number in (1, 3)
    )
    names = [sorted(place.name for place in (folder / "train").iterdir()) for folder in (small, large)]
    assert names[0] == names[1] and len(names[0]) == 10


def test_data_sets_are_of_different_size_and_likeness() -> None:
    assert len({dataset.name for dataset in DATASETS}) == len(DATASETS) >= 5
    assert {(dataset.likeness, dataset.train > 20) for dataset in DATASETS} == {
        (likeness, large) for likeness in ("similar", "different") for large in (False, True)
    }
    assert all(dataset.epochs >= 8 and dataset.val <= 20 for dataset in DATASETS)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_a_texture_fills_the_image_and_never_comes_twice(name: str) -> None:
    rng = np.random.default_rng(0)
    first, second = PATTERNS[name](rng), PATTERNS[name](rng)
    assert first.shape == (SIDE, SIDE) and np.isfinite(first).all()
    assert 0.2 < np.abs(first).mean() < 1.2 and first.std() > 0.2
    assert not np.allclose(first, second)


def test_ellipses_do_not_touch_and_the_evaluation_view_shows_them_all() -> None:
    rng = np.random.default_rng(0)
    half = SIDE * 0.875 / 2
    for _ in range(50):
        placed = place_ellipses(6, rng)
        assert len(placed) == 6
        assert all(max(abs(x), abs(y)) + radius <= half for x, y, radius in placed)
        for index, (x, y, radius) in enumerate(placed):
            assert all(np.hypot(x - a, y - b) > radius + r for a, b, r in placed[:index])
    assert float(grid()[0].min()) <= -half


# --- runs --------------------------------------------------------------------------------------------


def make_trial(dataset: DataSet, seed: int, strategy: str, accuracy: float, **more: Any) -> Trial:
    given: dict[str, Any] = {"val_accuracy": 0.5, "chosen": strategy, "decided": {}, "seconds": 2.0}
    given |= {"cpu": 1.0, "num_train": 40, "num_classes": 2, "num_test": 100} | more
    return Trial(dataset.name, seed, strategy, describe_setup(dataset), accuracy, **given)


@pytest.fixture
def bench(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A place where no image is drawn."""
    monkeypatch.setattr(
        strategies, "make_folder", lambda dataset, seed, *_: tmp_path / f"{dataset.name}-{seed}"
    )
    return Bench(tmp_path / "results.jsonl", tmp_path / "cache", shared)


def pretend(folder: Path) -> None:
    folder.mkdir(parents=True)
    metrics = {"accuracy": 0.75, "val_accuracy": 0.7, "num_train": 40, "num_classes": 2, "num_samples": 153}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"strategy": "top"}))
    (folder / "recipe.yaml").write_text("strategy:\n  name: top\n  top_stages: 1\n")


def test_strategies_differ_in_their_own_words_only(bench: Bench, tmp_path: Path) -> None:
    lines = {name: bench.build_words(FIRST, 2, name, tmp_path / "out") for name in STRATEGIES}
    for name, words in STRATEGIES.items():
        start = lines[name].index("--strategy")
        assert lines[name][start : start + len(words)] == list(words)
        rest = lines[name][:start] + lines[name][start + len(words) :]
        assert rest == lines["top"][:start] + lines["top"][start + 2 :]
    given = dict(zip(lines["top"], lines["top"][1:], strict=False))
    assert given["--seed"] == "2" and given["--epochs"] == str(FIRST.epochs)
    assert STRATEGIES["probe"] == ("--strategy", "freeze", "--set", "strategy.features=last")


def test_runs_go_on_after_what_is_there_and_leave_nothing_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run_command(words: Sequence[str], cache: Path) -> None:
        assert not cache.exists()
        started.append(words[words.index("--strategy") + 1])
        if started == ["freeze", "top"]:
            raise RunFailedError("exit status 70: here")
        pretend(Path(words[words.index("--output") + 1]))

    monkeypatch.setattr(strategies, "run_command", run_command)
    keys = list(plan_runs([FIRST.name], FIXED, [0]))
    assert run_all(bench, keys) == 1 and started == ["freeze", "top", "full"]
    assert run_all(bench, keys) == 0 and started[3:] == ["top"]  # what failed is tried again
    trial = read_trials(bench.results)[FIRST.name, 0, "full"]
    assert (trial.accuracy, trial.chosen, trial.num_test) == (0.75, "top", 153)
    assert trial.decided == {"name": "top", "top_stages": 1}
    assert list(bench.cache.iterdir()) == []


def test_all_data_sets_have_a_first_seed_before_any_has_a_second() -> None:
    keys = list(plan_runs(["a", "b"], ["x", "y"], [0, 1]))
    assert keys[:4] == [("a", 0, "x"), ("a", 0, "y"), ("b", 0, "x"), ("b", 0, "y")]
    assert len(keys) == 8


def test_a_line_that_was_cut_off_is_run_again_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for strategy in FIXED:
        append_trial(make_trial(FIRST, 0, strategy, 0.5), path)
    path.write_text(path.read_text()[:-30])
    assert sorted(read_trials(path)) == [(FIRST.name, 0, "freeze"), (FIRST.name, 0, "top")]
    append_trial(make_trial(FIRST, 0, "full", 0.6), path)
    assert read_trials(path)[FIRST.name, 0, "full"].accuracy == 0.6


def test_figures_of_another_setup_do_not_count(tmp_path: Path) -> None:
    trial = make_trial(FIRST, 0, "top", 0.5)
    trial.setup["epochs"] += 1
    append_trial(trial, tmp_path / "results.jsonl")
    assert read_trials(tmp_path / "results.jsonl") == {}


def test_the_command_is_that_of_this_checkout_with_a_cache_of_its_own(tmp_path: Path) -> None:
    code = (
        "import os, sys, finetune\n"
        f"assert finetune.__file__.startswith({str(strategies.ROOT)!r})\n"
        f"assert os.environ['XDG_CACHE_HOME'] == {str(tmp_path)!r}\n"
        "sys.exit(sys.argv[1])"
    )
    run_command([sys.executable, "-c", code.replace("sys.exit(sys.argv[1])", "")], tmp_path)
    with pytest.raises(RunFailedError, match="exit status 1: the reason"):
        run_command([sys.executable, "-c", code, "the reason"], tmp_path)


def test_misspelt_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--results", str(tmp_path / "a.jsonl")]
    options = read_arguments(["run", *results, "--only", "digits-10,digits-60", "textures-10"])
    assert options.only == ["digits-10", "digits-60", "textures-10"]
    assert (options.strategies, options.seeds) == (["freeze", "top", "full", "auto"], [0, 1, 2])
    assert options.cache == tmp_path / "a"
    with pytest.raises(SystemExit):
        read_arguments(["run", *results, "--strategies", "top,ful"])
    assert "ful is not known" in capsys.readouterr().err


# --- the page ----------------------------------------------------------------------------------------


def make_trials(*rows: tuple[DataSet, str, Sequence[float]], **more: Any) -> dict[Any, Trial]:
    trials = [
        make_trial(dataset, seed, strategy, accuracy, **more)
        for dataset, strategy, accuracies in rows
        for seed, accuracy in enumerate(accuracies)
    ]
    return {trial.key: trial for trial in trials}


def test_regret_is_against_the_best_by_mean_and_against_the_best_of_each_seed() -> None:
    trials = make_trials(
        (FIRST, "freeze", (0.8, 0.6)), (FIRST, "top", (0.7, 0.9)), (FIRST, "auto", (0.8, 0.7))
    )
    (row,) = collect_rows(trials)
    assert row.regret("auto") == pytest.approx(0.05)  # top: 0.8 on average
    assert row.regret_of_each("auto") == pytest.approx(0.1)  # 0.8 and 0.9
    assert (row.regret("top"), row.regret("freeze")) == (0, pytest.approx(0.1))
    assert row.error() == pytest.approx(0.04)


def test_only_seeds_that_all_have_finished_are_compared() -> None:
    trials = make_trials(
        (FIRST, "top", (0.5, 0.9)), (FIRST, "auto", (0.5,)), (SECOND, "auto", (0.5,)), (SECOND, "auto", ())
    )
    (row,) = collect_rows(trials)  # auto alone has nothing to be compared with
    assert [len(runs) for runs in row.trials.values()] == [1, 1] and row.mean("top") == 0.5


def test_the_page_holds_the_figures() -> None:
    trials = make_trials(
        (FIRST, "freeze", (0.8, 0.8)),
        (FIRST, "top", (0.9, 0.9)),
        (SECOND, "freeze", (0.6, 0.6)),
        (SECOND, "top", (0.5, 0.5)),
    )
    trials |= make_trials((FIRST, "auto", (0.9, 0.88)), chosen="top")
    trials |= make_trials((SECOND, "auto", (0.6, 0.5)), chosen="freeze")
    page = "\n".join(build_page(collect_rows(trials)))
    start = f"| {FIRST.name} | similar | 40 | 2 | 2 | 100 | 3.0 | 80.0 | **90.0** |"
    assert f"{start} top, top | 89.0 | +1.0 | +1.0 |" in page
    assert "- always `freeze`: 5.00 ± 5.00 and 5.00 ± 5.00" in page
    assert "- `auto`: 3.00 ± 2.00 and 3.00 ± 2.00" in page
    assert "In 3 of 4 runs" in page and "in 2 none was better" in page
    assert "3.0 to 4.9 points" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.count("|") == page.splitlines()[0].count("|"), line


def test_a_page_without_auto_says_so() -> None:
    trials = make_trials((FIRST, "freeze", (0.8,)), (FIRST, "top", (0.9,)), (SECOND, "top", (0.9,)))
    page = "\n".join(build_page(collect_rows(trials)))
    assert "`auto` has not been run." in page and "always `freeze`" not in page
    assert build_page([]) == ["Nothing has been run."]
