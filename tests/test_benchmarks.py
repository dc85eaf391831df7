"""The benchmark suite: which processes it starts, how it goes on, and what it makes of their figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite is not installed, it runs from the checkout

from benchmarks import peers_env, suite
from benchmarks.__main__ import read_arguments
from benchmarks.cases import NETWORKS, TOOLS, Case, expand, pick, plan_turns
from benchmarks.data import Store
from benchmarks.goals import Row, summarize
from benchmarks.page import build_page, collect_panels, write_page
from benchmarks.results import DifferentMachineError, Result, Results
from benchmarks.timing import Command, run_timed
from benchmarks.tools import Shop, read_run

MACHINE = {"processor": "a processor", "cores": 2, "memory_gb": 8, "torch": "2.15.0", "threads": 2}
MACHINE |= {"system": "Linux", "revision": "abc", "finetune": "0.1.0", "workers": 1, "when": "2026-01-01"}


def result(case: str, tool: str, repeat: int = 0, wall: float = 1.0, **more: Any) -> Result:
    return Result(case, tool, repeat, wall, **more)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three turns of a case that is won, and one of a case that is lost."""
    results = Results(tmp_path / "results.jsonl")
    results.begin(MACHINE)
    walls = {
        "finetune": (10, 20, 10),
        "fastai": (200, 220, 180),
        "plain": (110, 190, 130),
        "timm": (90, 90, 90),
    }
    accuracies = {"finetune": 0.94, "fastai": 0.93, "plain": 0.95, "timm": 0.9}
    for tool in TOOLS:
        for repeat, wall in enumerate(walls[tool]):
            facts = {"accuracy": accuracies[tool], "seconds": {"training": wall / 2}}
            peak = 500.0 if tool == "finetune" else 600.0
            results.add(result("freeze-squeezenet-20", tool, repeat, wall, facts=facts, peak_mb=peak))
        slow = 30.0 if tool == "finetune" else 25.0
        results.add(result("full-squeezenet-20", tool, wall=slow, facts={"accuracy": 0.9}))
    return results


def find(rows: list[Row], *words: str) -> Row:
    (row,) = [row for row in rows if all(word in row.goal for word in words)]
    return row


# --- cases -----------------------------------------------------------------------------------------


def test_every_strategy_network_and_number_of_epochs_is_a_case() -> None:
    names = [case.name for case in expand(quick=False, cuda=False)]
    trained = {f"{s}-{n}-{e}" for s in ("freeze", "top", "full") for n in NETWORKS for e in (1, 5, 20)}
    assert trained <= set(names)
    assert {"startup", "second-squeezenet-50", "scaling-100000", "limit-resnet50"} <= set(names)
    assert len(names) == len(set(names))


def test_a_gpu_adds_its_cases_and_quick_leaves_most_out() -> None:
    plain, cuda, quick = (expand(*asked) for asked in ((False, False), (False, True), (True, False)))
    assert [case.name for case in cuda if case not in plain] == ["gpu-resnet50", "overhead-resnet50"]
    assert len(quick) < len(plain) / 2
    assert {case.kind for case in quick} == {case.kind for case in plain}


def test_cases_are_picked_by_pattern_and_a_misspelt_one_is_refused() -> None:
    cases = expand(quick=False, cuda=False)
    assert [case.name for case in pick(cases, "top-resnet18-*, startup")] == [
        "startup",
        *(f"top-resnet18-{epochs}" for epochs in (1, 5, 20)),
    ]
    assert pick(cases, None) == cases
    with pytest.raises(ValueError, match="frieze"):
        pick(cases, "startup,frieze-*")


def test_tools_take_turns() -> None:
    case = Case("a", "train", ("x", "y"))
    assert list(plan_turns(case, 2)) == [(0, "x"), (0, "y"), (1, "x"), (1, "y")]
    assert len(list(plan_turns(Case("a", "startup", ("x",), repeats=5), 2))) == 5


# --- command lines ---------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setattr(Store, "folder", lambda _, name: tmp_path / name)
    monkeypatch.setattr(Store, "weights", lambda _, arch: tmp_path / f"{arch}.safetensors")
    return Shop(Store(tmp_path, tmp_path), Path("python"), tmp_path / "work", 3, 2, quick=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_gets_the_same(tool: str, shop: Shop, tmp_path: Path) -> None:
    (case,) = pick(expand(quick=False, cuda=False), "top-resnet18-5")
    command = shop.command(case, tool, repeat=1)
    given = dict(zip(command.words, command.words[1:], strict=False))
    expected = {"--epochs": "5", "--batch-size": "32", "--img-size": "64", "--workers": "2"}
    expected |= {"--strategy": "top", "--data": str(tmp_path / "two-thousand")}
    expected |= {"--weights": str(tmp_path / "resnet18.safetensors")}
    assert given | expected == given
    assert command.environment["OMP_NUM_THREADS"] == "3"
    assert Path(command.environment["XDG_CACHE_HOME"]).is_relative_to(command.folder)  # empty at first


def test_the_second_run_finds_what_the_first_kept(shop: Shop) -> None:
    (case,) = pick(expand(quick=False, cuda=False), "second-*")
    first, second = shop.warm_up(case), shop.command(case, "finetune", 0)
    assert first.environment["XDG_CACHE_HOME"] == second.environment["XDG_CACHE_HOME"]
    assert set(first.words) - set(second.words) == {"--lr", "0.02", str(first.folder / "out")}
    assert second.watch == second.folder / "out" / "history.csv"


def test_training_is_everything_between_the_check_and_the_figures(tmp_path: Path) -> None:
    seconds = {"load": 1.0, "trunk": 2.0, "measure": 4.0, "train": 8.0, "export": 16.0}
    metrics = {"val_accuracy": 0.5, "num_train": 3, "seconds": seconds}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "outcome.json").write_text('{"attempt": 1}')
    rows = "seconds,images_per_second,data_wait_fraction\n5,10,0.5\n4,20,0.5\n3,60,0.5\n"
    (tmp_path / "history.csv").write_text(rows)
    facts = read_run(tmp_path)
    assert (facts["seconds"]["training"], facts["images_per_second"]) == (14.0, 20.0)


def test_the_peers_are_pinned_and_bring_no_torch() -> None:
    lines = peers_env.REQUIREMENTS.read_text().splitlines()
    names = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert "fastai" in names and not {"torch", "torchvision", "timm"} & set(names)


# --- results ---------------------------------------------------------------------------------------


def test_a_suite_goes_on_after_what_is_there(
    results: Results, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("freeze-squeezenet-20", "train", TOOLS)
    results.add(result(case.name, "plain", 3, failed="exit status 1"))
    results.add(result(case.name, "timm", 3))
    again = Results(results.path)
    started: list[tuple[str, int]] = []

    def run_one(case: Case, tool: str, repeat: int, _: Shop) -> Result:
        started.append((tool, repeat))
        return result(case.name, tool, repeat)

    monkeypatch.setattr(suite, "run_one", run_one)
    suite.run_suite([case], shop, again, repeats=4)
    assert started == [("finetune", 3), ("fastai", 3), ("plain", 3)]  # what failed is tried again
    assert not Results(results.path).failed()
    suite.run_suite([case], shop, Results(results.path), repeats=4)
    assert len(started) == 3


def test_a_line_that_was_cut_off_is_left_out_and_spoils_no_other(results: Results) -> None:
    whole = results.path.read_text()
    results.path.write_text(whole[:-30])
    again = Results(results.path)
    assert not again.has("full-squeezenet-20", "timm", 0)
    again.add(result("full-squeezenet-20", "timm"))
    assert Results(results.path).has("full-squeezenet-20", "timm", 0)


def test_another_machine_does_not_go_on(results: Results) -> None:
    results.begin(MACHINE | {"when": "later", "revision": "def"})
    with pytest.raises(DifferentMachineError, match="threads 2 -> 1"):
        results.begin(MACHINE | {"threads": 1})


def test_ratios_are_of_the_same_turn(results: Results) -> None:
    ratios = results.ratios("freeze-squeezenet-20", "fastai")
    assert ratios == (18.0, 11.0, 20.0)  # of 20, 11 and 18; the ratio of the medians would be 20
    results.add(result("freeze-squeezenet-20", "fastai", repeat=3, wall=9999))
    assert results.ratios("freeze-squeezenet-20", "fastai") == ratios
    assert results.ratios("top-squeezenet-20", "fastai") is None


# --- goals and page --------------------------------------------------------------------------------


def test_goals_are_met_missed_or_not_measured(results: Results) -> None:
    rows = summarize(results)
    assert find(rows, "freeze, 20 epochs, squeezenet: faster than fastai").met is True
    assert find(rows, "freeze, 20 epochs, squeezenet: faster than plain").met is True
    assert find(rows, "freeze, 20 epochs, squeezenet: accuracy").met is False  # the plain loop's is higher
    assert find(rows, "freeze, 20 epochs, squeezenet: peak memory").met is True
    assert find(rows, "full, 20 epochs, squeezenet: the fastest peer").met is False
    assert find(rows, "top, 20 epochs, squeezenet: faster than plain").met is None
    assert find(rows, "second freeze run").met is None


def test_a_straight_line_is_told_from_a_bend(results: Results) -> None:
    for size, wall, peak in ((1_000, 10.0, 500.0), (10_000, 19.0, 509.0), (100_000, 109.0, 599.0)):
        results.add(result(f"scaling-{size}", "finetune", wall=wall, peak_mb=peak))
    assert find(summarize(results), "among 100,000").met is True
    assert find(summarize(results), "memory for a further image").measured == "1,000 bytes"
    results.add(result("scaling-100000", "finetune", wall=150.0, peak_mb=900.0))
    assert find(summarize(results), "among 100,000").met is False
    assert find(summarize(results), "memory for a further image").met is False


def test_the_page_holds_the_figures_and_says_what_is_missing(results: Results) -> None:
    results.add(result("top-squeezenet-20", "fastai", failed="exit status 1: a | b\nc"))
    page = "\n".join(build_page(results, "plot.png"))
    won = "| freeze | 20 | **finetune** | 10.0 [10.0..20.0] | 1 | 5.00 [5.00..10.0] | 0.940 | 500 |"
    assert won in page
    assert "| freeze | 20 | fastai | 200 [180..220] | 18.00x [11.00..20.00] |" in page
    assert "a processor, 2 cores" in page and "![" in page and "(plot.png)" in page
    assert "| top-squeezenet-20 | fastai | 0 | exit status 1: a / b c |" in page
    assert page.partition("## On a GPU")[2].lstrip().startswith("Not measured.")
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|"), line


def test_a_page_without_matplotlib_has_no_plot(results: Results, tmp_path: Path) -> None:
    panels = list(collect_panels(results))
    assert [panel["strategy"] for panel in panels] == ["freeze", "full"]
    assert panels[0]["lines"][0] == {"tool": "finetune", "points": [(20, 10.0, 10.0, 20.0)]}
    write_page(results, tmp_path / "page.md", python=None)
    assert "![" not in (tmp_path / "page.md").read_text()
    with pytest.raises(ValueError, match="holds no results"):
        write_page(Results(tmp_path / "none.jsonl"), tmp_path / "other.md", None)


def test_a_quick_run_writes_no_page_of_the_docs() -> None:
    quick, whole = read_arguments(["run", "--quick"]), read_arguments(["run"])
    assert whole.page.parts[-2:] == ("docs", "benchmarks.md")
    assert quick.page != whole.page and quick.results != whole.results
    assert (quick.repeats, whole.repeats) == (1, 3)


# --- one process -----------------------------------------------------------------------------------


def test_a_process_is_watched_to_its_end(tmp_path: Path) -> None:
    code = "import sys, pathlib; pathlib.Path('here').touch(); print(input.__name__); sys.exit(3)"
    command = Command((sys.executable, "-c", code), {}, tmp_path / "place", tmp_path / "place" / "here")
    timed = run_timed(command)
    assert (timed.code, timed.stdout) == (3, "input\n")
    assert timed.appeared is not None and 0 < timed.appeared <= timed.wall
    assert timed.rss_mb > 1
    failed = suite.to_result(Case("a", "train", ("x",)), "x", 0, tmp_path, timed).failed
    assert failed.startswith("exit status 3")


def test_a_process_that_does_not_end_is_killed(tmp_path: Path) -> None:
    words = (sys.executable, "-c", "import time; time.sleep(60)")
    assert run_timed(Command(words, {}, tmp_path / "place"), limit=0.1).code == -9
