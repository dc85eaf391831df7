"""The report shows a forecast and an audit that lie beside the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.features.forecast import learning_curve
from finetune.report.further import find_audit, find_forecast
from finetune.report.images import Album
from finetune.runs.folder import RunFolder
from tests.cli.test_audit import draw_grey
from tests.conftest import QUICK_RUN, Cli
from tests.report.test_report import sections
from tests.sweeps import slow_except

WORDS = ("--device", "cpu", "--workers", 0)


@pytest.fixture(scope="session")
def audited(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its forecast and its audit, all in one folder."""
    from tests.cli.test_labels import invoke

    home = tmp_path_factory.mktemp("audited")
    data = draw_grey(home / "data", framed=True)
    invoke("run", "-b", tiny, "-d", data, "-s", "freeze", *QUICK_RUN, "-o", home / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_curve, "NUM_SUBSETS", 2)
        invoke("forecast", home / "run", "--target-accuracy", 0.7, *WORDS, "-o", home / "forecast")
    invoke("audit", home / "run", *WORDS, "-o", home / "audit")
    return home


def copy(home: Path, to: Path) -> Path:
    """Copy the folders, with the new place of the run in the results."""
    for name in ("run", "forecast", "audit"):
        shutil.copytree(home / name, to / name)
    for file in (to / "forecast/forecast.json", to / "audit/audit.json"):
        facts = json.loads(file.read_text())
        assert facts["data"] == str(home / "run")
        file.write_text(json.dumps(facts | {"data": str(to / "run")}))
    return to


def test_both_are_on_the_page(audited: Path, cli: Cli, tmp_path: Path) -> None:
    run = copy(audited, tmp_path) / "run"
    found = json.loads((tmp_path / "forecast/forecast.json").read_text())
    assert cli("report", run).exit_code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert {"forecast", "audit"} <= set(sections(page))
    for point in found["forecast"]:
        accuracy = f"{100 * point['accuracy']:.1f} %" if point["can_say"] else "cannot say"
        assert f'{point["images"]:,}</td><td class="number">{accuracy}' in page
    assert found["requirement"]["said"] in page and (run / "plots/forecast.svg").is_file()
    audit = json.loads((tmp_path / "audit/audit.json").read_text())
    assert audit["alarms"] and page.count('<span class="tag">alarm</span>') == len(audit["alarms"])
    assert 'alt="Images behind the alarms"' in page
    assert "finetune forecast" in page  # few images


def test_those_of_other_runs_are_not(audited: Path, tmp_path: Path) -> None:
    home = copy(audited, tmp_path)
    (home / "run").rename(home / "other")
    assert find_forecast(RunFolder(home / "other")) is None
    assert find_audit(RunFolder(home / "other"), Album(None)) is None


def test_the_last_one_counts_and_damaged_ones_are_passed_over(audited: Path, tmp_path: Path) -> None:
    home = copy(audited, tmp_path)
    shutil.copytree(home / "forecast", home / "later")
    now = (home / "forecast/forecast.json").stat().st_mtime
    os.utime(home / "later/forecast.json", (now + 9, now + 9))
    shown = find_forecast(RunFolder(home / "run"))
    assert shown is not None and shown.folder == "later"
    (home / "later/forecast.json").write_text("{")
    shown = find_forecast(RunFolder(home / "run"))
    assert shown is not None and shown.folder == "forecast"


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value))[:2] if isinstance(value, list) else []
    for key, inner in items:
        found += _leaves(inner, (*path, key))
    return found


@pytest.mark.parametrize("wrong", slow_except([None, "x"], [None, "x", -1, [], {}, 1e400]))
@pytest.mark.parametrize("name", ["forecast", "audit"])
def test_no_wrong_value_ends_the_report(audited: Path, tmp_path: Path, name: str, wrong: Any) -> None:
    home = copy(audited, tmp_path)
    (home / "audit/audit.png").unlink()  # reading it takes longest
    file = home / name / f"{name}.json"
    whole = file.read_text()
    for path in _leaves(json.loads(whole)):
        facts = json.loads(whole)
        inner = facts
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        file.write_text(json.dumps(facts))
        find_forecast(RunFolder(home / "run"))
        find_audit(RunFolder(home / "run"), Album(None))
