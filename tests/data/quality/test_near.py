"""Near copies are found, and different images are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from finetune.data.dataset import Dataset, Sample
from finetune.data.decode import decode_image
from finetune.data.quality import near
from finetune.data.quality.near import NearCopies, find_near, find_near_issues
from finetune.data.quality.subject import ScannedDataset
from finetune.data.scan import check_images
from tests.data.quality.spoilt import build_clean, photo


def see(root: Path) -> ScannedDataset:
    """All images below a folder; those named ``copy...`` are the validation split."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    samples = [Sample(str(path), 0, "val" if path.name.startswith("copy") else "train") for path in paths]
    dataset = Dataset(root, ("a", "b"), tuple(sorted(samples, key=lambda one: (one.split, one.path))))
    return ScannedDataset(dataset, check_images(dataset))


def names(scanned: ScannedDataset, found: NearCopies) -> set[tuple[str, str]]:
    return {
        (Path(scanned.samples[pair.first].path).name, Path(scanned.samples[pair.second].path).name)
        for pair in found.pairs
    }


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "double": lambda image: image.resize((image.width * 2, image.height * 2)),
    "grey": lambda image: image.convert("L"),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "same": lambda image: image,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(tmp_path: Path, change: str) -> None:
    build_clean(tmp_path, {"a": 12})
    for seed in range(4):
        CHANGES[change](photo(seed)).save(tmp_path / f"copy{seed}.jpg", quality=55)
    scanned = see(tmp_path)
    assert names(scanned, find_near(scanned)) == {(f"{seed:03}.jpg", f"copy{seed}.jpg") for seed in range(4)}


def test_a_rotated_file_that_is_shown_upright_is_the_same_image(tmp_path: Path) -> None:
    build_clean(tmp_path, {"a": 6})
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees for showing
    photo(2).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "copy.jpg", exif=exif, quality=90)
    scanned = see(tmp_path)
    assert names(scanned, find_near(scanned)) == {("002.jpg", "copy.jpg")}


def test_exact_copies_are_not_near_copies(tmp_path: Path) -> None:
    build_clean(tmp_path, {"a": 3})
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "a/000.jpg").read_bytes())
    assert find_near(see(tmp_path)).pairs == ()


@pytest.mark.slow
def test_different_digits_are_not_near_copies(tmp_path: Path) -> None:
    """The perceptual hash alone finds a thousand pairs among 1,797 digits."""
    from sklearn.datasets import load_digits

    for number, pixels in enumerate(load_digits().images):
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(tmp_path / f"{number:04}.png")
    assert find_near(see(tmp_path)).pairs == ()


def test_plain_and_dark_images_are_not_near_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        dark = rng.normal(4, 1.5, (60, 60, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(dark).save(tmp_path / f"dark{number}.png")
        Image.new("RGB", (60, 60), tuple(rng.integers(0, 256, 3).tolist())).save(tmp_path / f"p{number}.png")
    assert find_near(see(tmp_path)).pairs == ()


@pytest.mark.slow
def test_resized_photographs_are_found_and_different_ones_are_not(hymenoptera: Path, tmp_path: Path) -> None:
    assert find_near(see(hymenoptera)).pairs == ()
    files = sorted((hymenoptera / "val" / "bees").glob("*.jpg"))[:30]
    for number, file in enumerate(files):
        (tmp_path / f"{number:02}.jpg").write_bytes(file.read_bytes())
        image = decode_image(file)
        image.resize((image.width // 2, image.height // 2)).save(tmp_path / f"copy{number:02}.jpg")
    scanned = see(tmp_path)
    assert len(names(scanned, find_near(scanned))) == 30


@pytest.mark.parametrize(("most", "scope"), [(100, "across"), (1, "none")])
def test_many_images_are_compared_across_splits_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, scope: str
) -> None:
    build_clean(tmp_path, {"a": 20})
    photo(3).resize((50, 40)).save(tmp_path / "copy.jpg")
    photo(4).resize((50, 40)).save(tmp_path / "another.jpg")
    monkeypatch.setattr(near, "MOST_COMPARISONS", most)
    scanned = see(tmp_path)
    found = find_near(scanned)
    assert found.scope == scope
    assert names(scanned, found) == ({("003.jpg", "copy.jpg")} if scope == "across" else set())


def test_blocks_leave_no_pair_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_clean(tmp_path, {"a": 15})
    for seed in range(15):
        photo(seed).resize((50, 40)).save(tmp_path / "a" / f"z{seed:02}.jpg", quality=85)
    scanned = see(tmp_path)
    whole = find_near(scanned)
    monkeypatch.setattr(near, "_BLOCK", 60)
    monkeypatch.setattr(near, "_STEP", 2)
    assert len(whole.pairs) == 15 and find_near(scanned) == whole


def test_many_near_copies_in_one_split_do_not_hide_a_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for frame in range(12):  # of one scene
        photo(1).resize((60 + 2 * frame, 50 + 2 * frame)).save(tmp_path / f"{frame:02}.jpg", quality=90)
    photo(2).save(tmp_path / "zz.jpg")
    photo(2).resize((50, 40)).save(tmp_path / "copy.jpg")
    scanned = see(tmp_path)
    assert "near-scope" not in {issue.code for issue in find_near_issues(scanned, find_near(scanned))}
    monkeypatch.setattr(near, "MOST_PAIRS", 5)
    found = find_near(scanned)
    assert len(found.pairs) == 6 and found.is_cut
    assert ("copy.jpg", "zz.jpg") in {tuple(sorted(pair)) for pair in names(scanned, found)}
    assert {"near-leak", "near-duplicate", "near-scope"} == {
        one.code for one in find_near_issues(scanned, found)
    }


def test_many_pairs_are_one_issue(tmp_path: Path) -> None:
    build_clean(tmp_path, {"a": 300})
    scanned = see(tmp_path)
    pairs = tuple(near.NearCopy(one, other, 1.0) for one in range(300) for other in range(one))
    assert [one.count for one in find_near_issues(scanned, NearCopies(pairs, "all"))] == [44850]
