"""Built-in samples are real images, the same on every machine, and are read like any dataset."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from finetune.data.discover import discover
from finetune.data.inputs import find_inputs, find_labelled
from finetune.data.root import find_root
from finetune.data.samples import SAMPLES, is_sample, open_sample
from finetune.data.split import SplitConfig
from finetune.errors import DiskError, UsageError

CLASSES = tuple("0123456789")
DIGITS = Path("sample:digits")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune" / "samples"


def test_the_digits_are_those_of_scikit_learn(cache: Path) -> None:
    folder = open_sample("sample:digits")
    digits = load_digits()
    files = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    assert [int(path.parent.name) for path in files] == digits.target.tolist()
    for path, pixels in zip(files[::100], digits.images[::100], strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), np.round(pixels * 255 / 16).astype(np.uint8))
    assert np.asarray(Image.open(files[0])).max() > 200, "the ink is white"


def test_samples_are_written_once_and_atomically(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "0").mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(SAMPLES, "digits", fail)
        with pytest.raises(DiskError):
            open_sample("sample:digits")
    assert not [path for path in cache.iterdir() if path.is_dir()]
    folder = open_sample("sample:digits")
    monkeypatch.setitem(SAMPLES, "digits", lambda _: pytest.fail("written again"))
    assert open_sample("sample:digits") == folder


def test_a_sample_is_read_like_any_dataset(cache: Path) -> None:
    dataset = discover(DIGITS, SplitConfig(0.2, 0))
    assert dataset.classes == CLASSES
    assert len(dataset.samples) == 1797
    assert len(dataset.of("val")) == 359
    found = find_labelled(DIGITS, CLASSES)
    assert len(found.samples) == 1797
    assert dataset.root == found.root == find_root(DIGITS) == open_sample(DIGITS)
    assert len(list(find_inputs("sample:digits", None).open())) == 1797


def test_a_folder_of_the_same_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_sample("sample:digits")
    (tmp_path / "sample:digits").mkdir()
    assert not is_sample("sample:digits")
    assert not is_sample(Path("./sample:digits"))


def test_an_unknown_sample_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        open_sample("sample:digit")
    assert "did you mean" in caught.value.found.lower()
    assert "sample:digits" in caught.value.fix
    assert not is_sample(f".{os.sep}samples")
