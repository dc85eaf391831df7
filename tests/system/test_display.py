"""What a user sees of a run that takes long: lines that fit the terminal, and progress in the log."""

from __future__ import annotations

import re
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from finetune.system import display as displays
from finetune.system.display import Display
from finetune.system.progress_line import fit, format_time
from finetune.training.reporting import ProgressReporter

ROW = {
    "epoch": 3,
    "lr": 0.01,
    "train_loss": 0.1234,
    "eval_loss": 0.2345,
    "eval_accuracy": 0.9876,
    "seconds": 12.3,
    "images_per_second": 1234.5,
    "data_wait_fraction": 0.05,
}


def open_display(width: int, terminal: bool = True) -> tuple[Display, StringIO]:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False, color_system=None)
    return Display(console), file


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displays, "FIRST_LINE", 0.05)


# --- lines that fit ------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 120, 200])
@pytest.mark.parametrize(
    "name", ["epoch 10/100 training", "reading /home/someone/photographs/\u4e2d\u6587" * 3]
)
def test_a_bar_fits_the_terminal_and_keeps_what_matters_most(width: int, name: str) -> None:
    display, file = open_display(width)
    with display.track(name, 12_345) as advance:
        advance(2_345, "run ends in 1:23:45, 1234 images/s, waiting 12%")
        time.sleep(0.3)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", file.getvalue())]
    shown = [line.rstrip() for line in lines if "epoch" in line or "reading" in line]
    assert shown
    assert max(map(cell_len, shown)) < width
    if width >= 40:
        assert "2,345/12,345" in shown[-1]
    is_short = name.startswith("epoch")
    assert ("run ends in 1:23:45" in shown[-1]) == (width >= (60 if is_short else 79))
    assert ("waiting 12%" in shown[-1]) == (width >= (120 if is_short else 200))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_line_of_an_epoch_is_not_broken(width: int, tmp_path: Path) -> None:
    display, file = open_display(width)
    display.log_to(tmp_path / "run.log")
    ProgressReporter(display, 100, 1000).report_epoch(ROW, is_best=True)
    [line] = file.getvalue().splitlines()
    assert len(line) <= width
    assert line.startswith("epoch   3/100  val accuracy 0.9876 *")
    assert ("train loss 0.1234" in line) == (width >= 80)
    whole = "val loss 0.2345  train loss 0.1234  lr 1.00e-02  12.3 s  1234 images/s  waiting 5%\n"
    assert (tmp_path / "run.log").read_text().endswith(whole)


def test_a_pipe_gets_whole_lines() -> None:
    display, file = open_display(30, terminal=False)
    ProgressReporter(display, 100, 1000).report_epoch(ROW, is_best=False)
    display.say("a message of more than thirty characters is not broken")
    epoch, message = file.getvalue().splitlines()
    assert epoch.endswith("waiting 5%")
    assert message.endswith("broken")


def test_a_terminal_breaks_messages_between_words_only() -> None:
    display, file = open_display(30)
    words = [
        "accuracy",
        "0.9876",
        "on",
        "12,345",
        "images;",
        "see",
        "/a/path/that/is/longer/than/a/whole/line.txt",
    ]
    display.say(" ".join(words))
    assert file.getvalue().split() == words
    assert len(file.getvalue().splitlines()) > 1


def test_fit_keeps_the_first_fields() -> None:
    assert fit(["abc", "def", "g"], 8) == "abc  def"
    assert fit(["abc", "def", "g"], 2) == "abc"
    assert fit(["abc", "def", "g"], None) == "abc  def  g"
    assert [format_time(seconds) for seconds in (0.4, 59.7, 3600 * 2 + 61)] == ["0:00", "1:00", "2:01:01"]


# --- progress of what takes long -----------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.usefixtures("soon")
def test_long_work_is_told_in_the_log_and_on_a_pipe(terminal: bool, tmp_path: Path) -> None:
    """Also if it is a single step that tells nothing itself."""
    display, file = open_display(80, terminal)
    display.log_to(tmp_path / "run.log")
    with display.track("solving", 3) as advance:
        advance(1, "layer2")
        time.sleep(0.2)
    with display.busy("loading"):
        time.sleep(0.2)
    with display.track("short work", 3) as advance:
        advance(3, "")
    log = (tmp_path / "run.log").read_text()
    assert "solving, 1/3, layer2" in log
    assert re.search(r"solving, 1/3, layer2, done in 0:0\d\n", log)
    assert "loading\n" in log
    assert "short work" not in log
    if not terminal:
        assert [line.partition(" ")[2] for line in log.splitlines()] == file.getvalue().splitlines()


@pytest.mark.usefixtures("soon")
def test_what_was_told_before_the_log_began_is_in_it(tmp_path: Path) -> None:
    display, _ = open_display(80)
    display.say("backbone found")
    with display.busy("loading"):
        time.sleep(0.2)
    display.log_to(tmp_path / "run.log")
    display.say("strategy: freeze")
    log = (tmp_path / "run.log").read_text()
    lines = [line.partition(" ")[2] for line in log.splitlines()]
    assert lines[:2] == ["backbone found", "loading"]
    assert log.endswith("strategy: freeze\n")
    assert log.count("backbone found") == 1


# --- a stream that is closed ---------------------------------------------------------------------


def test_messages_without_a_stream_are_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python has no ``sys.stderr`` where the stream was closed from the start (``2>&-``)."""
    monkeypatch.setattr(sys, "stderr", None)
    display = Display()
    display.log_to(tmp_path / "run.log")
    with display.track("training", 2) as advance, display.busy("loading"):
        advance(1, "")
    display.warn("the disk is slow")
    display.table(["a"], [["1"]])
    assert "the disk is slow" in (tmp_path / "run.log").read_text()
