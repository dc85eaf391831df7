"""What a command says when it is stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import typer

from finetune.cli.output import handled_errors
from finetune.errors import ExitCode, InterruptedRunError

STOPPED = InterruptedRunError("training", "it was stopped", "Give the same command again to resume.")
STOPPED.output = "runs/a b"


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """A stopped command ignores further Ctrl-C; the tests after this one must not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


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
