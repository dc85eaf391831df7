"""The images that excite maps most: one pass in batches against all activations at once."""

from __future__ import annotations

import pytest
import torch

from finetune.explain.top_units import TopRecorder, TopUnits, find_peaks
from finetune.explain.units import activations_of, record_maps
from tests.explain.places import build, noise, place


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "layers", "size"),
    [
        ("test_resnet", ("layer1", "layer3"), (3, 64, 64)),  # a ReLU in place follows
        ("test_vit", ("blocks.1", "blocks.3"), (3, 160, 160)),  # tokens, the first of a class
        ("torchvision/swin_t", ("features.1", "features.3"), (3, 64, 64)),  # channels last
    ],
)
def test_batches_give_what_all_images_give_at_once(
    name: str, layers: tuple[str, ...], size: tuple[int, int, int]
) -> None:
    network, images = build(name), noise(size, 7)
    positions = [place(network, layer, size) for layer in layers]
    recorder = TopRecorder(network, positions, 3)
    for part in images.split(3):
        recorder.add(part)
    with torch.no_grad():
        everything = record_maps(network, positions, images)
    for top, maps in zip(recorder.layers, everything, strict=True):
        peaks = maps.flatten(2).amax(dim=2)
        assert torch.allclose(top.values, peaks.sort(dim=0, descending=True).values[:3], atol=1e-5)
        for channel in range(0, maps.shape[1], 7):
            for image, value in top.strongest(channel):
                assert peaks[image, channel].item() == pytest.approx(value, abs=1e-5)


def test_a_peak_is_the_strongest_unit_of_its_map() -> None:
    network, size = build("test_resnet"), (3, 64, 48)
    images, position = noise(size, 2), place(network, "layer1", size)
    found = find_peaks(network, position, images)
    with torch.no_grad():
        [maps] = record_maps(network, [position], images)
    assert [len(units) for units in found] == [maps.shape[1]] * 2
    for channel in range(maps.shape[1]):
        units = [found[0][channel], found[1][channel]]
        assert torch.equal(activations_of(maps, units), maps[:, channel].amax(dim=(1, 2)))


def test_equal_activations_keep_the_order_of_the_images() -> None:
    top = TopUnits(2)
    for _ in range(3):
        top.add(torch.ones(2, 1))
    assert top.strongest(0) == [(0, 1.0), (1, 1.0)]


def test_what_excites_nothing_is_left_out() -> None:
    top = TopUnits(3)
    top.add(torch.tensor([[0.0, -1.0, 2.0, torch.nan], [0.0, -2.0, 0.0, 3.0]]))
    assert top.rank_maps() == [3, 2]
    assert [len(top.strongest(channel)) for channel in range(4)] == [0, 0, 1, 1]
    assert top.strongest(3) == [(1, 3.0)]


def test_memory_does_not_grow_with_the_images() -> None:
    top, shapes = TopUnits(9), set()
    for _ in range(5):
        top.add(torch.rand(8, 6))
        shapes.add((top.values.shape, top.images.shape))
        assert top.values.untyped_storage().nbytes() == 9 * 6 * 4
    assert len(shapes) == 1
