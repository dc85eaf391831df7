"""Rows of images that other sets share are copied: the same bits, and only new images are computed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.features.extraction import open_features, open_images, open_source
from finetune.features.network import open_network
from finetune.recipe import load_recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.system.display import SilentDisplay
from tests.cli.test_processes import finetune as start
from tests.conftest import QUICK_RUN, draw_folder
from tests.sweeps import slow_except

COLOURS = ("red", "blue", "green")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And several batches, the last of them a smaller one."""
    use_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("finetune.features.store.compute_chunk_size", lambda *_: 6)


def use_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Thirty images of three classes, each with its own content."""
    root = draw_folder(tmp_path_factory.mktemp("all"), dict.fromkeys(COLOURS, 10))
    return sorted(root.rglob("*.jpg"))


def arrange(root: Path, train: list[Path], val: Sequence[Path] = ()) -> Path:
    """Copy images into a folder for each split and class."""
    shutil.rmtree(root, ignore_errors=True)
    for split, files in (("train", train), ("val", val)):
        for number, file in enumerate(files):
            target = root / split / file.parent.name / f"{number:02}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return root


def extract(tiny: Path, data: Path, runtime: str = "torch", **keys: object) -> tuple[dict[str, Tensor], int]:
    """Return the rows of two layers by image content, and the number of images that were computed."""
    settings = {"backbone.name": str(tiny), "data.path": str(data), "data.workers": 0, "runtime": runtime}
    recipe, display = load_recipe(None, settings | keys), SilentDisplay()
    network = open_network(recipe, display)
    source = open_source(recipe, network, open_images(recipe, display), display)
    chosen = network.layers.all[-2:]
    with open_features(source, chosen, "auto", with_logits=True) as features:
        samples = source.dataset.samples
        every = torch.arange(len(samples))
        rows = torch.cat([rows[every] for rows in features.rows], dim=1)
        assert features.logits is not None
        rows = torch.cat([rows, features.logits[every]], dim=1)
        found = {source.dataset.digests[sample.path]: row for sample, row in zip(samples, rows, strict=True)}
        return found, features.kept.num_computed


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the images of the first have the same bits in the second."""
    return all(row.equal(other[image]) for image, row in one.items())


@pytest.fixture(scope="module")
def fresh(
    tiny: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Tensor]]:
    """All rows, each computed."""
    home = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        use_cache(home / "cache", patch)
        patch.setattr("finetune.features.store.compute_chunk_size", lambda *_: 6)
        found, computed = extract(tiny, arrange(home / "data", images))
    assert computed == len(images) == len(found)
    yield found


@pytest.mark.parametrize("seed", slow_except([0, 1], range(34)))
def test_edits_compute_new_images_only(
    tiny: Path, images: list[Path], fresh: dict[str, Tensor], tmp_path: Path, seed: int
) -> None:
    """Three edits each: images and classes come and go, in another order and in other splits."""
    chance, known = random.Random(seed), set[Path]()
    for _ in range(3):
        classes = chance.sample(COLOURS, chance.choice([2, 3]))
        some = [image for image in images if image.parent.name in classes and chance.random() < 0.6]
        some += [image for image in images if image.parent.name in classes][:1]
        some = [*dict.fromkeys(chance.sample(some, len(some)))]
        train, val = some[len(some) // 4 :], some[: len(some) // 4]
        found, computed = extract(tiny, arrange(tmp_path / "data", train, val))
        assert computed == len(set(some) - known)
        assert len(found) == len(some) and same(found, fresh)
        known |= set(some)


def test_runtimes_do_not_share_rows(tiny: Path, images: list[Path], tmp_path: Path) -> None:
    """Those of ONNX Runtime have the same bits wherever the image is in its batch, too."""
    pytest.importorskip("onnxruntime")
    extract(tiny, arrange(tmp_path / "one", images[:20]))
    whole, computed = extract(tiny, arrange(tmp_path / "two", images[5:]), "onnxruntime")
    assert computed == 25
    found, computed = extract(tiny, arrange(tmp_path / "three", images[::-1]), "onnxruntime")
    assert computed == 5 and same(whole, found)


def test_other_sizes_do_not_share_rows(tiny: Path, images: list[Path], tmp_path: Path) -> None:
    extract(tiny, arrange(tmp_path / "data", images[:20]))
    _, computed = extract(tiny, tmp_path / "data", **{"input.img_size": 48})
    assert computed == 20


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "journal"])
def test_rows_of_damaged_files_are_computed(
    tiny: Path, images: list[Path], fresh: dict[str, Tensor], tmp_path: Path, damage: str
) -> None:
    extract(tiny, arrange(tmp_path / "data", images[:20]))
    for file in FeatureCacheDir().folder.rglob("*.bin"):
        content = bytearray(file.read_bytes())
        if damage == "changed":
            content[7] ^= 1  # in the first block
            file.write_bytes(content)
        elif damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "removed":
            file.unlink()
        else:
            journal = file.with_suffix(".journal")
            journal.write_bytes(journal.read_bytes()[:-9])
    found, computed = extract(tiny, arrange(tmp_path / "data", images))
    assert same(found, fresh)
    assert 10 < computed <= 30 and (damage == "journal" or computed > 15)


def test_images_that_cannot_be_read_have_no_rows(
    tiny: Path, images: list[Path], fresh: dict[str, Tensor], tmp_path: Path
) -> None:
    """Their whole block is computed again, since they may be readable now."""
    data = arrange(tmp_path / "data", images[:20])
    broken = sorted(data.rglob("*.jpg"))[3]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 3])
    extract(tiny, data)
    broken.write_bytes(content)
    found, _ = extract(tiny, arrange(data, images))
    assert same(found, fresh)


@pytest.mark.slow
def test_two_processes_share_what_is_new(tiny: Path, images: list[Path], tmp_path: Path) -> None:
    words = ("-b", tiny, "-s", "freeze", "--set", "strategy.features=all", *QUICK_RUN)
    one, two = (str(tmp_path / name) for name in ("cache-one", "cache-two"))
    data = arrange(tmp_path / "data", images[:8] + images[10:18], images[8:10])
    start("run", *words, "-d", data, "-o", tmp_path / "first", XDG_CACHE_HOME=one)
    data = arrange(tmp_path / "data", images[3:8] + images[10:19] + images[20:28], images[8:10] + images[28:])
    done = start("run", *words, "-d", data, "-o", tmp_path / "grown", "--processes", 2, XDG_CACHE_HOME=one)
    assert done.returncode == 0 and "13 of 22 images are kept" in done.stdout + done.stderr
    done = start("run", *words, "-d", data, "-o", tmp_path / "again", XDG_CACHE_HOME=two)
    assert done.returncode == 0 and "are kept" not in done.stdout + done.stderr
    grown, again = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("grown", "again"))
    assert grown == again
