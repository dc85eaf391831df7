"""Files that others may have prepared: pipes never block, and links are not written through."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from finetune.system import regular_files
from finetune.system.regular_files import (
    MOST_BYTES,
    _WholeFile,
    bounded_lines,
    create_regular,
    open_regular,
    open_text,
    open_to_update,
    read_regular,
)

OPENERS: tuple[Callable[[Path], BinaryIO], ...] = (open_regular, open_to_update)


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("opener", OPENERS)
def test_a_pipe_a_folder_and_a_device_are_refused_at_once(
    tmp_path: Path, opener: Callable[[Path], BinaryIO]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "pipe", "named pipe"),
        (tmp_path, "folder|directory"),
        (Path("/dev/zero"), "device"),
    ):
        with pytest.raises(OSError, match=said):
            opener(path)


@pytest.mark.parametrize("name", ["null\0", "half \ud800"])
def test_a_name_that_no_file_can_have_names_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / name)


def test_a_file_is_read_through_a_link_and_never_written_through_one(tmp_path: Path) -> None:
    victim, link, second = tmp_path / "victim", tmp_path / "link", tmp_path / "second"
    victim.write_bytes(b"precious")
    link.symlink_to(victim)
    with open_regular(link) as file:
        assert file.read() == b"precious"
    with pytest.raises(OSError, match="symbolic link"):
        open_to_update(link)
    os.link(victim, second)
    with pytest.raises(OSError, match="second name"):
        open_to_update(second)
    for name in (link, second):
        with create_regular(name) as file:
            file.write(b"new")
        assert not name.is_symlink()
        assert name.read_bytes() == b"new"
    assert victim.read_bytes() == b"precious"


def test_a_file_of_our_own_is_created_and_kept(tmp_path: Path) -> None:
    with open_to_update(tmp_path / "own") as file:
        file.write(b"first")
    with open_to_update(tmp_path / "own") as file:
        assert file.read() == b"first"


def test_a_stream_that_counts_as_a_file_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """``/proc/kmsg`` is a regular file that has no bytes yet: read without waiting, it gives None."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    with io.BufferedReader(_WholeFile(reading, tmp_path)) as file:
        for read in (file.read, file.readline, lambda: file.readinto(bytearray(9))):
            with pytest.raises(OSError, match="a stream, not a file"):
                read()
        os.write(writing, b"now")
        os.close(writing)
        assert file.read() == b"now"


def test_a_file_that_would_fill_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    for read in (read_regular, lambda path: open_text(path, MOST_BYTES)):
        with pytest.raises(OSError, match="1,099,511,627,776 bytes, more than 1,073,741,824"):
            read(sparse)
    monkeypatch.setattr(regular_files, "_LONGEST_LINE", 1000)
    with open_text(sparse) as text, pytest.raises(ValueError, match="more than 1,000 characters"):
        list(bounded_lines(text))
    (tmp_path / "lines").write_bytes(b"x" * 998 + b"\n" + b"y")
    with open_text(tmp_path / "lines") as text:
        assert [len(line) for line in bounded_lines(text)] == [999, 1]
