"""A zip archive gives the same dataset as its folder; a hostile one neither escapes nor fills the disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import pytest

from finetune.data.archives import archive, plan
from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.errors import DataError, DiskError, ExitCode
from finetune.runs import cache_dir as made_once

PLAIN = tuple(f"{name}/{n}.jpg" for name in ("ant", "bee") for n in range(4))
Entry = str | tuple[str | zipfile.ZipInfo, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty; the flush of the whole machine's disks is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sync", lambda: None)
    return tmp_path / "cache" / "finetune" / "archives"


def packed(path: Path, *entries: Entry, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive of these entries, in order; a bare name holds its own name as content."""
    with zipfile.ZipFile(path, "w", method) as file:
        for entry in entries:
            name, content = (entry, entry.encode()) if isinstance(entry, str) else entry
            file.writestr(name, content)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """Change bytes of an archive, in the entry and in the table of contents."""
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    path.write_bytes(data.replace(old, new))
    return path


def found(data: Path) -> Dataset:
    return discover(data, SplitConfig(0.25, 0))


def refused(data: Path, kind: type[DataError | DiskError] = DataError) -> DataError | DiskError:
    with pytest.raises(kind) as error:
        found(data)
    if kind is DataError:
        assert error.value.asked == f"--data {data}"
    str(error.value).encode()
    return error.value


def names(folder: Path) -> list[str]:
    """Everything below a folder, by its path."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def limit(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Change a limit, or a check, wherever it is used."""
    for module in (archive, plan):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


def unpacked(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []


# What is read


def test_an_archive_reads_as_its_folder(tmp_path: Path, cache: Path) -> None:
    for split in ("train", "val", "test"):
        for name in PLAIN:
            (tmp_path / "data" / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / split / name).write_text(split + name)
    file = Path(shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data"))
    by_folder, by_archive = found(tmp_path / "data"), found(file)
    assert by_archive.samples == by_folder.samples and by_archive.classes == by_folder.classes
    assert by_archive.warnings == () and by_archive.is_folder
    assert by_archive.root.parent == cache
    for sample in by_archive.samples:
        assert by_archive.file(sample).read_text() == by_folder.file(sample).read_text()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_single_top_folder_is_entered(tmp_path: Path) -> None:
    dataset = found(packed(tmp_path / "flowers.zip", *(f"flowers/{name}" for name in PLAIN)))
    assert dataset.root.name == "flowers"
    assert {sample.path for sample in dataset.samples} == set(PLAIN)


def test_train_alone_is_not_entered(tmp_path: Path) -> None:
    """The split depends on the paths: it must be that of the folder."""
    dataset = found(packed(tmp_path / "x.zip", *(f"train/{name}" for name in PLAIN)))
    assert all(sample.path.startswith("train/") for sample in dataset.samples)


def test_a_single_class_is_not_entered(tmp_path: Path) -> None:
    assert "only one class, 'ant'" in refused(packed(tmp_path / "x.zip", *PLAIN[:4])).found


def test_folders_in_folders_are_named_without_the_cache(tmp_path: Path) -> None:
    assert found(packed(tmp_path / "y.zip", *(f"a/b/{name}" for name in PLAIN))).classes == ("ant", "bee")
    error = refused(packed(tmp_path / "x.zip", "a/x.csv", "a/y.csv", *(f"a/b/{name}" for name in PLAIN)))
    assert "only one class" in error.found
    assert error.fix.startswith("Pack it so that the class folders, or train/, lie at the top.")
    assert str(tmp_path) not in error.fix


def test_only_images_and_tables_are_unpacked(tmp_path: Path) -> None:
    more = ("labels.csv", "x.sh", "ant/x.PNG", "ant/x.py", "__MACOSX/ant/._0.jpg", ".git/0.jpg", "ant/.1.jpg")
    dataset = found(packed(tmp_path / "x.zip", *PLAIN, *more, "bee/Thumbs.db", "bee/a.py"))
    wanted = [*PLAIN, "labels.csv", "ant/x.PNG", "ant/.1.jpg", "ant", "bee", ".left-out.json"]
    assert names(dataset.root) == sorted(wanted)
    assert dataset.warnings == (
        "Files in the archive that are not images are left out: .py (2), .sh (1).",
        "Hidden images and hidden folders with images are not read: 'ant/.1.jpg'.",
    )


@pytest.mark.parametrize("name", [".left-out.json", ".names.json"])
@pytest.mark.parametrize(
    "text", ["5", "[]", '{".py": "two"}', "[" * 100_000, "", '{".py": null}', "NaN", None]
)
def test_a_damaged_note_of_an_archive_is_ignored(tmp_path: Path, name: str, text: str | None) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN, "x.py", "ant/caf\u00e9.py")
    first = found(file)
    note = first.root / name
    note.unlink(missing_ok=True)
    os.mkfifo(note) if text is None else note.write_text(text)
    assert found(file).samples == first.samples


def test_a_class_without_images_is_reported(tmp_path: Path) -> None:
    assert "'wasp' holds no images" in refused(packed(tmp_path / "a.zip", *PLAIN, "wasp/0.txt")).found
    assert "'wasp' holds no images" in refused(packed(tmp_path / "b.zip", *PLAIN, ("wasp/", b""))).found


def test_names_in_utf8_with_and_without_the_flag(tmp_path: Path) -> None:
    flagged = packed(tmp_path / "a.zip", *PLAIN, "caf\u00e9/\u65e5\u672c 1.jpg", "caf\u00e9/2.jpg")
    plain = packed(tmp_path / "b.zip", *PLAIN, "cafXX/1.jpg", "cafXX/2.jpg")
    patched(plain, b"cafXX", "caf\u00e9".encode())
    assert found(flagged).classes == found(plain).classes == ("ant", "bee", "caf\u00e9")


def test_dots_in_paths_are_plain_folders(tmp_path: Path) -> None:
    dataset = found(packed(tmp_path / "x.zip", *(f"./{name}" for name in PLAIN), "ant//9.jpg"))
    assert {sample.path for sample in dataset.samples} == {*PLAIN, "ant/9.jpg"}


def test_progress_counts_the_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = packed(tmp_path / "x.zip", *PLAIN, "README")
    discover(file, SplitConfig(0.25, 0), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]
    discover(file, SplitConfig(0.25, 0), on_progress=lambda done, total: pytest.fail("unpacked again"))


def test_the_same_archive_is_unpacked_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN)
    before = found(file)
    (before.root / "ant/0.jpg").write_text("still there")
    copy = Path(shutil.copy(file, tmp_path / "another name.zip"))
    monkeypatch.setattr(made_once, "_locked", None)  # nothing is written: a cache that is read only will do
    assert found(copy) == before
    assert (before.root / "ant/0.jpg").read_text() == "still there"
    assert len(unpacked(cache)) == 1


def test_other_content_gets_another_folder(tmp_path: Path, cache: Path) -> None:
    first = found(packed(tmp_path / "x.zip", *PLAIN))
    second = found(packed(tmp_path / "x.zip", *PLAIN, "ant/9.jpg"))
    assert first.root != second.root and len(second.samples) == len(first.samples) + 1


@pytest.mark.parametrize("named", ["", "relative/cache"])
def test_the_cache_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    dataset = found(packed(tmp_path / "x.zip", *PLAIN))
    assert dataset.root.parent == tmp_path / "home/.cache/finetune/archives"


# Hostile names


def link(name: str, mode: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (mode | 0o777) << 16
    return entry


HOSTILE: tuple[tuple[Entry, str], ...] = (
    ("../evil.jpg", "'../evil.jpg' leads upwards"),
    ("ant/../../evil.jpg", "leads upwards"),
    ("../evil.sh", "leads upwards"),
    ("__MACOSX/../../evil.jpg", "leads upwards"),
    ("ant/..", "leads upwards"),
    ("/etc/evil.jpg", "'/etc/evil.jpg' is an absolute path"),
    ("//evil.jpg", "is an absolute path"),
    ("C:/evil.jpg", "is an absolute path"),
    ("c:evil.jpg", "is an absolute path"),
    ("..\\evil.jpg", "leads upwards"),
    ("ant\\..\\..\\evil.jpg", "leads upwards"),
    ("\\\\server\\evil.jpg", "is an absolute path"),
    ("C:\\evil.jpg", "is an absolute path"),
    ("ant\\0.jpg", "is in there twice"),
    ("ant/a\nb.jpg", "holds a control character"),
    ("ant/\x1b[31m.jpg", "holds a control character"),
    ("ant/a\u2028b.jpg", "holds a control character"),
    ("ant/0.jpg", "'ant/0.jpg' is in there twice"),
    ("ant/./0.jpg", "is in there twice"),
    ("ant", "'ant' is both a file and a folder"),
    ("ant/0.jpg/1.jpg", "'ant/0.jpg' is both a file and a folder"),
    ("a/" * 40 + "0.jpg", "is too long"),
    (f"ant/{'x' * 2000}.jpg", "is too long"),
    (f"ant/{'x' * 300}.jpg", "has a part that is too long"),
    ("ant/.", "is no name"),
    ((link("ant/link.jpg"), b"/etc/passwd"), "'ant/link.jpg' is a link"),
    ((link("wasp"), b"/etc"), "'wasp' is a link"),
    (
        (link("ant/pipe.jpg", stat.S_IFIFO), b""),
        "'ant/pipe.jpg' is a link or another kind of entry that is not a file",
    ),
)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("entry", "fault"), HOSTILE, ids=[fault for _, fault in HOSTILE])
def test_a_hostile_entry_is_refused_by_name(tmp_path: Path, cache: Path, entry: Entry, fault: str) -> None:
    before = names(tmp_path)
    error = refused(packed(tmp_path / "x.zip", *PLAIN, entry))
    assert fault in error.found
    assert error.found.startswith("1 entry is not what a plain archive of images holds:\n  ")
    assert len(error.found) < 400 and "\x1b" not in error.found
    assert list(cache.iterdir()) == []  # no lock either
    left = [name for name in names(tmp_path) if not name.startswith(("cache", "x.zip"))]
    assert left == before


def test_hostile_entries_are_counted_and_the_first_named(tmp_path: Path) -> None:
    error = refused(packed(tmp_path / "x.zip", *PLAIN, *(f"../{n}.jpg" for n in range(8))))
    assert error.found.startswith("8 entries are not") and error.found.endswith("\n  and 3 more")
    assert error.found.count("leads upwards") == 5


def test_a_zero_byte_in_a_name_is_refused(tmp_path: Path) -> None:
    file = patched(packed(tmp_path / "x.zip", *PLAIN, "ant/x#.jpg"), b"x#.jpg", b"x\0.jpg")
    assert "'ant/x\\x00.jpg' holds a control character" in refused(file).found


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    plain = patched(packed(tmp_path / "a.zip", *PLAIN, "ant/##.jpg"), b"ant/##", b"ant/\xfc\xff")
    assert "is not UTF-8" in refused(plain).found
    flagged = patched(packed(tmp_path / "b.zip", *PLAIN, "ant/\u00e9.jpg"), "\u00e9".encode(), b"\xff\xff")
    error = refused(flagged)
    assert "b'ant/\\xff\\xff.jpg', which is not UTF-8" in error.found


@pytest.mark.parametrize("flag", [0x1, 0x41])
def test_encrypted_archives_are_refused(tmp_path: Path, flag: int) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN)
    data = bytearray(file.read_bytes())
    start = data.index(b"PK\1\2")
    data[6] |= flag
    data[start + 8] |= flag
    file.write_bytes(data)
    error = refused(file)
    assert "'ant/0.jpg' is encrypted" in error.found and "password" in error.fix


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_methods_without_a_limit_are_refused(tmp_path: Path, method: int) -> None:
    assert f"is packed by method {method}" in refused(packed(tmp_path / "x.zip", *PLAIN, method=method)).found


# Damage


def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"<!DOCTYPE html>", b"PK\3\4" + bytes(99)):
        (tmp_path / "x.zip").write_bytes(content)
        assert "is truncated, damaged or not a zip archive" in refused(tmp_path / "x.zip").found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_archives_are_refused(tmp_path: Path, cache: Path, share: float) -> None:
    data = packed(tmp_path / "x.zip", *PLAIN).read_bytes()
    (tmp_path / "x.zip").write_bytes(data[: int(len(data) * share)])
    assert "is truncated" in refused(tmp_path / "x.zip").found
    assert unpacked(cache) == []


def test_a_wrong_checksum_is_refused(tmp_path: Path, cache: Path) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN, ("ant/z.jpg", b"A" * 99), method=zipfile.ZIP_STORED)
    error = refused(patched(file, b"A" * 99, b"A" * 98 + b"B"))
    assert "Bad CRC-32 for file 'ant/z.jpg'" in error.found
    assert error.fix == "Get it or make it again."
    assert unpacked(cache) == []


def test_content_that_cannot_be_unpacked_is_refused(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(5000)
    file = packed(tmp_path / "x.zip", *PLAIN, ("ant/z.jpg", content))
    data = file.read_bytes()
    start = data.index(b"ant/z.jpg") + 9
    file.write_bytes(data[:start] + b"\xff" * 50 + data[start + 50 :])
    assert "is truncated, damaged" in refused(file).found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_fuzzed_archives_raise_refusals_only(tmp_path: Path, cache: Path) -> None:
    """Sound archives with a few bytes changed, cut out or put in: nothing lands outside the cache."""
    rng = random.Random(2026)
    whole = packed(tmp_path / "x.zip", *PLAIN, "../a.jpg", ("bee/z.jpg", bytes(9000))).read_bytes()
    sound = packed(tmp_path / "x.zip", *PLAIN, ("bee/z.jpg", bytes(9000))).read_bytes()
    read = 0
    for case in range(1000):
        data = bytearray(rng.choice([whole, sound]))
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(data))
            if case % 3 == 0:
                data[place : place + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
            else:
                data[place] = rng.randrange(256)
        (tmp_path / "x.zip").write_bytes(data)
        try:
            dataset = found(tmp_path / "x.zip")
        except DataError:
            continue
        read += 1
        for sample in dataset.samples:
            assert Path(os.path.realpath(dataset.file(sample))).is_relative_to(cache)
        shutil.rmtree(cache)
    assert {path.name for path in tmp_path.iterdir()} <= {"x.zip", "cache"}
    assert 0 < read < 500


# Limits


def zeros(path: Path, size: int, number: int = 1) -> Path:
    return packed(path, *PLAIN, *((f"ant/z{n}.jpg", bytes(size)) for n in range(number)))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MAX_FILE_BYTES", 9_999, "holds a file of more than 1 MB"),
        ("MAX_BYTES", 25_000, "holds more than 1 MB"),
        ("FREE_BYTES", 20_000, "grows to more than 100 times its size"),
        ("MAX_ENTRIES", 5, "holds more than 5 files and folders"),
        ("MAX_NAMES_BYTES", 300, "holds more than 1000000 files and folders"),
    ],
)
@pytest.mark.parametrize("honest", [True, False])
def test_limits(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: int,
    said: str,
    honest: bool,
) -> None:
    file = zeros(tmp_path / "x.zip", 10_000, 3)
    if name == "FREE_BYTES":
        limit(monkeypatch, "MAX_RATIO", 10)
        said = "grows to more than 10 times its size"
    limit(monkeypatch, name, value)
    if not honest:  # what the table of contents says is not asked; the bytes that come out are counted
        limit(monkeypatch, "check_sizes", lambda *_: None)
    error = refused(file)
    assert said in error.found
    assert unpacked(cache) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_FILE_BYTES", 10_000),
        ("MAX_BYTES", 4096 * (2 + 8 + 3)),  # two folders, eight files of a block, one of three
        ("MAX_ENTRIES", 2 + 9),
    ],
)
def test_limits_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    file = zeros(tmp_path / "x.zip", 10_000)
    limit(monkeypatch, name, value - 1)
    refused(file)
    limit(monkeypatch, name, value)
    assert len(found(file).samples) == 9


# Folders


def deep(*parts: object) -> str:
    """A name in a folder 30 folders below the first part."""
    return f"{parts[0]}/" + "d/" * 29 + "/".join(map(str, parts[1:]))


@pytest.mark.parametrize("last", ["x.txt", ""])
def test_folders_of_what_is_left_out_are_not_made(tmp_path: Path, cache: Path, last: str) -> None:
    """A small archive would make a hundred thousand of them. The first is made: it may be an empty class."""
    names = [deep(f"ant/{n}", last) for n in range(50)] + [deep(n, last) for n in range(50)]
    error = refused(packed(tmp_path / "x.zip", *PLAIN, *((name, b"") for name in names)))
    assert "class folder '0' holds no images" in error.found and "and 45 more such folders" in error.found
    (root,) = unpacked(cache)
    made = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_dir()}
    assert made == {"ant", "bee", *map(str, range(50)), *(f"ant/{n}" for n in range(50))}


def test_an_archive_without_images_makes_its_first_folders_only(tmp_path: Path, cache: Path) -> None:
    error = refused(packed(tmp_path / "x.zip", "top/ant/1.txt", "top/bee/2.txt"))
    assert "holds no class folders and no images, only .txt (2)" in error.found
    (root,) = unpacked(cache)
    assert [path.name for path in root.rglob("*") if path.is_dir()] == ["top"]


def test_an_archive_of_folders_is_refused_before_anything_is_written(tmp_path: Path, cache: Path) -> None:
    """With the real limits: each image lies alone, 30 folders deep, and 130 kilobytes would take 125 MB."""
    file = packed(tmp_path / "x.zip", *PLAIN, *((deep(n, "x.jpg"), b"") for n in range(1000)))
    assert file.stat().st_size < 300_000
    assert "grows to more than 100 times its size" in refused(file).found
    assert unpacked(cache) == []


def test_folders_count_as_entries(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "MAX_ENTRIES", 30)
    error = refused(packed(tmp_path / "x.zip", *PLAIN, deep("wasp", "x.jpg")))
    assert "holds more than 30 files and folders" in error.found and unpacked(cache) == []


def test_a_file_takes_a_block_of_the_disk(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand files of one byte take four megabytes."""
    limit(monkeypatch, "FREE_BYTES", 1000 * 4096)
    limit(monkeypatch, "MAX_RATIO", 10)
    file = packed(tmp_path / "x.zip", *((f"ant/{n}.jpg", b"x") for n in range(1000)))
    assert "grows to more than 10 times its size" in refused(file).found and unpacked(cache) == []


def test_a_file_in_the_place_of_a_folder_of_what_is_left_out(tmp_path: Path) -> None:
    error = refused(packed(tmp_path / "x.zip", *PLAIN, "ant/0.jpg/a/b/readme.txt"))
    assert "'ant/0.jpg' is both a file and a folder" in error.found


def test_a_bomb_of_zeros_is_refused(tmp_path: Path, cache: Path) -> None:
    """A hundred kilobytes that unpack to 200 megabytes; with the real limits."""
    file = tmp_path / "x.zip"
    packed(file, *PLAIN)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as bomb, bomb.open("ant/z.jpg", "w") as entry:
        for _ in range(200):
            entry.write(bytes(2**20))
    assert file.stat().st_size < 300_000
    assert "grows to more than 100 times its size" in refused(file).found
    assert unpacked(cache) == []


def test_a_bomb_with_a_false_size_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers declare a wrong size: no more is ever read, and the checksum does not match."""
    limit(monkeypatch, "FREE_BYTES", 50_000)
    file = zeros(tmp_path / "x.zip", 1_000_000)
    patched(file, struct.pack("<I", 1_000_000), struct.pack("<I", 1_000))
    error = refused(file)
    assert "Bad CRC-32" in error.found and unpacked(cache) == []


def test_a_file_shorter_than_its_declared_size_is_refused(tmp_path: Path) -> None:
    file = zeros(tmp_path / "x.zip", 1_000)
    patched(file, struct.pack("<I", 1_000), struct.pack("<I", 2_000))
    assert "'ant/z0.jpg' has 1000 bytes, and should have 2000" in refused(file).found


def test_entries_that_share_their_bytes_are_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the bomb of 42 kilobytes does it: one packed content, and a thousand entries that point to it.

    The bytes that come out are held against the size of the file, not against what its entries claim.
    """
    limit(monkeypatch, "FREE_BYTES", 100_000)
    content = zlib.compress(bytes(100_000), 9)[2:-4]
    name = b"ant/0.jpg"
    head = (20, 0, 8, 0, 33, zlib.crc32(bytes(100_000)), len(content), 100_000, len(name), 0)
    local = b"PK\3\4" + struct.pack("<5H3I2H", *head) + name + content
    table = b"".join(
        b"PK\1\2" + struct.pack("<6H3I5H2I", 20, *head[:-2], len(entry), 0, 0, 0, 0, 0, 0) + entry
        for entry in (b"ant/%d.jpg" % n for n in range(1000))
    )
    end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1000, 1000, len(table), len(local), 0)
    file = tmp_path / "x.zip"
    file.write_bytes(local + table + end)
    error = refused(file)
    assert "grows to more than 100 times its size" in error.found
    limit(monkeypatch, "check_sizes", lambda *_: None)
    refused(file)
    assert unpacked(cache) == []


# The disk


def test_lack_of_space_is_reported_before_anything_is_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    error = refused(packed(tmp_path / "x.zip", *PLAIN), DiskError)
    assert error.exit_code == ExitCode.DISK
    assert error.found.startswith("the archive needs 1 MB") and "Free some space" in error.fix
    assert unpacked(cache) == []


def test_a_disk_that_fills_up_during_unpacking(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, opened = packed(tmp_path / "x.zip", *PLAIN), Path.open

    def full(path: Path, mode: str = "r", *rest: object, **words: object) -> object:
        if path.name == "2.jpg":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *rest, **words)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    error = refused(file, DiskError)
    assert error.found.startswith("No space left on device") and "Free some space" in error.fix
    assert unpacked(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    error = refused(packed(tmp_path / "x.zip", *PLAIN), DiskError)
    assert "XDG_CACHE_HOME" in error.fix


def test_an_archive_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN)

    def closed(path: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archive, "open_regular", closed)  # chmod means nothing to root
    assert refused(file).found == "cannot be read (Permission denied)"


# A process that dies while it unpacks

SLOWLY = """
import os, sys, time
from pathlib import Path
os.sync = lambda: None
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.system.signals import StopSignal
def wait(done, total):
    if done == 3:
        print("unpacking", flush=True)
        time.sleep(60)
with StopSignal():
    discover(Path(sys.argv[1]), SplitConfig(0.25, 0), on_progress=wait)
"""


def test_a_process_that_is_asked_to_stop_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    command = [sys.executable, "-c", SLOWLY, str(packed(tmp_path / "x.zip", *PLAIN))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout and child.stdout.readline() == "unpacking\n"
    child.send_signal(signal.SIGTERM)
    child.wait(20)
    assert list(cache.iterdir()) == []


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path: Path, cache: Path) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN)
    child = subprocess.Popen([sys.executable, "-c", SLOWLY, str(file)], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "unpacking\n"
    (part,) = unpacked(cache)
    made_once.remove_leftovers(cache)
    assert part.is_dir(), "a living process keeps its folder"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert unpacked(cache) == [part] and part.name.endswith(f".part-{child.pid}")
    assert len([name for name in names(part) if name.endswith(".jpg")]) == 3
    dataset = found(file)
    assert len(dataset.samples) == 8
    assert list(cache.iterdir()) == [dataset.root]


def test_leftovers_of_a_dead_process_are_removed(tmp_path: Path, cache: Path) -> None:
    left = cache / "0123.part-1"
    (left / "ant").mkdir(parents=True)
    (left / "ant/0.jpg").touch()
    found(packed(tmp_path / "x.zip", *PLAIN))
    assert not left.exists()


def test_an_interrupt_cleans_up(tmp_path: Path, cache: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover(packed(tmp_path / "x.zip", *PLAIN), SplitConfig(0.25, 0), on_progress=interrupt)
    assert list(cache.iterdir()) == []


def count_unpacked(file: Path, counts: multiprocessing.Queue[int]) -> None:
    done: list[int] = []

    def slowly(number: int, total: int) -> None:
        done.append(number)
        time.sleep(0.02)

    discover(file, SplitConfig(0.25, 0), on_progress=slowly)
    counts.put(len(done))


def test_runs_that_start_together_unpack_once(tmp_path: Path, cache: Path) -> None:
    file = packed(tmp_path / "x.zip", *PLAIN)
    context = multiprocessing.get_context("fork")
    counts: multiprocessing.Queue[int] = context.Queue()
    runs = [context.Process(target=count_unpacked, args=(file, counts)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=60)
    assert sorted(counts.get(timeout=5) for _ in runs) == [0, 0, 0, 8]
    assert len(list(cache.iterdir())) == 1


def test_who_waits_for_a_lock_gets_the_one_that_others_see(tmp_path: Path) -> None:
    """The lock that was waited for is a file that has been removed, and that nobody else would lock."""
    path, entered = tmp_path / "x.lock", threading.Event()

    def wait() -> None:
        with made_once._locked(path) as is_locked:
            assert is_locked
            with made_once._locked(path, wait=False) as again:
                assert not again
            entered.set()

    with made_once._locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set() and not path.exists()


def test_a_file_system_without_locks(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(made_once.fcntl, "flock", unsupported)
    file = packed(tmp_path / "x.zip", *PLAIN)
    twin = found(file).root

    def faster(part: Path, folder: Path) -> None:
        shutil.copytree(part, folder)

    shutil.rmtree(twin)
    monkeypatch.setattr(archive, "write_json", lambda path, value: faster(path.parent, twin))
    assert len(found(file).samples) == 8
    assert unpacked(cache) == [twin]
