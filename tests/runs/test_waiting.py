from __future__ import annotations

from pathlib import Path

from finetune.runs.cache_dir import wait_for_writer
from finetune.system.display import SilentDisplay


class Witness(SilentDisplay):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.beats = 0
        self.heartbeat.beat = self.beat  # type: ignore[method-assign]

    def say(self, text: str, style: str = "") -> None:
        self.said.append(text)

    def beat(self) -> None:
        self.beats += 1


def test_a_wait_is_reported_once_after_a_while(tmp_path: Path) -> None:
    witness = Witness()
    wait = wait_for_writer(tmp_path / "x.bin", "another run writes", witness)
    for _ in range(4):
        wait()
    assert witness.said == []
    for _ in range(10):
        wait()
    assert witness.said == ["another run writes; this one waits for it"]


def test_a_writer_that_hangs_gives_no_heartbeat(tmp_path: Path) -> None:
    witness = Witness()
    file = tmp_path / "x.bin"
    wait = wait_for_writer(file, "another run writes", witness)
    for number in range(5):
        file.write_bytes(bytes(number))
        wait()
        wait()
    assert witness.beats == 5
