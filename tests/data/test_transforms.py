from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image

from finetune.data.transforms import build_eval_transform, build_train_transform
from finetune.runtime import seed_everything
from pretrained.catalog import Preprocessing, find_card


def photograph(width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "name", ["squeezenet1_0", "efficientnet_b1", "vit_b_16", "convnext_tiny", "inception_v3"]
)
def test_the_evaluation_view_is_torchvisions_own(name: str) -> None:
    reference = tv.get_model_weights(name).DEFAULT.transforms()
    ours = build_eval_transform(find_card(f"torchvision/{name}").preprocessing)
    for size in ((400, 300), (301, 500), (230, 231)):
        picture = photograph(*size)
        torch.testing.assert_close(ours(picture), reference(picture))


@pytest.mark.parametrize("augmentation", ["light", "medium", "heavy"])
def test_training_views_repeat_with_the_seed_and_differ_without(augmentation: str) -> None:
    view = build_train_transform(Preprocessing(img_size=32), augmentation)  # type: ignore[arg-type]
    picture = photograph()

    def draw(seed: int) -> torch.Tensor:
        seed_everything(seed)
        return view(picture)

    views = [draw(seed) for seed in range(8)]
    assert all(one.equal(draw(seed)) for seed, one in enumerate(views))
    assert len({one.numpy().tobytes() for one in views}) >= 7
    assert all(one.shape == (3, 32, 32) and one.dtype == torch.float32 for one in views)


def test_none_is_the_evaluation_view() -> None:
    picture = photograph()
    plain = build_eval_transform(Preprocessing(img_size=32))(picture)
    assert build_train_transform(Preprocessing(img_size=32), "none")(picture).equal(plain)


def test_normalisation_is_the_preprocessings() -> None:
    grey = Image.new("RGB", (50, 50), (128, 128, 128))
    view = build_eval_transform(Preprocessing(img_size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    value = 128 / 255
    expected = [(value - 0.5) / 0.5, (value - 0.25) / 0.25, value]
    assert view(grey).mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("augmentation", ["light", "medium", "heavy"])
def test_five_hundred_views_are_finite_plain_tensors(augmentation: str) -> None:
    """A rare strength of one operation must not stop a run after an hour."""
    view = build_train_transform(Preprocessing(img_size=16), augmentation)  # type: ignore[arg-type]
    picture = photograph(24, 20)
    for seed in range(500):
        torch.manual_seed(seed)
        tensor = view(picture)
        assert type(tensor) is torch.Tensor
        assert tensor.isfinite().all()
