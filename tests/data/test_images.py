"""Cached images do not change a bit of a batch, and only valid ones are cached."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import image_cache as images_module
from finetune.data import transforms as transforms_module
from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.image_cache import PER_BLOCK, ImageCache, keep_images
from finetune.data.loader import ImageLoader, Placement
from finetune.data.scan import check_images
from finetune.data.split import SplitConfig
from finetune.data.transforms import Transform, build_train_transform
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.system.display import SilentDisplay
from pretrained.preprocessing import Preprocessing
from tests.data.test_loader import assert_same


class Listener(SilentDisplay):
    """A display that records its messages."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.said.append(text)


def view_of(augmentation: str, img_size: int = 16) -> Transform:
    return build_train_transform(Preprocessing(img_size=img_size), augmentation)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    """76 training images of many sizes, which fill three blocks; some are larger than twice 16 pixels."""
    random = np.random.default_rng(0)
    for number in range(94):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        width, height = random.integers(10, 90, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.{'jpg' if number % 3 else 'png'}")
    return discover(tmp_path / "photos", SplitConfig(0.2, 0))


Keep = Callable[..., ImageCache | None]


@pytest.fixture
def cache_dir(tmp_path: Path) -> FeatureCacheDir:
    return FeatureCacheDir(1e9, tmp_path / "kept")


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def keep(photos: Dataset, cache_dir: FeatureCacheDir, listener: Listener) -> Iterator[Keep]:
    made = []

    def keep_some(
        view: Transform | None = None,
        dataset: Dataset = photos,
        cache_dir: FeatureCacheDir = cache_dir,
        passes: int = 9,
        digests: dict[str, str] | None = None,
    ) -> ImageCache | None:
        digests = check_images(dataset).digests if digests is None else digests
        samples = dataset.of("train")
        kept = keep_images(dataset, samples, digests, view or view_of("light"), cache_dir, listener, passes)
        made.append(kept)
        return kept

    yield keep_some
    for kept in made:
        if kept is not None:
            kept.close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded in this process."""
    names: list[str] = []
    decode = transforms_module.decode_image

    def recorded(path: Path, *settings: Any) -> Image.Image:
        names.append(path.name)
        return decode(path, *settings)

    monkeypatch.setattr(transforms_module, "decode_image", recorded)
    return names


def build(
    dataset: Dataset,
    view: Transform,
    images: ImageCache | None = None,
    workers: int = 0,
    shuffle: bool = True,
) -> ImageLoader:
    return ImageLoader(
        dataset,
        dataset.of("train"),
        view,
        batch_size=10,
        placement=Placement(torch.device("cpu"), channels_last=False),
        workers=workers,
        seed=0,
        shuffle=shuffle,
        images=images,
    )


# --- Bitwise the same batches ---


@pytest.mark.sample(3)
@pytest.mark.parametrize("augmentation", ["none", "light", "heavy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_do_not_change_a_batch(
    photos: Dataset, keep: Keep, opened: list[str], augmentation: str, workers: int
) -> None:
    view = view_of(augmentation)
    kept = keep(view)
    assert len(opened) == len(photos.of("train")) == 76
    opened.clear()
    loader = build(photos, view, kept, workers)
    batches = list(loader.batches(epoch=3))
    assert opened == []
    assert_same(batches, list(build(photos, view).batches(epoch=3)))
    assert len(opened) == 76
    loader.close()


def test_cached_views_need_no_decoding_processes(photos: Dataset, keep: Keep) -> None:
    view = view_of("none")
    assert build(photos, view, keep(view), workers=2, shuffle=False).workers == 0
    assert build(photos, view_of("light"), keep(view_of("light")), workers=2, shuffle=False).workers == 2


def test_the_next_run_decodes_nothing(keep: Keep, opened: list[str]) -> None:
    first = keep()
    assert first is not None
    first.close()
    opened.clear()
    again = keep(passes=1)
    assert again is not None and opened == []


def test_only_large_images_are_reduced(photos: Dataset, keep: Keep) -> None:
    kept = keep()
    assert kept is not None
    for index, sample in enumerate(photos.of("train")):
        pixels, whole = kept[index], np.asarray(Image.open(photos.file(sample)))
        assert pixels is not None
        assert min(pixels.shape[:2]) >= min(27, *whole.shape[:2])
        assert np.array_equal(pixels, whole) == (min(whole.shape[:2]) < 2 * 27)


def test_a_process_that_is_not_forked_opens_the_file_again(keep: Keep) -> None:
    kept = keep()
    message = pickle.dumps(kept)
    assert kept is not None and len(message) < 5000
    there = pickle.loads(message)
    assert len(there) == len(kept)
    assert all(np.array_equal(there[index], kept[index]) for index in range(len(kept)))


def test_an_image_at_the_end_of_a_file_larger_than_memory(tmp_path: Path) -> None:
    number = 1 + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 4000**2)
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(3 * 4000**2 * number)  # takes no room on the disk
    pixels = ImageCache(tmp_path / "x.bin", np.array([[4000, 4000, 3]] * number))[number - 1]
    assert pixels is not None and pixels[-1, -1, -1] == 0
    assert not pixels.flags.writeable


def test_an_image_that_was_cut_off_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(30))
    kept = ImageCache(tmp_path / "x.bin", np.array([[2, 3, 3], [2, 2, 3]]))
    os.truncate(tmp_path / "x.bin", 25)
    assert kept[0] is not None and kept[1] is None


# --- Another cache file for other content ---


def test_the_cache_file_depends_on_images_order_view_and_versions(
    photos: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, digests = photos.of("train"), check_images(photos).digests
    view, fixed = view_of("light"), view_of("none")

    def place(view: Transform = view, order: int = 1, **changed: str) -> Path:
        return FeatureCacheDir().path_for(images_module._describe(samples[::order], digests | changed, view))

    border = replace(fixed, preprocessing=replace(fixed.preprocessing, resize="pad"))
    places = [
        place(),
        place(order=-1),
        place(**{samples[5].path: "other"}),
        place(view_of("heavy")),
        place(view_of("light", 24)),
        place(fixed),
        place(border),
        place(view_of("none", 24)),
    ]
    monkeypatch.setattr("finetune.data.image_cache.metadata.version", lambda name: "99")
    places.append(place())
    assert len(set(places)) == len(places)
    assert place(view_of("medium")) == place(view)  # drawn from the same images
    assert place(**{photos.of("val")[0].path: "other"}) == place()


def test_an_image_that_changed_is_decoded_again(photos: Dataset, keep: Keep, opened: list[str]) -> None:
    before = keep()
    Image.new("RGB", (20, 20), "red").save(photos.file(photos.of("train")[40]))
    opened.clear()
    after = keep()
    assert before is not None and after is not None and len(opened) == 76
    assert not np.array_equal(before[40], after[40])  # type: ignore[arg-type]


# --- Errors ---


def test_a_changed_byte_is_detected_and_everything_decoded_again(
    photos: Dataset, cache_dir: FeatureCacheDir, keep: Keep, opened: list[str], listener: Listener
) -> None:
    first = keep()
    assert first is not None
    first.close()
    (path,) = cache_dir.folder.glob("*.bin")
    with path.open("r+b") as file:
        file.seek(50_000)
        byte = file.read(1)
        file.seek(50_000)
        file.write(bytes([byte[0] ^ 1]))
    opened.clear()
    kept = keep()
    assert kept is not None and len(opened) == 76
    assert "damaged" in listener.said[0]
    assert_same(
        list(build(photos, view_of("light"), kept).batches()), list(build(photos, view_of("light")).batches())
    )


NOTES: list[Any] = [
    None, 5, {}, [], [None] * 31, [None] * 33, [[1, 2]] * 32, [5] * 32, [[-1, -1, 3]] * 32,
    [[10**30, 1, 3]] * 32, [[True, 1, 3]] * 32, [["9", 9, 3]] * 32, [[9, 9, 4]] * 32, [[9, 9, 3]] * 32,
]  # fmt: skip
"""What a journal may say of the shapes of a block's images that is none, or not those of its bytes."""


@pytest.mark.sample(2)
@pytest.mark.parametrize("note", NOTES)
def test_damaged_shapes_are_detected_and_everything_decoded_again(
    cache_dir: FeatureCacheDir, keep: Keep, opened: list[str], listener: Listener, note: Any
) -> None:
    first = keep()
    assert first is not None
    first.close()
    (path,) = cache_dir.folder.glob("*.journal")
    facts, block, *rest = path.read_text().splitlines()
    path.write_text("\n".join([facts, json.dumps(json.loads(block) | {"note": note}), *rest]) + "\n")
    opened.clear()
    kept = keep()
    assert kept is not None and len(opened) == 76
    assert "damaged" in listener.said[0]


def test_an_interrupted_fill_is_resumed(
    keep: Keep, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = images_module._submit_blocks

    def interrupted(*arguments: object) -> Iterator[object]:
        yield from list(blocks(*arguments))[:1]  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(images_module, "_submit_blocks", interrupted)
        keep()
    opened.clear()
    assert keep() is not None
    assert len(opened) == 76 - PER_BLOCK


@pytest.mark.parametrize("how", ["vanished", "changed"])
def test_an_image_that_changed_after_the_check_is_not_cached(
    photos: Dataset, keep: Keep, listener: Listener, how: str
) -> None:
    digests = check_images(photos).digests
    victim = photos.file(photos.of("train")[70])
    victim.unlink() if how == "vanished" else Image.new("RGB", (20, 20)).save(victim)
    assert keep(digests=digests) is None
    (line,) = listener.said
    assert line.startswith("train images are decoded in every pass: ") and victim.name in line
    assert ("file not found" if how == "vanished" else "has changed") in line


def test_an_image_that_an_earlier_attempt_lost_keeps_its_index(photos: Dataset, keep: Keep) -> None:
    """The loader reports it, as it does without cached images."""
    lost = photos.of("train")[40]
    photos.file(lost).unlink()
    kept, view = keep(), view_of("light")
    assert kept is not None and kept[40] is None and kept[41] is not None
    batches = list(build(photos, view, kept).batches())
    assert [batch.lost for batch in batches if batch.lost] == [{lost.path: "file not found"}]
    assert_same(batches, list(build(photos, view).batches()))


def test_images_are_cached_only_where_that_pays(
    keep: Keep, cache_dir: FeatureCacheDir, opened: list[str]
) -> None:
    assert keep(passes=1) is None
    assert opened == [] and not cache_dir.folder.exists()


def test_images_are_cached_only_where_they_fit(
    keep: Keep, cache_dir: FeatureCacheDir, listener: Listener
) -> None:
    assert keep(cache_dir=FeatureCacheDir(100_000, cache_dir.folder)) is None
    (line,) = listener.said
    assert "0.00039 GB" in line and "cache.max_gb" in line


def test_the_size_is_estimated_before_decoding(
    photos: Dataset, keep: Keep, cache_dir: FeatureCacheDir
) -> None:
    for view, error in ((view_of("light"), 0.1), (view_of("none"), 0.0)):
        estimate = images_module._estimate_bytes(photos, photos.of("train"), view)
        keep(view)
        size = max(cache_dir.list(), key=lambda kept: kept.used).num_bytes
        assert size <= estimate <= (1 + error) * size


def test_a_full_disk_leaves_nothing_behind(
    keep: Keep, cache_dir: FeatureCacheDir, listener: Listener
) -> None:
    with mock.patch(
        "finetune.runs.block_file.BlockFile.append", side_effect=OSError(28, "No space left on device")
    ):
        assert keep() is None
    (line,) = listener.said
    assert "No space left on device" in line
    assert list(cache_dir.folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_reported(keep: Keep, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert keep(cache_dir=FeatureCacheDir(1e9, tmp_path / "closed" / "kept")) is None
    assert "Permission denied" in listener.said[0]
