from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from finetune.runs.block_file import BlockFile, facts_of, is_in_use, journal_of, remove_unused
from finetune.runs.journal import Block

FACTS = {"kind": "test", "cut": "layer3"}
CONTENT = [b"one", b"", b"three" * 1000]


def fill(path: Path, content: list[bytes] = CONTENT, facts: dict[str, Any] = FACTS) -> None:
    file = BlockFile(path, facts, len(CONTENT))
    for number, block in enumerate(content[len(file.blocks) :], len(file.blocks)):
        file.append(block, {"number": number})
    file.close()


def read(path: Path, **keys: Any) -> list[bytes]:
    file = BlockFile(path, FACTS, len(CONTENT), **keys)
    with io.BytesIO(file.read()) as content:
        found = [content.read(block.num_bytes) for block in file.blocks]
    file.close()
    return found


def test_written_blocks_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "test.bin"
    fill(path)
    assert read(path) == CONTENT
    assert facts_of(path) == FACTS
    file = BlockFile(path, FACTS, len(CONTENT))
    assert [block.note for block in file.blocks] == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert file.is_complete


def test_a_file_is_resumed_after_its_last_complete_block(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path, CONTENT[:1])
    with path.open("ab") as file, journal_of(path).open("ab") as journal:
        file.write(b"half of a bl")
        journal.write(b'{"bytes": 5000, "sha2')
    again = BlockFile(path, FACTS, len(CONTENT))
    assert [block.num_bytes for block in again.blocks] == [3]
    assert not again.was_damaged
    again.append(CONTENT[1])
    again.append(CONTENT[2])
    again.close()
    assert read(path) == CONTENT


@pytest.mark.parametrize("place", [0, 2, 3, 5002])
def test_after_a_flipped_bit_the_file_is_made_again(tmp_path: Path, place: int) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    file = BlockFile(path, FACTS, len(CONTENT))
    assert file.was_damaged
    assert not file.blocks
    file.close()
    fill(path)
    assert read(path) == CONTENT


@pytest.mark.parametrize("journal", [b"", b"{", b"[]\n", b"{}\n", b'{"kind": "test", "cut": "layer3"}\n7\n'])
def test_a_damaged_journal_is_detected(tmp_path: Path, journal: bytes) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    journal_of(path).write_bytes(journal)
    assert read(path) == []
    fill(path)
    assert read(path) == CONTENT


def rewrite(path: Path, number: int, **changes: Any) -> None:
    """Change a line of the journal of a file of blocks, which is the line after the facts from 1."""
    lines = journal_of(path).read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    journal_of(path).write_text("\n".join(lines) + "\n")


SIZES: list[Any] = [-5, 10**30, 2**62, 2**40, 4, True, 3.0, "3", None, [3], {}]


@pytest.mark.sample(4)
@pytest.mark.parametrize("size", SIZES)
def test_a_damaged_size_is_detected_before_it_is_read(tmp_path: Path, size: Any) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    rewrite(path, 1, bytes=[size])
    assert read(path) == []
    fill(path)
    assert read(path) == CONTENT


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1" * 5000, b'{"bytes": 3}'])
def test_a_damaged_line_is_detected(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    journal_of(path).write_bytes(journal_of(path).read_bytes() + line + b"\n")
    assert read(path) == []


def test_a_block_that_does_not_fit_is_detected(tmp_path: Path) -> None:
    """Its bytes are those of the sha256, which says nothing of the note."""
    path = tmp_path / "test.bin"
    fill(path)

    def fits(number: int, block: Block) -> bool:
        return bool(block.note == {"number": number})

    assert read(path, fits=fits) == CONTENT
    rewrite(path, 2, note={"number": "one"})
    assert read(path, fits=fits) == []


def test_more_blocks_than_there_can_be_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    file = BlockFile(path, FACTS, 4)
    for content in [*CONTENT, b"more"]:
        file.append(content)
    file.close()
    assert read(path) == []


def test_a_damaged_file_that_cannot_be_removed_is_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the folder of another user."""
    path = tmp_path / "test.bin"
    fill(path)
    rewrite(path, 1, bytes=[-5])
    monkeypatch.setattr("finetune.runs.block_file.remove", lambda _: None)
    with pytest.raises(OSError, match="cannot be removed"):
        read(path)


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("name", ["test.bin", "test.journal"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_replaced_or_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    assert facts_of(path) in ({}, FACTS)
    assert not is_in_use(path)
    try:
        fill(path)
    except OSError as error:
        assert str(tmp_path / name) in str(error)
        assert remove_unused(path) == (make != Path.mkdir)
    else:
        assert read(path) == CONTENT


def test_a_truncated_or_missing_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    os.truncate(path, 100)
    assert read(path) == []
    fill(path)
    path.unlink()
    assert read(path) == []


def test_other_facts_are_another_content(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path, facts={"kind": "test", "cut": "layer2"})
    assert read(path) == []


def test_readers_share_a_file_and_prevent_its_removal(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    assert not is_in_use(path)
    one, other = BlockFile(path, FACTS, 3), BlockFile(path, FACTS, 3)
    assert one.is_complete and other.is_complete
    assert is_in_use(path)
    one.close()
    other.close()
    assert not is_in_use(path)


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    writer = BlockFile(path, FACTS, len(CONTENT))
    waited = threading.Event()
    found: list[list[bytes]] = []
    reader = threading.Thread(target=lambda: found.append(read(path, on_wait=waited.set)))
    reader.start()
    assert waited.wait(10)
    for block in CONTENT:
        writer.append(block)
    reader.join(10)
    assert found == [CONTENT]
    writer.close()


def test_waiting_can_be_ended(tmp_path: Path) -> None:
    writer = BlockFile(tmp_path / "test.bin", FACTS, 1)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BlockFile(tmp_path / "test.bin", FACTS, 1, on_wait=stop)
    writer.close()


def test_a_damaged_file_is_started_anew_while_others_read_it(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    reader = BlockFile(path, FACTS, 3)
    with path.open("rb") as mine, path.open("r+b") as file:
        file.write(b"X")
        file.flush()
        other = BlockFile(path, FACTS, 3)
        assert other.was_damaged
        for block in CONTENT:
            other.append(block)
        assert other.read()[:3] == b"one"
        assert mine.read(3) == b"Xne"
    reader.close()


def test_a_file_of_a_killed_writer_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    code = (
        "import os, signal, sys, pathlib; from finetune.runs.block_file import BlockFile\n"
        f"file = BlockFile(pathlib.Path(sys.argv[1]), {FACTS!r}, 3)\n"
        "file.append(b'one'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read(path) == [b"one"]
    fill(path)
    assert read(path) == CONTENT


def test_a_removed_file_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path, CONTENT[:1])
    file = BlockFile(path, FACTS, 3)
    path.unlink()
    with pytest.raises(OSError, match="removed"):
        file.append(CONTENT[1])
    file.close()
    fill(path)
    assert read(path) == CONTENT


def test_an_incomplete_file_survives_the_lock_of_a_reader(tmp_path: Path) -> None:
    """``finetune cache clear`` holds the lock for a moment, which is no error."""
    path = tmp_path / "test.bin"
    fill(path, CONTENT[:2])
    looks: list[int] = []
    with journal_of(path).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)

        def go_away() -> None:
            looks.append(1)
            fcntl.flock(other, fcntl.LOCK_UN)

        file = BlockFile(path, FACTS, 3, on_wait=go_away)
    assert looks == [1]
    assert len(file.blocks) == 2


def test_without_file_locks_opening_fails(tmp_path: Path) -> None:
    refused = mock.patch("finetune.runs.journal.fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks"))
    with refused, pytest.raises(OSError, match="No locks"):
        BlockFile(tmp_path / "test.bin", FACTS, 3)


def test_a_file_in_use_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "test.bin"
    fill(path)
    reader = BlockFile(path, FACTS, 3)
    assert not remove_unused(path)
    reader.close()
    assert remove_unused(path)
    assert not remove_unused(path)
