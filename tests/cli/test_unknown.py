"""Flags that do not exist."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from finetune.cli.app import app


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        ("run", "--label-smoothing", "--set training.label_smoothing=VALUE"),
        ("run", "--mixup=0.2", "--set training.mixup=VALUE"),
        ("check", "--label-column", "--set data.label_column=VALUE"),
        ("run", "--training.patience", "--set training.patience=VALUE"),
        ("run", "--epoch", "--epochs"),
    ],
)
def test_a_flag_that_is_a_key_of_the_recipe_names_set(command: str, flag: str, said: str) -> None:
    result = CliRunner().invoke(app, [command, flag, "1"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())
