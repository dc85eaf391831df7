"""Unreadable images are found before training, and only a few training images may be missing."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from PIL import Image

from finetune.data import scan
from finetune.data.dataset import BadImage, Dataset, Sample, Split
from finetune.data.decode import BadImageError
from finetune.data.discover import discover
from finetune.data.scan import check_bad, check_images
from finetune.data.split import SplitConfig
from finetune.errors import DataError, ExitCode


def images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8), "teal").save(folder / name)


def listed(train: int, val: int = 2, test: int = 0) -> Dataset:
    """Return a dataset of two classes whose files do not exist."""
    splits: list[tuple[Split, int]] = [("train", train), ("val", val), ("test", test)]
    samples = [Sample(f"{split}/{n:04}.jpg", n % 2, split) for split, size in splits for n in range(size)]
    return Dataset(Path("/nowhere"), ("ant", "bee"), tuple(samples), ("An earlier warning.",))


def bad(*paths: str) -> list[BadImage]:
    splits: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
    return [BadImage(path, splits[path.split("/")[0]], "empty file") for path in paths]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_bad_images_are_found_in_the_order_of_the_dataset(tmp_path: Path, threads: int) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            images(tmp_path / split / name, [f"{n}.png" for n in range(9)])
    (tmp_path / "train/ant/3.png").write_bytes(b"")
    (tmp_path / "train/bee/0.png").write_text("<!DOCTYPE html>")
    (tmp_path / "val/ant/8.png").write_bytes((tmp_path / "val/ant/8.png").read_bytes()[:-20])
    dataset = discover(tmp_path, SplitConfig(0.2, 0))
    (tmp_path / "val/bee/1.png").unlink()  # removed between discovery and scan
    found = check_images(dataset, threads=threads)
    assert found.bad == (
        BadImage("train/ant/3.png", "train", "empty file"),
        BadImage("train/bee/0.png", "train", 'not an image (starts with "<!DOCTYPE")'),
        BadImage("val/ant/8.png", "val", "truncated: the end of the file is missing"),
        BadImage("val/bee/1.png", "val", "file not found"),
    )
    assert found.digests.keys() == {s.path for s in dataset.samples} - {image.path for image in found.bad}


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        images(tmp_path / name, ["0.png", "1.png"])
    (tmp_path / "bee/1.png").write_bytes(b"no image")
    dataset = discover(tmp_path, SplitConfig(0.5, 0))
    expected = {s.path: hashlib.sha256(dataset.file(s).read_bytes()).hexdigest() for s in dataset.samples}
    assert check_images(dataset, decode=False).digests == expected
    assert "bee/1.png" not in check_images(dataset).digests


def test_progress_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_CHUNK", 4)
    monkeypatch.setattr(scan, "probe_image", lambda path: None)
    counts: list[int] = []
    check_images(listed(9), on_progress=counts.append, threads=3)
    assert counts == list(range(1, 12))


def test_chunks_keep_order_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(path: Path) -> None:
        raise BadImageError("empty file")

    monkeypatch.setattr(scan, "_CHUNK", 4)
    monkeypatch.setattr(scan, "probe_image", probe)
    dataset = listed(10)
    assert [image.path for image in check_images(dataset, threads=4).bad] == [s.path for s in dataset.samples]


def test_an_interrupt_drops_the_queued_images(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Path] = []
    gate = threading.Event()

    def probe(path: Path) -> None:
        probed.append(path)
        if len(probed) > 1:
            gate.wait(timeout=0.2)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "probe_image", probe)
    before = set(threading.enumerate())  # those of earlier tests may end meanwhile
    with pytest.raises(KeyboardInterrupt):
        check_images(listed(1000), on_progress=interrupt, threads=2)
    assert len(probed) < 10
    own = set(threading.enumerate()) - before
    for thread in own:
        thread.join(timeout=20)  # nothing waits for images that are being decoded
    assert not any(thread.is_alive() for thread in own)


def test_errors_of_the_machine_are_not_blamed_on_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(scan, "probe_image", probe)
    with pytest.raises(MemoryError):
        check_images(listed(10), threads=2)


def test_without_bad_images_the_dataset_stays_the_same() -> None:
    dataset = listed(4)
    assert check_bad(dataset, []) is dataset


def test_a_few_training_images_are_left_out_with_a_warning() -> None:
    dataset = check_bad(listed(201), bad("train/0003.jpg", "train/0008.jpg"))
    assert dataset.counts("train") == [100, 99]
    assert dataset.counts("val") == [1, 1]
    assert dataset.warnings == (
        "An earlier warning.",
        "2 training images cannot be read and will not be trained on: "
        "train/0003.jpg (empty file), train/0008.jpg (empty file).",
    )


@pytest.mark.parametrize(("total", "allowed"), [(100, False), (101, True)])
def test_one_percent_is_too_many(total: int, allowed: bool) -> None:
    if allowed:
        assert len(check_bad(listed(total), bad("train/0000.jpg")).of("train")) == total - 1
        return
    with pytest.raises(DataError, match="1 of 100 training images cannot be read") as error:
        check_bad(listed(total), bad("train/0000.jpg"))
    assert error.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize("path", ["val/0001.jpg", "test/0000.jpg"])
def test_a_validation_or_test_image_is_never_left_out(path: str) -> None:
    with pytest.raises(DataError) as error:
        check_bad(listed(1000, val=500, test=500), bad("train/0000.jpg", path))
    assert f"{path} (empty file)" in error.value.found
    assert "1 validation or test image cannot be read" in error.value.found
    assert "Replace" in error.value.fix


def test_the_first_few_are_named_and_the_rest_counted() -> None:
    with pytest.raises(DataError) as error:
        check_bad(listed(10), bad(*(f"train/000{n}.jpg" for n in range(8))))
    assert error.value.found.count("(empty file)") == 5
    assert error.value.found.endswith("and 3 more")


def test_a_class_must_keep_a_training_image() -> None:
    samples = [Sample(f"train/{n:04}.jpg", 0, "train") for n in range(500)]
    samples.append(Sample("train/last.jpg", 1, "train"))
    dataset = Dataset(Path("/nowhere"), ("ant", "bee"), tuple(samples))
    with pytest.raises(DataError, match="class 'bee' has no training image") as error:
        check_bad(dataset, bad("train/0001.jpg", "train/last.jpg"))
    assert "train/last.jpg" in error.value.found and "train/0001.jpg" not in error.value.found
