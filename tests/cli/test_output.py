"""What a command says when it is stopped, and results that cannot be written."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from finetune.cli.output import (
    handled_errors,
    print_json,
    print_line,
    print_table,
    print_text,
    relay,
    say,
)
from finetune.errors import ExitCode, InterruptedRunError

STOPPED = InterruptedRunError("training", "it was stopped", "Give the same command again to resume.")
STOPPED.output = "runs/a b"


TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A stopped command ignores further signals; the tests after this one must not."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in TO_STOP}  # as without nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["run", "-d", "my data"], "finetune run -d 'my data' --output 'runs/a b'"),
        (["run", "-d", "x", "-o", "here"], "finetune run -d x -o here"),
        (["run", "-d", "x", "--output=here"], "finetune run -d x --output=here"),
    ],
)
def test_the_whole_command_that_resumes_is_named(
    words: list[str], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/finetune", *words])
    with pytest.raises(typer.Exit) as ended, handled_errors():
        raise STOPPED
    assert ended.value.exit_code == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.endswith(f"Give the same command again to resume.\n  {command}\n")


def test_a_program_that_calls_the_api_is_told_no_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--fast"])
    with pytest.raises(typer.Exit), handled_errors():
        raise STOPPED
    assert capsys.readouterr().err.endswith("Give the same command again to resume.\n")


@pytest.mark.parametrize("number", TO_STOP)
def test_a_signal_ends_every_command_with_75(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A closed terminal sends SIGHUP twice, from the kernel and from the shell: the second one is ignored."""
    with pytest.raises(typer.Exit) as ended, handled_errors(as_json=True):
        signal.raise_signal(number)
        time.sleep(5)
    signal.raise_signal(number)
    assert ended.value.exit_code == ExitCode.INTERRUPTED
    shown = capsys.readouterr()
    assert shown.err == "error: interrupted\nGive the same command again.\n"
    assert '"exit_code": 75' in shown.out


@pytest.mark.parametrize(
    "write",
    [
        lambda: print_line("a", colour="red"),
        lambda: print_text("a"),
        lambda: print_table(["a"], [["b"]]),
        lambda: print_json({"a": 1}),
        lambda: relay(b"a"),
    ],
)
def test_a_result_that_a_full_disk_does_not_take_is_an_error(
    write: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``finetune compare ... > file``: a lost result must not look like success, nor like a bug."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(typer.Exit) as ended, handled_errors():
            write()
    assert ended.value.exit_code == ExitCode.DISK
    assert capsys.readouterr().err.startswith("error: standard output: No space left on device\n")


def test_a_working_directory_that_is_gone_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(typer.Exit) as ended, handled_errors():
        raise AssertionError("began")
    assert ended.value.exit_code == ExitCode.USAGE
    assert "the working directory: it does not exist any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecursionError(), ExitCode.DATA, "nested too deeply"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates"), ExitCode.USAGE, "not UTF-8"),
        (OSError(errno.ENAMETOOLONG, "", "x" * 9000), ExitCode.USAGE, "longer than the file system allows"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), ExitCode.DISK, "TMPDIR"),
        (UnicodeEncodeError("ascii", "\u00fc", 0, 1, "ordinal"), ExitCode.INTERNAL, "a bug in finetune"),
    ],
)
def test_what_users_bring_is_no_bug(
    error: Exception, code: ExitCode, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, handled_errors():
        raise error
    assert ended.value.exit_code == code and said in capsys.readouterr().err


def test_an_error_keeps_its_code_if_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full, Path("/dev/full").open("w") as other:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.stderr", other)
        say("a")
        with pytest.raises(typer.Exit) as ended, handled_errors(as_json=True):
            raise STOPPED
    assert ended.value.exit_code == ExitCode.INTERRUPTED


def test_only_colours_are_styled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_line("plain")
    say("plain")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("plain\n", "plain\n")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Otherwise what a library writes to stderr would end up in it."""
    code = (
        "import sys; from finetune.cli.output import replace_closed_streams; replace_closed_streams(); "
        "file = open(sys.argv[1], 'w'); file.write(str(file.fileno()))"
    )
    shell = f'exec {sys.executable} -c "{code}" {tmp_path / "number"} <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell], check=False).returncode == 0
    assert int((tmp_path / "number").read_text()) > 2
