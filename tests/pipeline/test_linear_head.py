"""Which threads solve, while other processes wait."""

from __future__ import annotations

import pytest
import torch

from finetune.launch.processes import REPORT
from finetune.pipeline import linear_head


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 1),  # a single process: the user has named the number
        ({"RANK": "0", "WORLD_SIZE": "2"}, 5),  # torchrun has
        ({"RANK": "0", "WORLD_SIZE": "2", REPORT: "file"}, 1),  # `--processes` has given each its share
    ],
)
def test_the_only_busy_process_has_every_core_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int
) -> None:
    for name in ("RANK", "WORLD_SIZE", REPORT):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(linear_head, "available_cores", lambda: 5)
    assert torch.get_num_threads() == 1
    with linear_head._every_core():
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 1
