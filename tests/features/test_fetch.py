"""A download that goes on gives signs of life, however slow the server is, and never goes back."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from finetune.errors import EnvironmentFaultError
from finetune.features.network import fetch
from finetune.system.display import Display
from finetune.system.heartbeat import Heartbeat
from pretrained import hub
from pretrained.catalog import find_card
from tests.hub_server import Fault, Server, serve

CONTENT = bytes(400_000)
DRIPPING = Fault(piece=20_000, pause=0.02)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


class CountedPulse(Heartbeat):
    def __init__(self) -> None:
        super().__init__()
        self.beats = 0

    def beat(self) -> None:
        self.beats += 1


@pytest.fixture
def mirrored(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("FINETUNE_MIRROR", server.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server.files["/tiny.pth"] = CONTENT
    return server


CARD = replace(find_card("torchvision/squeezenet1_1"), location="https://download.invalid/tiny.pth")


def test_every_piece_from_a_mirror_is_a_sign_of_life(mirrored: Server) -> None:
    mirrored.faults["/tiny.pth"] = DRIPPING
    heartbeat, screen = CountedPulse(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    assert fetch(CARD, False, Display(console, heartbeat)).read_bytes() == CONTENT
    assert heartbeat.beats >= 10  # of twenty pieces: two may come together
    assert f"fetching {CARD.name}" in screen.getvalue()
    assert "/400.0 kB" in screen.getvalue()


def test_a_mirror_that_stalls_is_left(
    mirrored: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "NETWORK_TIMEOUT_SECONDS", 0.3)
    mirrored.faults["/tiny.pth"] = Fault(stalls_at=200_000)
    with pytest.raises(EnvironmentFaultError, match="timed out"):
        fetch(CARD, False, Display(Console(quiet=True)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_mirror_that_breaks_off_is_no_source(mirrored: Server, tmp_path: Path) -> None:
    mirrored.faults["/tiny.pth"] = Fault(breaks_after=200_000)
    with pytest.raises(EnvironmentFaultError, match="after 200,000 of 400,000 bytes"):
        fetch(CARD, False, Display(Console(quiet=True)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


SCRIPT = """
import json
from pretrained.catalog import find_card
from pretrained.weights import find_weights

told = []
path = find_weights(find_card("test_resnet"), on_progress=lambda *numbers: told.append(numbers))
print(json.dumps([str(path), told]))
"""


@pytest.mark.slow
def test_every_piece_from_the_hub_is_told_of(server: Server, tmp_path: Path) -> None:
    """In a process of its own, since the client reads its environment once."""
    path = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    server.files[path] = CONTENT
    server.faults[path] = replace(DRIPPING, piece=40_000, breaks_after=200_000, breaks=1, ranges=False)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=variables | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    place, told = json.loads(done.stdout)
    assert Path(place).read_bytes() == CONTENT
    assert [done for done, _ in told] == sorted(done for done, _ in told)  # also where it began again
    assert told[-1] == [len(CONTENT), len(CONTENT)]
    assert len(told) >= 12
    assert done.stderr == ""
