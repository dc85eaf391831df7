"""Shell completion, which runs the program."""

from __future__ import annotations

import os
import subprocess
import sys


def complete(words: str, position: int) -> list[str]:
    """Return the completions that bash offers at a position of a line."""
    asked = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    code = "import sys; sys.argv[0] = 'finetune'; from finetune.cli.app import main; main()"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | asked, capture_output=True, text=True, check=True
    ).stdout.split()


def test_commands_and_flags_are_completed() -> None:
    assert complete("finetune rec", 1) == ["recipes"]
    assert complete("finetune run --strat", 2) == ["--strategy"]
