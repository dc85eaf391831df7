"""Files that others may have prepared: pipes never block, and links are not written through."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from finetune.system.regular_files import create_regular, open_regular, open_to_update

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
