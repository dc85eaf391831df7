"""A cached scan of a file is valid while the file is unchanged; a damaged cache file is ignored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data import scan, scan_cache
from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.scan import CheckedImages, check_images
from finetune.data.scan_cache import ScanCache, clear_scans
from finetune.data.split import SplitConfig
from tests.conftest import draw_folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A dataset whose files count as unchanged for long enough."""
    monkeypatch.setattr(scan_cache, "SETTLED_SECONDS", -60.0)
    return discover(draw_folder(tmp_path / "data", {"red": 6, "blue": 6}), SplitConfig(0.2, 0))


def scan_data(data: Dataset, decode: bool = True) -> CheckedImages:
    return check_images(data, decode=decode, store=ScanCache(data.root))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from now on, in order."""
    files: list[Path] = []
    probe = scan.probe_image

    def note(path: Path) -> object:
        files.append(path)
        return probe(path)

    monkeypatch.setattr(scan, "probe_image", note)
    return files


def test_a_second_scan_decodes_nothing_and_gives_the_same_result(data: Dataset, probed: list[Path]) -> None:
    first = scan_data(data)
    assert len(probed) == 12
    again = scan_data(data)
    assert len(probed) == 12
    assert (again.bad, again.digests, again.scan.paths) == (first.bad, first.digests, first.scan.paths)
    assert again.scan.rows.tobytes() == first.scan.rows.tobytes()
    assert scan_data(data, decode=False).digests == first.digests
    assert len(probed) == 12


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_scanned_again(data: Dataset, probed: list[Path], keep_times: bool) -> None:
    before = scan_data(data)
    file = data.file(data.samples[0])
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    if keep_times:  # ctime still changes
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    probed.clear()
    after = scan_data(data)
    assert probed == [file]
    assert after.digests[data.samples[0].path] != before.digests[data.samples[0].path]


def test_a_file_that_changed_a_moment_ago_is_not_cached(tmp_path: Path, probed: list[Path]) -> None:
    data = discover(draw_folder(tmp_path / "data", {"red": 2, "blue": 2}), SplitConfig(0.5, 0))
    scan_data(data)
    scan_data(data)
    assert len(probed) == 8


def test_bad_images_are_scanned_every_time(data: Dataset, probed: list[Path]) -> None:
    data.file(data.samples[3]).write_bytes(b"")
    assert [image.reason for image in scan_data(data).bad] == ["empty file"]
    probed.clear()
    assert [image.reason for image in scan_data(data).bad] == ["empty file"]
    assert len(probed) == 1


HEADS: list[Any] = [-5, 10**30, True, 1.5, None, "3", [], {}]


@pytest.mark.parametrize("value", HEADS)
@pytest.mark.parametrize("key", ["path_bytes", "num_images"])
def test_a_damaged_number_in_the_cache_file_is_detected(data: Dataset, key: str, value: Any) -> None:
    scan_data(data)
    path = ScanCache(data.root).path
    head, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(head) | {key: value}).encode() + b"\n" + rest)
    assert len(ScanCache(data.root)._known) == 0


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_in_the_place_of_the_cache_file_is_ignored(
    data: Dataset, make: Callable[[Path], object]
) -> None:
    first = scan_data(data)
    path = ScanCache(data.root).path
    path.unlink()
    make(path)
    assert scan_data(data).digests == first.digests
    clear_scans()


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "head", "noise", "version"])
def test_a_damaged_cache_file_is_ignored(
    data: Dataset, probed: list[Path], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan_data(data)
    path = ScanCache(data.root).path
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-100] ^= 1
    spoilt = {
        "cut": content[:-10],
        "empty": b"",
        "head": b"{}\n" + content,
        "noise": b"\xff" * 500,
    }.get(damage, content)
    path.write_bytes(spoilt)
    if damage == "version":
        monkeypatch.setattr(scan_cache, "_FORMAT", 99)
    probed.clear()
    assert scan_data(data).digests == first.digests
    assert len(probed) == 12
    probed.clear()
    scan_data(data)
    assert probed == []


def test_two_csv_files_of_one_folder_share_a_cache_file(data: Dataset, probed: list[Path]) -> None:
    few = data.without({sample.path for sample in data.samples[:5]})
    many = data.without({sample.path for sample in data.samples[5:]})
    for dataset in (few, many, few, many):
        check_images(dataset, store=ScanCache(dataset.root, keep_others=True))
    assert len(probed) == 12


def test_a_cache_that_cannot_be_written_is_no_error(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert scan_data(data).bad == ()


def test_a_row_describes_the_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (60, 40), "red").save(tmp_path / name / "0.jpg", exif=exif)
        Image.new("P", (20, 30)).save(tmp_path / name / "1.gif")
    data = discover(tmp_path, SplitConfig(0.5, 0))
    found = check_images(data).scan.select(["a/0.jpg", "a/1.gif"])
    assert [found.format_of(place) for place in (0, 1)] == ["JPEG", "GIF"]
    assert [found.mode_of(place) for place in (0, 1)] == ["RGB", "P"]
    assert found.rows["width"].tolist() == [40, 20] and found.rows["height"].tolist() == [60, 30]
    assert found.rows["thumbnail"].shape == (2, 16, 16)
    assert np.abs(found.rows["thumbnail"][0].astype(int) - 76).max() <= 2  # red in grey


def test_the_perceptual_hash_is_that_of_imagehash(tmp_path: Path) -> None:
    import imagehash

    from tests.data.quality.spoilt import photo

    for number in range(4):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        photo(number, (32, 32)).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    data = discover(tmp_path, SplitConfig(0.5, 0))
    found = check_images(data).scan
    for path, kept in zip(found.paths, found.rows["phash"].tolist(), strict=True):
        with Image.open(tmp_path / path) as image:
            assert f"{kept:016x}" == str(imagehash.phash(image))


@pytest.mark.parametrize(
    "head", [b"[" * 60_000, b'{"path_bytes": 99999999999999, "num_images": 1}', b'{"path_bytes": -1}', b"7"]
)
def test_a_hostile_cache_file_is_ignored(data: Dataset, head: bytes) -> None:
    scan_data(data)
    store = ScanCache(data.root)
    store.path.write_bytes(head + b"\n" + store.path.read_bytes())
    assert len(ScanCache(data.root)._known) == 0
    assert len(scan_data(data).scan) == 12 and len(ScanCache(data.root)._known) == 12
