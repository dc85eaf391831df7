"""A run on images of 12 bits in 16-bit files: from the measured range to prediction and export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.errors import DataError
from tests.conftest import Cli


def draw(path: Path, brightness: int, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 20, (24, 24))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(brightness + noise, 0, 4095).astype(np.uint16)).save(path)


@pytest.mark.slow
def test_the_range_of_the_training_images_is_kept_and_used(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """The classes differ in brightness only, which a range for each image would take away."""
    data, output = tmp_path / "data", tmp_path / "run"
    for split, number in (("train", 12), ("val", 4)):
        for index in range(number):
            draw(data / split / "dim" / f"{index}.png", 300, 100 * number + index)
            draw(data / split / "bright" / f"{index}.png", 900, 1000 * number + index)
    draw(data / "val" / "bright" / "odd.png", 2000, 5)  # validation images do not count
    words = ("run", "-b", tiny, "-d", data, "-o", output, "-s", "freeze", "--epochs", 2, "--workers", 0)
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert "of one colour" not in result.output
    low, high = json.loads((output / "model" / "config.json").read_text())["finetune"]["value_range"]
    assert 200 < low < 300 and 900 < high < 1000
    assert "Images of more than 8 bits" in (output / "model" / "README.md").read_text()
    model = finetune.load(output)
    assert model.card.preprocessing.value_range == (low, high)
    levels = np.asarray(model.open(data / "val" / "dim" / "0.png"))
    assert levels.max() < 100 and len(np.unique(levels)) > 20  # with the file's own range: 1 level
    whole = [model.predict(data / "val" / name / "0.png") for name in ("dim", "bright")]
    assert [prediction.label for prediction in whole] == ["dim", "bright"]
    write = data / "val" / "bright" / "float.tif"
    Image.fromarray(np.full((24, 24), 900, np.float32)).save(write)
    assert model.predict(write).label == "bright"
    with pytest.raises(DataError, match="knows no range"):
        finetune.load(tiny).predict(write)
