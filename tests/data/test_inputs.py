from __future__ import annotations

import io
import os
import time
from itertools import islice
from pathlib import Path

import pytest

from finetune.data import folders
from finetune.data.inputs import LONGEST_PATH, NOT_UTF8, find_inputs
from finetune.errors import DataError, UsageError

NOTHING = io.BytesIO()


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def paths(words: Path | str) -> list[str]:
    return [one.path for one in find_inputs(str(words), NOTHING).open()]


def test_a_folder_is_walked_in_the_order_of_names(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.jpg", "b/1.jpg", "b/a/9.png", "a/z/1.jpg", "z.jpg", "a.JPEG", ".hidden.jpg", "b.txt")
    assert paths(tmp_path) == ["a.JPEG", "z.jpg", "a/z/1.jpg", "b/1.jpg", "b/2.jpg", "b/a/9.png"]


def test_a_folder_is_walked_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, *(f"{number:02}/{place}.jpg" for number in range(50) for place in range(3)))
    seen = []
    listing = folders.listing
    monkeypatch.setattr(folders, "listing", lambda *words: (seen.append(words[1]), listing(*words))[1])
    walk = find_inputs(str(tmp_path), NOTHING).open()
    assert [one.path for one in islice(walk, 4)] == ["00/0.jpg", "00/1.jpg", "00/2.jpg", "01/0.jpg"]
    assert seen == ["", "00", "01"]
    assert len(list(walk)) == 146


def test_a_cycle_of_links_ends(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert paths(tmp_path) == ["a/1.jpg"]


def test_standard_input_is_read_line_by_line() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        walk = find_inputs("-", stream).open()
        os.write(writing, b"a.jpg\nb.j")
        assert next(walk).path == "a.jpg"
        os.write(writing, b"pg\nc.jpg")
        assert next(walk).path == "b.jpg"
        os.close(writing)
        assert [one.path for one in walk] == ["c.jpg"]


def test_standard_input_without_an_end_of_a_path_is_refused() -> None:
    with Path("/dev/zero").open("rb") as endless, pytest.raises(DataError, match="more than 65,536 bytes"):
        list(find_inputs("-", endless).open())


def test_the_longest_path_is_one(tmp_path: Path) -> None:
    for path in ("x" * 4096, "\u8702" * 1365):
        [image] = find_inputs("-", io.BytesIO(path.encode())).open()
        assert (image.path, image.fault) == (path, "")
    [image] = find_inputs("-", io.BytesIO("\u8702".encode() * 1366)).open()
    assert "more than 4,096 bytes" in image.fault
    table = tmp_path / "t.csv"
    table.write_text("path\n" + "x" * 100_000 + "\na\0b\n")
    first, second = find_inputs(str(table), None).open()
    assert len(first.path) == LONGEST_PATH + 3 and "more than 4,096 bytes" in first.fault
    assert second.path == r"a\0b" and "zero byte" in second.fault


def test_a_file_called_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    fill(tmp_path, "a[1].jpg", "a1.jpg")
    assert paths(tmp_path / "a[1].jpg") == [str(tmp_path / "a[1].jpg")]
    assert paths(tmp_path / "a[0-9].jpg") == [str(tmp_path / "a1.jpg")]


def test_rows_of_a_csv_file_are_read_one_by_one(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_bytes(b'\xef\xbb\xbflabel,path\nx,a.jpg\n\nx\nx,"b,c.jpg"\nx,../d.jpg\n')
    found = list(find_inputs(str(table), NOTHING).open())
    assert [one.path for one in found] == ["a.jpg", "", "b,c.jpg", "../d.jpg"]
    assert [bool(one.fault) for one in found] == [False, True, False, True]
    assert found[0].file == tmp_path / "a.jpg"
    assert not any(
        one.fault for one in find_inputs(str(table), NOTHING, follow_links=True).open() if one.path
    )


def test_names_that_are_not_utf8_are_bad_from_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [b"photos/a.jpg", b"photos/b\xff.jpg", b"photos/z\xff/c.jpg"]
    for name in names:
        fill(tmp_path, os.fsdecode(name))
    stream = io.BytesIO(b"\n".join(names))
    shown = ["a.jpg", r"b\udcff.jpg", r"z\udcff/c.jpg"]
    for words, before in (("photos", ""), ("photos/**/*.jpg", "photos/"), ("-", "photos/")):
        found = list(find_inputs(words, stream).open())
        assert [one.path for one in found] == [before + name for name in shown]
        assert [one.fault for one in found] == ["", NOT_UTF8, NOT_UTF8]
    assert [one.fault for one in find_inputs(os.fsdecode(names[1]), None).open()] == [NOT_UTF8]


def test_standard_input_matters_only_if_it_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    assert [one.path for one in find_inputs(str(tmp_path), None).open()] == ["a.jpg"]
    closed = io.BytesIO()
    closed.close()
    for stream in (None, closed):
        with pytest.raises(UsageError, match="standard input: it is closed"):
            find_inputs("-", stream)


def test_hidden_images_are_told_of_and_have_no_row(tmp_path: Path) -> None:
    for name in ("a.jpg", ".b.jpg", ".kept/deep/c.jpg", ".DS_Store", ".git/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inputs = find_inputs(str(tmp_path), None)
    for _ in range(2):
        assert [image.path for image in inputs.open()] == ["a.jpg"]
        assert (
            str(inputs.left_out)
            == "Hidden images and hidden folders with images have no row: '.b.jpg', '.kept'."
        )
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="holds no images") as error:
        list(inputs.open())
    assert "Hidden images are not read ('.b.jpg', '.kept')" in error.value.fix


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.7z"])
def test_an_archive_is_refused_as_what_it_is(tmp_path: Path, name: str) -> None:
    fill(tmp_path, name)
    with pytest.raises(DataError, match="is an archive"):
        find_inputs(str(tmp_path / name), None)


def test_a_pattern_longer_than_any_path_is_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match="more than 4,096 bytes"):
        find_inputs("[" * 50_000 + "*", NOTHING)
    assert time.monotonic() - began < 5
    assert find_inputs("[" * 1000 + "*" + "x" * 3095, NOTHING).asked
