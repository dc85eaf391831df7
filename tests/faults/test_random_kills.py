"""Real runs, killed at random (promise R1). The long run is described in docs/faults.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.random_kills import RECIPES, kills_in, run_trials


@pytest.mark.slow
def test_random_kills_leave_no_trace(tmp_path: Path) -> None:
    lines = run_trials(tmp_path, kills=9)
    assert kills_in(lines) >= 9
    assert {line["recipe"] for line in lines} <= set(RECIPES)
    assert all(line["same"] for line in lines)
