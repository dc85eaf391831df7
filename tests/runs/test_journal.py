from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.runs.journal import Journal, parse, read_facts, read_journal

FACTS = {"kind": "test", "sizes": (1, 2)}


def open_journal(folder: Path, durable: bool = True) -> Journal:
    return Journal(folder / "x.journal", [folder / "a", folder / "b"], FACTS, durable=durable)


def write(folder: Path, number: int) -> None:
    journal = open_journal(folder)
    assert journal.load()
    for place in range(len(journal.blocks), number):
        journal.append([f"{place}, ".encode(), b"?" * place], {"place": place})
    journal.close()


def test_blocks_are_read_back(tmp_path: Path) -> None:
    write(tmp_path, 3)
    journal, seen = open_journal(tmp_path), list[int]()
    assert journal.load(seen.append)
    assert [block.sizes for block in journal.blocks] == [(3, 0), (3, 1), (3, 2)]
    assert [block.note for block in journal.blocks] == [{"place": 0}, {"place": 1}, {"place": 2}]
    assert seen == [3, 4, 5]
    assert read_facts(journal.path) == {"kind": "test", "sizes": [1, 2]}
    assert (tmp_path / "a").read_bytes() == b"0, 1, 2, " and (tmp_path / "b").read_bytes() == b"???"


def spoil_file(folder: Path) -> None:
    (folder / "b").write_bytes(b"??!")


def cut_file(folder: Path) -> None:
    os.truncate(folder / "a", 8)


def remove_file(folder: Path) -> None:
    (folder / "a").unlink()


def spoil_line(folder: Path) -> None:
    path = folder / "x.journal"
    path.write_bytes(path.read_bytes().replace(b'"bytes": [3, 1]', b'"bytes": [3, -1]'))


def spoil_head(folder: Path) -> None:
    path = folder / "x.journal"
    path.write_bytes(path.read_bytes().replace(b'"journal": 2', b'"journal": 1'))


@pytest.mark.parametrize("spoil", [spoil_file, cut_file, remove_file, spoil_line, spoil_head])
def test_changed_content_is_not_used(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    write(tmp_path, 3)
    spoil(tmp_path)
    journal = open_journal(tmp_path)
    assert not journal.load()
    assert journal.blocks == []
    journal.restart()
    journal.append([b"new", b""])
    journal.close()
    assert (tmp_path / "a").read_bytes() == b"new" and (tmp_path / "b").read_bytes() == b""
    journal = open_journal(tmp_path)
    assert journal.load() and len(journal.blocks) == 1


@pytest.mark.slow
def test_a_kill_at_any_byte_leaves_the_blocks_before_it(tmp_path: Path) -> None:
    write(tmp_path, 3)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lines = whole["x.journal"]
    for end in range(len(lines)):
        (tmp_path / "x.journal").write_bytes(lines[:end])
        (tmp_path / "a").write_bytes(whole["a"] + b"torn")
        write(tmp_path, 3)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole, end


@pytest.mark.parametrize("durable", [True, False])
def test_a_killed_process_leaves_whole_blocks(tmp_path: Path, durable: bool) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from finetune.runs.journal import Journal\n"
        "folder = Path(sys.argv[1])\n"
        f"files, facts = [folder / 'a', folder / 'b'], {FACTS!r}\n"
        f"journal = Journal(folder / 'x.journal', files, facts, durable={durable})\n"
        "assert journal.load(); journal.append([b'one', b''], 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    journal = open_journal(tmp_path, durable)
    assert journal.lock(fcntl.LOCK_EX) and journal.load()
    assert [block.note for block in journal.blocks] == [1]


@pytest.mark.parametrize("durable", [True, False])
def test_a_block_is_flushed_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    journal, flushed = open_journal(tmp_path, durable), list[str]()
    journal.begin()
    flush = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    journal.append([b"1", b"2"])
    assert flushed == (["a", "b", "x.journal"] if durable else [])


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    one, other = open_journal(tmp_path), open_journal(tmp_path)
    assert one.lock(fcntl.LOCK_EX) and not other.lock(fcntl.LOCK_SH)
    one.path.unlink()
    one.close()
    assert other.lock(fcntl.LOCK_EX) and other.was_removed()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]\n",
        b"7\n",
        b"{}\n",
        b'{"journal": 2}\n',
        b'{"journal": 2, "facts": {}}\n7\n',
        b"\xff\n",
    ],
)
def test_invalid_journals_are_ignored(tmp_path: Path, content: bytes) -> None:
    assert parse(content, 2) is None
    (tmp_path / "x.journal").write_bytes(content)
    assert read_journal(tmp_path / "x.journal", 2) is None
    assert read_journal(tmp_path / "y.journal", 2) is None


def test_a_sparse_journal_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    os.truncate(tmp_path / "x.journal", 2**40)
    assert read_journal(tmp_path / "x.journal", 2) is None
    assert not open_journal(tmp_path).load()
