from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image, ImageDraw
from timm.data import create_transform
from torchvision.transforms import InterpolationMode, v2

from finetune.data import transforms as transforms_module
from finetune.data.transforms import Normalizer, Transform, build_eval_transform, build_train_transform
from finetune.recipe import Augmentation
from finetune.system.device import seed_everything
from pretrained.catalog import find_card
from pretrained.preprocessing import ImgSize, Preprocessing, Resize

CPU = torch.device("cpu")


def photograph(width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seen(view: Transform, image: Image.Image) -> torch.Tensor:
    """The input of a network for an image: (3, H, W) float32."""
    pixels = view(image)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return Normalizer(view.preprocessing, CPU)(pixels[None])[0]


@pytest.mark.parametrize(
    "name", ["squeezenet1_0", "efficientnet_b1", "vit_b_16", "convnext_tiny", "inception_v3"]
)
def test_the_evaluation_view_is_that_of_torchvision(name: str) -> None:
    reference = tv.get_model_weights(name).DEFAULT.transforms()
    ours = build_eval_transform(find_card(f"torchvision/{name}").preprocessing)
    for size in ((400, 300), (301, 500), (230, 231)):
        image = photograph(*size)
        torch.testing.assert_close(seen(ours, image), reference(image))


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("img_size", [48, (32, 64)])
def test_the_evaluation_view_is_bitwise_that_of_timm(
    resize: Resize, interpolation: str, img_size: ImgSize
) -> None:
    """uint8 views that are normalised later, batch by batch, equal timm's float32 views."""
    own = Preprocessing(img_size=img_size, resize=resize, interpolation=interpolation)
    inception = replace(own, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    clip = replace(own, mean=(0.4815, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2758))
    images = [photograph(100, 75), photograph(40, 90), Image.new("RGB", (50, 50), (255, 0, 1))]
    for preprocessing in (own, inception, clip):
        plain = create_transform(**preprocessing.to_timm(), is_training=False)
        ours = build_eval_transform(preprocessing)
        batch = torch.stack([ours(image) for image in images])
        expected = torch.stack([plain(image) for image in images])
        assert Normalizer(preprocessing, CPU)(batch).equal(expected)


EVERY_BYTE = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_a_gpu_normalises_to_the_same_bits() -> None:
    here, there = Normalizer(Preprocessing(), CPU), Normalizer(Preprocessing(), torch.device("cuda"))
    assert there(EVERY_BYTE.cuda()).cpu().equal(here(EVERY_BYTE))


def test_normalising_is_within_a_few_bits_of_torchvisions_newer_transforms() -> None:
    """They multiply by 1/255, so the last bits differ."""
    plain = Preprocessing()
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(plain.mean, plain.std)])
    ours = Normalizer(plain, CPU)(EVERY_BYTE)
    torch.testing.assert_close(ours, reference(EVERY_BYTE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("augmentation", ["shift", "light", "medium", "heavy"])
def test_training_views_repeat_with_the_seed_and_differ_without(augmentation: str) -> None:
    view = build_train_transform(Preprocessing(img_size=32), augmentation)  # type: ignore[arg-type]
    image = photograph()

    def draw(seed: int) -> torch.Tensor:
        seed_everything(seed)
        return seen(view, image)

    views = [draw(seed) for seed in range(8)]
    assert all(one.equal(draw(seed)) for seed, one in enumerate(views))
    assert len({one.numpy().tobytes() for one in views}) >= 7
    assert all(one.shape == (3, 32, 32) and one.dtype == torch.float32 for one in views)


@pytest.mark.parametrize("augmentation", ["light", "shift"])
@pytest.mark.parametrize("img_size", [64, (48, 96)])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_objects_have_about_the_same_shape_in_training_and_evaluation(
    resize: Resize, img_size: ImgSize, augmentation: Augmentation
) -> None:
    """A disc in a wide image is as much squashed in training, but for the jitter of the aspect ratio."""
    image = Image.new("RGB", (180, 120))
    ImageDraw.Draw(image).ellipse((60, 30, 120, 90), fill=(255, 255, 255))
    own = Preprocessing(img_size=img_size, resize=resize, crop_pct=1.0, mean=(0.0, 0.0, 0.0))
    expected = _disc_aspect(build_eval_transform(own)(image))
    torch.manual_seed(0)
    drawn = [_disc_aspect(build_train_transform(own, augmentation)(image)) for _ in range(40)]
    whole = [aspect for aspect in drawn if aspect]
    assert len(whole) >= 10
    jitter = 1.0 if augmentation == "shift" else 4 / 3
    assert min(whole) >= expected / jitter * 0.85 and max(whole) <= expected * jitter * 1.15
    assert augmentation == "shift" or max(whole) > 1.1 * min(whole)


def _disc_aspect(view: torch.Tensor) -> float:
    """Return width / height of the white disc; 0 if the view's edge cuts it."""
    white = view[0] > 127
    rows, columns = white.any(dim=1), white.any(dim=0)
    cut = rows[0] or rows[-1] or columns[0] or columns[-1]
    return 0.0 if cut else int(columns.sum()) / int(rows.sum())


@pytest.mark.parametrize("size", [(300, 100), (90, 200), (64, 64), (1000, 20)])
@pytest.mark.parametrize("img_size", [64, (32, 96)])
def test_a_padded_crop_is_that_of_the_padded_image(size: tuple[int, int], img_size: ImgSize) -> None:
    """The reference pads the whole image first, and crops with the same draw."""
    own = Preprocessing(img_size=img_size, resize="pad", mean=(0.0, 0.0, 0.0), interpolation="bilinear")
    image = photograph(*size)
    [crop] = transforms_module._build_random_crop(own, 0.5)
    height, width = own.size
    wide, high = max(size[0], round(size[1] * width / height)), max(size[1], round(size[0] * height / width))
    padded = Image.new("RGB", (wide, high))
    padded.paste(image, ((wide - size[0]) // 2, (high - size[1]) // 2))
    ratio = (width / height * 3 / 4, width / height * 4 / 3)
    whole = v2.RandomResizedCrop(own.size, (0.5, 1.0), ratio, InterpolationMode.BILINEAR, antialias=True)
    for seed in range(10):
        torch.manual_seed(seed)
        found = np.asarray(crop(image), dtype=float)
        torch.manual_seed(seed)
        expected = np.asarray(whole(padded), dtype=float)
        assert found.shape == expected.shape == (height, width, 3)
        assert np.abs(found - expected).mean() < 8, seed  # but for the edges, and the phase of resampling


def test_a_thin_image_is_padded_without_the_memory_of_a_square() -> None:
    view = build_train_transform(Preprocessing(img_size=64, resize="pad"), "light")
    thin = Image.new("RGB", (60_000, 130))  # padded: 3.6 thousand million pixels
    assert view(thin).shape == (3, 64, 64)


def test_padded_images_show_both_ends_in_training() -> None:
    """A crop of the image, as without padding, would show a third of it at most."""
    image = Image.new("RGB", (300, 100), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 50, 100))
    image.paste((0, 0, 255), (250, 0, 300, 100))

    def sees_both(resize: Resize) -> bool:
        torch.manual_seed(1)
        view = build_train_transform(Preprocessing(img_size=64, resize=resize), "light")
        views = [view(image) for _ in range(20)]
        return any(bool((one[0] > 200).any() and (one[2] > 200).any()) for one in views)

    assert sees_both("pad") and sees_both("squash") and not sees_both("crop")


def test_none_is_the_evaluation_view() -> None:
    image = photograph()
    plain = build_eval_transform(Preprocessing(img_size=32))(image)
    assert build_train_transform(Preprocessing(img_size=32), "none")(image).equal(plain)


def test_shift_pads_with_the_mean_and_crops_anywhere() -> None:
    """Every view of an image of 32 pixels is one of 2 x 81 crops of the padded image, all about as often."""
    mean = (0.5, 0.25, 1.0)
    view = build_train_transform(Preprocessing(img_size=32, crop_pct=1.0, mean=mean), "shift")
    image = photograph(32, 32)
    padded = np.empty((40, 40, 3), dtype=np.uint8)
    padded[:] = [round(255 * channel) for channel in mean]
    padded[4:36, 4:36] = np.asarray(image)
    number_of = {}
    for top, left in np.ndindex(9, 9):
        crop = padded[top : top + 32, left : left + 32]
        for flipped in (False, True):
            number_of[(crop[:, ::-1] if flipped else crop).tobytes()] = (top, left, flipped)
    torch.manual_seed(0)
    drawn = [number_of[view(image).permute(1, 2, 0).numpy().tobytes()] for _ in range(1500)]
    assert len(set(drawn)) == 162
    assert sum(flipped for *_, flipped in drawn) == pytest.approx(750, abs=80)


def test_normalisation_uses_the_preprocessing() -> None:
    grey = Image.new("RGB", (50, 50), (128, 128, 128))
    view = build_eval_transform(Preprocessing(img_size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    value = 128 / 255
    expected = [(value - 0.5) / 0.5, (value - 0.25) / 0.25, value]
    assert seen(view, grey).mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("augmentation", ["shift", "light", "medium", "heavy"])
def test_five_hundred_views_are_valid_uint8_images(augmentation: str) -> None:
    """A rare strength of an operation must not raise an error late in a run."""
    view = build_train_transform(Preprocessing(img_size=16), augmentation)  # type: ignore[arg-type]
    image = photograph(24, 20)
    for seed in range(500):
        torch.manual_seed(seed)
        tensor = view(image)
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == torch.uint8 and tensor.shape == (3, 16, 16)


def test_a_quarter_of_heavy_views_has_a_rectangle_of_noise() -> None:
    """Noise over all of 0..255, as in arXiv:1708.04896: torchvision's floats around zero would clip."""
    view = build_train_transform(Preprocessing(img_size=32), "heavy")
    erase = view.draw.transforms[-1]  # type: ignore[attr-defined]
    torch.manual_seed(0)
    images = [erase(torch.full((3, 32, 32), 128, dtype=torch.uint8)) for _ in range(800)]
    erased = [image for image in images if (image != 128).any()]
    assert 160 <= len(erased) <= 240
    assert all(0.01 < (image != 128).double().mean() < 0.35 for image in erased)
    noise = torch.cat([image[image != 128] for image in erased]).double()
    assert len(noise.unique()) == 255
    assert noise.mean().item() == pytest.approx(127.5, abs=1)
    assert noise.std().item() == pytest.approx(256 / math.sqrt(12), abs=1)


# --- The image that views are made from ---


@pytest.mark.parametrize(("augmentation", "smallest"), [("light", 0.5), ("medium", 0.5), ("heavy", 0.2)])
def test_no_random_crop_of_a_reduced_image_is_enlarged(augmentation: str, smallest: float) -> None:
    view = build_train_transform(Preprocessing(img_size=50), augmentation)  # type: ignore[arg-type]
    assert view.short_side is not None
    assert f"scale=({smallest}, 1.0)" in repr(view.draw)
    crop = v2.RandomResizedCrop(50, scale=(smallest, smallest))
    for width, height in ((1, 1), (4, 3), (3, 5), (9, 1)):
        unit = view.short_side // min(width, height) + 1
        image = Image.new("L", (unit * width, unit * height))
        for _ in range(100):
            made = crop.make_params([image])
            assert min(made["width"], made["height"]) >= 50


def test_the_evaluation_view_is_drawn_from_every_pixel(tmp_path: Path) -> None:
    photograph(801, 600).save(tmp_path / "x.jpg", quality=95)
    own = Preprocessing(img_size=48)
    view, random_view = build_eval_transform(own), build_train_transform(own, "light")
    assert view.open(tmp_path / "x.jpg").size == (801, 600)
    assert view.short_side is build_train_transform(own, "none").short_side is None
    assert random_view.open(tmp_path / "x.jpg").size == (201, 150)


def test_nearest_interpolation_uses_every_pixel() -> None:
    """Interpolation must not add colours to the image."""
    assert build_train_transform(Preprocessing(interpolation="nearest"), "light").short_side is None
