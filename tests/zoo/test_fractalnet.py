"""FractalNet of CIFAR, arXiv:1605.07648."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrained.zoo.fractalnet import ALL_COLUMNS, FractalNet, Join
from tests.sweeps import slow_except
from tests.zoo.certify import (
    State,
    assert_gradient_everywhere,
    assert_same_output,
    classify,
    conv,
    count,
    images,
    norm,
    on_meta,
    randomise,
)

DRAWS = 4_000
THIN = {1: 0.3, 2: 0.8, 3: 2.1, 4: 4.8, 5: 10.2, 6: 21.1}
"""Published: millions of parameters of one column to six."""


@pytest.mark.parametrize("columns", slow_except([1, 2, 3], THIN))
def test_parameters_of_the_thin_table(columns: int) -> None:
    assert count(f"cifar_fractalnet_thin_c{columns}") / 1e6 == pytest.approx(THIN[columns], abs=0.06)


def test_parameters_of_three_columns() -> None:
    """Computed. Later papers quote 38.6 M, which the stated widths do not give."""
    assert count("cifar_fractalnet20") == 33_724_618


def test_table_of_layers() -> None:
    network = on_meta("cifar_fractalnet20")
    assert map_sizes_of(network) == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    for block in network.stages:
        assert [len(step) for step in block.layers] == [1, 2, 1, 3]
    rates = [block.layers[0]["column2"].drop1.p for block in network.stages]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def map_sizes_of(network: nn.Module) -> list[tuple[int, ...]]:
    features, sizes = torch.empty(1, 3, 32, 32, device="meta"), []
    for block in network.stages:
        features = block(features, ALL_COLUMNS)
        sizes.append(tuple(features.shape[1:]))
    return sizes


# --- drop-path -------------------------------------------------------------------------------------


def test_local_drop_path_keeps_as_stated_and_never_nothing() -> None:
    """Three inputs at 0.5: each is kept with 1/2, and with 1/24 more as the one that is saved."""
    torch.manual_seed(0)
    masks = torch.stack([Join(0, 0.5).draw(3, ALL_COLUMNS) for _ in range(DRAWS)]).float()
    assert masks.sum(1).min() == 1
    expected = 0.5 + 0.125 / 3
    assert masks.mean(0).tolist() == pytest.approx(
        [expected] * 3, abs=4 * (expected * (1 - expected) / DRAWS) ** 0.5
    )


def test_half_of_the_batches_are_global_and_columns_are_equally_likely() -> None:
    torch.manual_seed(0)
    network = FractalNet(3, (4,))
    drawn = torch.tensor([network.draw_column() for _ in range(DRAWS)])
    for column, share in ((ALL_COLUMNS, 1 / 2), (0, 1 / 6), (1, 1 / 6), (2, 1 / 6)):
        found = float((drawn == column).float().mean())
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / DRAWS) ** 0.5)


def test_nothing_is_drawn_in_evaluation_and_for_frozen_blocks() -> None:
    network, images = FractalNet(3, (4, 8), drop_rate=0.0), torch.zeros(2, 3, 8, 8)
    for act in (network.eval, network.train):
        act()
        network.stages.eval()
        before = torch.get_rng_state()
        network(images)
        assert torch.equal(torch.get_rng_state(), before)
    network.stages[1].train()
    network(images)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_join_is_the_mean_of_what_is_left() -> None:
    maps = [torch.full((1, 1, 1, 1), value) for value in (1.0, 2.0, 6.0)]
    assert float(Join(0, 0.15).eval()(maps, ALL_COLUMNS)) == 3
    assert float(Join(0, 0.0)(maps, ALL_COLUMNS)) == 3
    torch.manual_seed(0)
    join = Join(0, 0.5)
    found = {round(float(join(maps, ALL_COLUMNS)), 3) for _ in range(200)}
    assert found == {1, 2, 6, 1.5, 3.5, 4, 3}
    assert [float(Join(0, 0.15)(maps, column)) for column in range(3)] == [1, 2, 6]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_global_column_reads_no_other(column: int) -> None:
    """Only the drawn column has a gradient, in every block: 1, 2 or 4 convolutions in each."""
    torch.manual_seed(0)
    network = FractalNet(3, (4, 4), drop_rate=0)
    features = images(2)
    for block in network.stages:
        features = block(features, column)
    features.sum().backward()
    reached = {
        name
        for name, parameter in network.named_parameters()
        if "conv" in name and parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert len(reached) == 2 * 2**column
    assert all(f".column{column}." in name for name in reached)


def test_nothing_is_drawn_in_evaluation() -> None:
    network = FractalNet(3, (4, 4), drop_rate=0.4).eval()
    with torch.no_grad():
        assert torch.equal(network(images()), network(images()))


# --- numbers ---------------------------------------------------------------------------------------


def second_forward(state: State, batch: Tensor, columns: int, blocks: int) -> Tensor:
    """f_(c+1)(z) = [f_c(f_c(z)), conv(z)], where a join takes the mean of all that ends at one place.

    Columns are pooled before the last join. Not of pytorchcv, which pools behind it.
    """

    def layer(block: int, step: int, column: int, x: Tensor) -> Tensor:
        name = f"stages.{block}.layers.{step - 1}.column{column}"
        return torch.relu(norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)))

    def ends(block: int, column: int, start: int, z: Tensor) -> list[Tensor]:
        """What columns from ``column`` on give that read z before step ``start`` + 1, and end together."""
        length = 2 ** (columns - 1 - column)
        own = layer(block, start + length, column, z)
        if column == columns - 1:
            return [own]
        half = torch.stack(ends(block, column + 1, start, z)).mean(0)
        return [own, *ends(block, column + 1, start + length // 2, half)]

    for block in range(blocks):
        batch = torch.stack([F.max_pool2d(end, 2) for end in ends(block, 0, 0, batch)]).mean(0)
    return classify(state, batch)


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_numbers_of_a_second_forward(columns: int) -> None:
    torch.manual_seed(0)
    network = randomise(FractalNet(columns, (8, 12)))
    state = network.state_dict()
    assert_same_output(network, lambda batch: second_forward(state, batch, columns, 2), images())


def test_columns_have_one_layer_two_four_and_so_on() -> None:
    names = [name for name, module in FractalNet(4, (4,)).named_modules() if isinstance(module, nn.Conv2d)]
    counts = [sum(f".column{column}." in name for name in names) for column in range(4)]
    assert counts == [1, 2, 4, 8]


def test_gradient_reaches_every_parameter() -> None:
    """In one step, without drop-path."""
    torch.manual_seed(0)
    assert_gradient_everywhere(FractalNet(3, (16, 32, 64), local_drop=0, global_share=0), images(16))
