"""Images whose numbers are not like those that a model was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune.data.channels.other_values import describe_other_values
from pretrained.preprocessing import Preprocessing


def save(path: Path, values: NDArray[Any]) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


def uniform(low: int, high: int, kind: Any = np.uint16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(low, high, (20, 20)).astype(kind)


def grey(mean: float, std: float, channels: int = 1) -> Preprocessing:
    return Preprocessing(channels=channels, kind="bands", mean=(mean,) * channels, std=(std,) * channels)


@pytest.mark.parametrize(
    ("values", "model", "said"),
    [
        (uniform(0, 256, np.uint8), grey(30_000, 9_000), "of 8 bits hold numbers from 0 to 255"),
        (uniform(0, 256, np.uint8), grey(110, 150), "mean 110 and the deviation 150"),  # most is 126
        (uniform(0, 256, np.uint8), grey(110, 100), None),
        (uniform(0, 65_536), grey(30_000, 9_000), None),
        (uniform(0, 65_536), grey(120, 60), "these images hold numbers from"),
        (uniform(0, 4_096), grey(2_000, 1_200), None),
        (uniform(0, 256, np.uint8), grey(30_000, 9_000, 3), "of 8 bits"),
    ],
)
def test_numbers_of_another_unit_are_said(
    tmp_path: Path, values: NDArray[Any], model: Preprocessing, said: str | None
) -> None:
    files = [save(tmp_path / "x.png", values), tmp_path / "none.png"]
    found = describe_other_values(model, files)
    assert found is None if said is None else found is not None and said in found
    assert describe_other_values(model, files[1:]) is None


def test_arrays_of_another_unit_are_said(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 20, 5)))
    assert "hold numbers from 0" in str(describe_other_values(grey(500, 30, 5), [file]))
    assert describe_other_values(grey(0.6, 0.3, 5), [file]) is None


@pytest.mark.parametrize(
    ("kind", "value_range", "is_said"),
    [
        (np.uint8, (0.0, 4095.0), True),
        (np.uint16, (0.0, 4095.0), False),
        (np.uint8, (0.0, 65535.0), False),  # a copy of 8 bits has the same levels
        (np.uint8, None, False),
    ],
)
def test_a_range_of_more_bits_is_said_of_photographs(
    tmp_path: Path, kind: Any, value_range: tuple[float, float] | None, is_said: bool
) -> None:
    file = save(tmp_path / "x.png", uniform(0, 256, kind))
    found = describe_other_values(Preprocessing(value_range=value_range), [file])
    assert (found is not None and "0 to 4095 become black to white" in found) == is_said


@pytest.mark.parametrize("values", [[0, 255], [0, 0, 0, 255], [10, 200, 255]])
def test_numbers_of_8_bits_never_seem_deeper(tmp_path: Path, values: list[int]) -> None:
    """Two values at the ends have the largest variance that numbers from 0 to 255 can have."""
    pixels = np.tile(np.array(values, np.uint8), (4, 1))
    model = grey(float(pixels.mean()), float(pixels.std()))
    assert describe_other_values(model, [save(tmp_path / "x.png", pixels)]) is None
