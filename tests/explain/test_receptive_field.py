"""Receptive fields: against pixels that are changed one by one, and against published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune.explain.effective_field import find_effective_size, measure_gradient_mass
from finetune.explain.positions import MapPosition
from finetune.explain.receptive_field import find_boxes, measure_fields
from finetune.explain.units import Box, Unit, record_maps
from tests.contracts.families import SMALLEST
from tests.explain.places import build, noise, place, plain
from tests.sweeps import slow_except


def convolution(kernel: int, **options: int) -> nn.Module:
    return nn.Conv2d(4, 4, kernel, **options)


def test_two_convolutions_of_3x3_see_5x5_and_three_see_7x7() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), convolution(3, padding=1), nn.ReLU())
    network.append(convolution(3, padding=1)).eval()
    found = measure_fields(network, [plain(name) for name in "0124"], (3, 32, 32))
    assert [field.size for field in found] == [(3, 3), (3, 3), (5, 5), (7, 7)]
    assert all(field.stride == (1, 1) and field.first_centre == (0.5, 0.5) for field in found)


def test_alexnet_sees_what_it_is_known_to_see() -> None:
    """Sizes and steps by the usual formula: size += (kernel - 1) * step, step *= stride."""
    layers = {
        0: (11, 4),
        2: (19, 8),
        3: (51, 8),
        5: (67, 16),
        6: (99, 16),
        8: (131, 16),
        10: (163, 16),
        12: (195, 32),
    }
    network = build("torchvision/alexnet")
    found = measure_fields(network, [plain(f"features.{number}") for number in layers], (3, 224, 224))
    assert [(field.size, field.stride) for field in found] == [
        ((size, size), (step, step)) for size, step in layers.values()
    ]
    assert found[0].first_centre == (3.5, 3.5) and found[0].map_size == (55, 55)  # 11 pixels from -2 on


def test_a_field_that_is_larger_than_the_image_is_measured_in_a_larger_one() -> None:
    network = build("torchvision/resnet50")
    [field] = measure_fields(network, [plain("layer4")], (3, 128, 128))
    assert field.size == (427, 427) and field.stride == (32, 32)  # stride in the 3x3 convolution
    assert field.box == Box(0, 0, 128, 128) and field.map_size == (4, 4)


class Branches(nn.Module):
    """Two branches with other windows, an oblong convolution, a dilation and pooling with rounding up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.narrow, self.wide = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 5, padding=2, groups=2)
        self.join = nn.Identity()
        self.oblong = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.holes = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu_()
        x = self.join(torch.cat([self.narrow(x), self.wide(x)], dim=1))
        x += self.oblong(x)
        return self.pool(self.holes(x).relu())


def pixels_seen(network: nn.Module, position: MapPosition, size: tuple[int, int, int], unit: Unit) -> Box:
    """The box of the pixels that make a unit NaN when they are NaN, each pixel tried by itself."""
    network = network.double()
    with torch.no_grad():
        spoiled = noise(size, 1).double().repeat(size[1] * size[2], 1, 1, 1)
        for number, image in enumerate(spoiled):
            image[:, number // size[2], number % size[2]] = torch.nan
        maps = torch.cat([record_maps(network, [position], part)[0] for part in spoiled.split(256)])
    network.float()
    column = maps[:, :, unit.row, unit.column]
    changed = (column if unit.channel is None else column[:, [unit.channel]]).isnan().any(dim=1)
    seen = changed.reshape(size[1:])
    rows, columns = seen.any(dim=1).nonzero(), seen.any(dim=0).nonzero()
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


@pytest.mark.parametrize("layer", ["narrow", "wide", "join", "oblong", "holes", "pool"])
def test_it_is_what_changing_pixels_one_by_one_shows(layer: str) -> None:
    torch.manual_seed(0)
    network, size = Branches().eval(), (3, 24, 20)
    [maps] = record_maps(network, [plain(layer)], noise(size, 1))
    most, *last = (size - 1 for size in maps.shape[1:])
    units = [Unit(None, 0, 0), Unit(0, 1, 2), Unit(most, last[0] // 2, last[1] // 2), Unit(most, *last)]
    found = find_boxes(network, plain(layer), size, units)
    assert found == [pixels_seen(network, plain(layer), size, unit) for unit in units]


def test_channels_of_other_branches_see_other_windows() -> None:
    torch.manual_seed(0)
    narrow, wide = find_boxes(Branches().eval(), plain("join"), (3, 24, 24), [Unit(0, 5, 5), Unit(3, 5, 5)])
    assert narrow.size == (3, 3) and wide.size == (11, 11)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("test_resnet", "layer2", (3, 32, 32)),
        ("torchvision/squeezenet1_1", "features.3", (3, 35, 35)),
        ("test_vit", "patch_embed", (3, 160, 160)),
    ],
)
def test_it_holds_on_networks_of_the_libraries(name: str, layer: str, size: tuple[int, int, int]) -> None:
    network = build(name)
    position = place(network, layer, size)
    unit = Unit(None, 1, 1)
    if size[1] > 64:  # a patch of 16 pixels
        assert find_boxes(network, position, size, [unit]) == [Box(16, 16, 32, 32)]
    else:
        assert find_boxes(network, position, size, [unit]) == [pixels_seen(network, position, size, unit)]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("test_vit", "blocks.0", 160),
        ("legacy_seresnet18", "layer1", 64),
        ("tf_efficientnet_lite0", "blocks.2", 64),
    ],
)
def test_attention_and_excitation_see_the_whole_image(name: str, layer: str, size: int) -> None:
    network = build(name)
    [field] = measure_fields(network, [place(network, layer, (3, size, size))], (3, size, size))
    is_whole = name != "tf_efficientnet_lite0"  # the Lite networks have no squeeze-and-excitation
    assert (field.box == Box(0, 0, size, size)) == is_whole == (field.size is None)


class Recurrent(nn.Module):
    """Patches of 4 pixels, read by a recurrent layer row by row: (B, 3, H, W) -> (B, 5, H / 4, W / 4)."""

    def __init__(self, kind: type[nn.RNNBase], in_both: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.layer = kind(6, 5, batch_first=True, bidirectional=in_both)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        columns = maps.permute(0, 3, 2, 1).flatten(0, 1)  # a sequence of rows for each column
        read, _ = self.layer(columns)
        return read.reshape(len(maps), maps.shape[3], maps.shape[2], -1).permute(0, 3, 2, 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("in_both", "last"), [(True, 24), (False, 12)])
def test_a_recurrent_layer_sees_all_that_it_has_read(
    kind: type[nn.RNNBase], in_both: bool, last: int
) -> None:
    torch.manual_seed(0)
    network, size, unit = Recurrent(kind, in_both).eval(), (3, 24, 24), Unit(None, 2, 3)
    [box] = find_boxes(network, plain(""), size, [unit])
    assert box == Box(0, 12, last, 16)
    assert rows_seen(network, plain(""), size, unit, {*range(24)}) == {*range(last)}


def rows_seen(
    network: nn.Module, position: MapPosition, size: tuple[int, int, int], unit: Unit, rows: set[int]
) -> set[int]:
    """Those of the rows that make a unit NaN when they are NaN."""
    found = set()
    for row in rows:
        images = noise(size, 1)
        images[:, :, row] = torch.nan
        with torch.no_grad():
            [maps] = record_maps(network, [position], images)
        if maps[0, :, unit.row, unit.column].isnan().any():
            found.add(row)
    return found


@pytest.mark.parametrize("family", slow_except(["resnet"], [*SMALLEST]))
def test_no_family_has_units_that_see_more(family: str) -> None:
    """Rows are spoiled, at and beside both ends of the field of a unit in the middle, and elsewhere."""
    from finetune.explain.positions import find_map_positions
    from pretrained.catalog import find_card

    network, size = build(SMALLEST[family]), find_card(SMALLEST[family]).preprocessing.input_size
    positions = list(find_map_positions(network, size))
    if not positions:
        pytest.skip("it has no feature map")
    position = positions[-1]
    assert position.form.size is not None
    unit = Unit(None, position.form.size[0] // 2, position.form.size[1] // 2)
    [box] = find_boxes(network, position, size, [unit])
    asked = {0, box.top - 1, box.top, (box.top + box.bottom) // 2, box.bottom - 1, box.bottom, size[1] - 1}
    rows = {row for row in asked if 0 <= row < size[1]}
    assert rows_seen(network, position, size, unit, rows) == {
        row for row in rows if box.top <= row < box.bottom
    }


def test_the_network_does_not_change() -> None:
    network = build("test_resnet")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure_fields(network, [plain("layer1")], (3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(p.dtype == torch.float32 and p.requires_grad and p.grad is None for p in network.parameters())


# --- the effective field ---


def test_the_mass_lies_in_the_exact_field() -> None:
    network, size = build("test_resnet"), (3, 64, 64)
    position = place(network, "layer1", size)
    [field] = measure_fields(network, [position], size)
    [mass] = measure_gradient_mass(network, [position], noise(size))
    top, left, bottom, right = field.box
    assert float(mass.sum()) == pytest.approx(1)
    assert float(mass[top:bottom, left:right].sum()) == pytest.approx(1)


def test_a_mean_filter_has_its_mass_spread_evenly() -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 5, padding=2, bias=False)).eval()
    nn.init.ones_(network[0].weight)
    [mass] = measure_gradient_mass(network, [plain("0")], noise((3, 15, 15)))
    assert mass[5:10, 5:10].flatten().tolist() == pytest.approx([1 / 25] * 25)
    sizes = [find_effective_size(mass, (7.5, 7.5), share) for share in (0.03, 0.3, 0.95)]
    assert sizes == [1, 3, 5]
    assert find_effective_size(torch.zeros(4, 4), (2, 2), 0.5) == 0
