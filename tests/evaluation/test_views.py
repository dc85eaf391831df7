from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as F

from finetune.data.transforms import build_eval_transform
from finetune.errors import UsageError
from finetune.evaluation.views import build_views, compute_mean_over_views, resolve_scale
from pretrained.preprocessing import ImgSize, Preprocessing, Resize


def photograph(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SIZES = [(100, 75), (40, 90), (48, 48), (55, 55), (33, 300)]
MODES = ["crop", "squash", "pad"]


def timms(image: Image.Image, own: Preprocessing, crop_pct: float) -> torch.Tensor:
    words = own.to_timm() | {"crop_pct": crop_pct}
    view: torch.Tensor = create_transform(**words, is_training=False, normalize=False)(image)
    return view


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("img_size", [48, (32, 48)])
def test_one_crop_is_the_evaluation_view_bit_for_bit(
    resize: Resize, crop_pct: float, size: tuple[int, int], img_size: ImgSize
) -> None:
    own = Preprocessing(img_size=img_size, crop_pct=crop_pct, resize=resize)
    views = build_views(own)
    made = views(photograph(*size))
    assert (made.dtype, made.shape, made.is_contiguous()) == (torch.uint8, (1, *own.input_size), True)
    assert made[0].equal(build_eval_transform(own)(photograph(*size)))
    assert (views.num_views, views.scales, views.crops) == (1, (), 1)


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("img_size", [48, (48, 96)])
def test_the_centre_crop_of_a_scale_equals_that_of_timm(
    resize: Resize, size: tuple[int, int], img_size: ImgSize
) -> None:
    own = Preprocessing(img_size=img_size, resize=resize, interpolation="bilinear")
    for crops, centre in ((1, 0), (5, 4), (10, 4)):
        made = build_views(own, crops, [48, 64, 96])(photograph(*size))
        assert made.shape == (3 * crops, *own.input_size)
        for number, share in enumerate((1.0, 0.75, 0.5)):
            assert made[crops * number + centre].equal(timms(photograph(*size), own, share))


def test_ten_crops_equal_those_of_torchvision() -> None:
    own = Preprocessing(img_size=48)
    image = photograph(100, 75)
    resized = F.resize(image, [54], F.InterpolationMode.BICUBIC)
    expected = torch.stack([F.pil_to_tensor(crop) for crop in F.ten_crop(resized, [48, 48])])
    mirrored = [6, 5, 8, 7, 9]  # torchvision mirrors first: its top left is the mirror of the top right
    assert build_views(own, 10)(image).equal(torch.cat([expected[:5], expected[mirrored]]))
    assert build_views(own, 5)(image).equal(expected[:5])
    assert build_views(own, 10).num_views == 10


def test_corner_crops_of_a_bordered_image_cover_its_corners() -> None:
    own = Preprocessing(img_size=48, resize="pad", crop_pct=0.5, mean=(0.0, 0.0, 0.0))
    wide = Image.new("RGB", (400, 100), (255, 255, 255))  # 96 x 24 with its longer side at 96
    made = build_views(own, 5)(wide)
    assert made.shape == (5, 3, 48, 48)
    assert all((view == 255).any(dim=0).sum() == 24 * 48 for view in made)


def test_the_default_scale_leaves_room_for_several_crops() -> None:
    whole = Preprocessing(img_size=224, crop_pct=1.0)
    assert resolve_scale(whole) == build_views(whole, 5).scales[0] == 256
    assert resolve_scale(Preprocessing(img_size=224, crop_pct=0.875)) == 256
    assert resolve_scale(Preprocessing(img_size=224, crop_pct=0.95)) == 235
    made = build_views(whole, 10)(photograph(400, 300))
    assert len({view.numpy().tobytes() for view in made}) == 10


@pytest.mark.parametrize(
    ("crops", "scales", "said"), [(3, (), "--crops 3"), (1, (224, 223), "--scales 223"), (0, (), "--crops 0")]
)
def test_invalid_crops_and_scales_are_refused(crops: int, scales: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        build_views(Preprocessing(), crops, scales)
    assert refused.value.asked == said


def test_probabilities_are_averaged_over_views() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 8.0], [0.0, 8.0]])
    mean = compute_mean_over_views(logits, 2, temperature=2.0)
    first = (torch.tensor([2.0, 0.0]).softmax(0) + 0.5) / 2
    second = torch.tensor([0.0, 4.0]).softmax(0)
    torch.testing.assert_close(mean, torch.stack([first, second]))
    assert compute_mean_over_views(logits, 1).equal(logits.softmax(1))
