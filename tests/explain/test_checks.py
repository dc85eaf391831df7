"""The checks of a map can pass and fail: on a network whose evidence is known, and on maps that lie."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from finetune.explain.attribution.gradient import compute_saliency
from finetune.explain.attribution.heat_map import (
    CONSTANT,
    NO_EVIDENCE,
    NOT_FINITE,
    ONE_CELL,
    HeatMap,
    to_heat_map,
)
from finetune.explain.checks.deletion import _move, measure_advantage
from finetune.explain.checks.randomisation import measure_randomisation, randomise_from_top
from finetune.explain.checks.verdicts import NOT_BETTER, judge_deletion, judge_randomisation, withhold
from pretrained.graph.stages import find_stages

SIZE = 64


class Corner(nn.Module):
    """Class 1 has the evidence of a bright top left quarter, through weights that learn it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, SIZE, SIZE))
        with torch.no_grad():
            self.weight[:, : SIZE // 2, : SIZE // 2] = 0.01

    def forward(self, images: Tensor) -> Tensor:
        score = (images.mean(dim=1) * self.weight).sum(dim=(1, 2))
        return torch.stack([-score, score], dim=1)


def bright(count: int = 3) -> Tensor:
    images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    images[:, :, : SIZE // 2, : SIZE // 2] += 3
    return images


def mark(rows: slice, columns: slice) -> HeatMap:
    evidence = torch.zeros(16, 16)
    evidence[rows, columns] = 1
    return to_heat_map(evidence)


TRUE, FALSE = mark(slice(0, 8), slice(0, 8)), mark(slice(8, 16), slice(8, 16))


# --- deletion ---


def test_deleting_the_cause_first_is_an_advantage_and_the_opposite_corner_a_disadvantage() -> None:
    network, images = Corner().eval(), bright()
    [good, none, bad] = measure_advantage(network, images, [1, 1, 1], [TRUE, HeatMap(None, "x"), FALSE])
    assert none is None and good is not None and bad is not None
    assert min(good) > 1 and max(bad) < -1


def test_an_image_has_the_same_advantage_alone_and_among_others() -> None:
    network, images = Corner().eval(), bright()
    together = measure_advantage(network, images, [1, 1, 1], [TRUE, FALSE, TRUE])
    alone = measure_advantage(network, images[2:], [1], [TRUE])
    assert alone == [pytest.approx(together[2])]


def test_the_curve_is_that_of_an_image_deleted_by_hand() -> None:
    """Two steps: after the first, half of the cells are deleted; the half may be moved, and stays a half."""
    network, images = Corner().eval(), bright(1)
    left = mark(slice(0, 16), slice(0, 8))
    [found] = measure_advantage(network, images, [1], [left], steps=2, places=1)

    def odds(first: int) -> float:
        """The log odds where four columns of cells from ``first`` on are deleted."""
        mask = torch.zeros(SIZE, SIZE)
        for column in range(first, first + 4):
            mask[:, column % 8 * 8 : column % 8 * 8 + 8] = 1
        logits = network(images.masked_fill(mask > 0, 0))[0]
        return float(logits[1] - logits[0])  # of two classes, the log odds are the difference

    assert found is not None
    assert min(abs(found[0] - (odds(first) - odds(0))) for first in range(8)) < 1e-4


def test_the_map_is_moved_to_another_place() -> None:
    cells, generator = torch.zeros(8, 8), torch.Generator().manual_seed(0)
    cells[0, 0] = 1
    places = {tuple((_move(cells, generator) == 1).nonzero()[0].tolist()) for _ in range(2000)}
    assert (0, 0) not in places and len(places) > 50


def test_a_map_that_marks_nothing_in_particular_has_no_certain_advantage() -> None:
    generator = torch.Generator().manual_seed(5)
    maps = [to_heat_map(torch.rand(16, 16, generator=generator)) for _ in range(12)]
    check = judge_deletion(measure_advantage(Corner().eval(), bright(12), [1] * 12, maps))
    assert check.passed is not True


def test_the_verdict_needs_an_interval_above_zero() -> None:
    assert judge_deletion([[1.0], [1.2], [0.9]]).passed is True
    assert judge_deletion([[3.0], [-1.0]]).passed is None
    assert judge_deletion([[2.0]]).passed is None
    assert judge_deletion([[-1.0]]).passed is False
    assert judge_deletion([[-1.0, 0.1]]).passed is None, "a single image, and better than one of the places"
    assert judge_deletion([[0.5], None, [-0.7]]).passed is False
    assert judge_deletion([None]).passed is None
    said = judge_deletion([[0.5, 1.5], [1.2], [0.9]])
    assert said.facts["interval"] == pytest.approx((0.6539, 1.4128), abs=1e-3)  # t of 2 degrees is 4.3027
    assert "passed" in said.said and "1.03" in said.said and "3 images" in said.said


def test_the_map_of_one_image_is_left_out_if_no_place_is_worse() -> None:
    assert withhold(TRUE, [-1.0, 0.1, -1.0], []) is TRUE
    assert withhold(TRUE, None, []) is TRUE
    assert withhold(TRUE, [-1.0, 0.0, -1.0], []) == HeatMap(None, NOT_BETTER)


# --- randomisation ---


def make_saliency(network: nn.Module):  # type: ignore[no-untyped-def]
    def compute(images: Tensor, classes: Sequence[int]) -> list[HeatMap]:
        return [to_heat_map(one) for one in compute_saliency(network, images, torch.tensor(classes))]

    return compute


def make_edges(_: nn.Module):  # type: ignore[no-untyped-def]
    """A map of the image alone, like an edge detector."""
    return lambda images, classes: [to_heat_map(image.abs().mean(dim=0)) for image in images]


def network_with_stages() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(1), nn.Linear(32, 4)).eval()


@pytest.mark.parametrize(("make", "passes"), [(make_saliency, True), (make_edges, False)])
def test_a_map_of_the_image_alone_fails(make, passes: bool) -> None:  # type: ignore[no-untyped-def]
    network, images = network_with_stages(), bright() - 1
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stages = find_stages(network, (3, SIZE, SIZE))
    maps = make(network)(images, [0, 1, 2])
    similar = measure_randomisation(network, stages, make, images, [0, 1, 2], maps)
    assert list(similar)[-1] == stages[0].name
    check = judge_randomisation(similar, 3)
    assert check.passed is passes, similar
    assert (withhold(maps[0], [1.0], [check]) is maps[0]) is passes
    if not passes:
        assert list(similar.values()) == pytest.approx([1.0] * len(similar))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_weights_become_random_from_the_top_down_and_keep_their_values() -> None:
    network = network_with_stages()
    stages = find_stages(network, (3, SIZE, SIZE))
    assert len(stages) == 3
    states = [
        {key: tensor.clone() for key, tensor in other.state_dict().items()}
        for _, other in randomise_from_top(network, stages)
    ]
    own = network.state_dict()
    changed = [{key for key in own if not torch.equal(own[key], state[key])} for state in states]
    assert changed[0] == set(stages[-1].parameters) and changed[-1] == set(own)
    assert changed[0] < changed[1] < changed[2]
    for key, tensor in own.items():
        assert torch.equal(states[-1][key].flatten().sort().values, tensor.flatten().sort().values)


def test_no_map_is_no_verdict() -> None:
    network = network_with_stages()
    maps = [HeatMap(None, "x")]
    stages = find_stages(network, (3, SIZE, SIZE))
    similar = measure_randomisation(network, stages, make_saliency, bright(1), [0], maps)
    assert similar == {} and judge_randomisation(similar, 0).passed is None


# --- maps that say nothing ---


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (torch.ones(1, 1), ONE_CELL),
        (torch.full((4, 4), 2.0), CONSTANT),
        (-torch.rand(4, 4), NO_EVIDENCE),
        (torch.zeros(4, 4), NO_EVIDENCE),
        (torch.tensor([[1.0, float("nan")]]), NOT_FINITE),
    ],
)
def test_a_map_that_says_nothing_is_refused(evidence: Tensor, reason: str) -> None:
    assert to_heat_map(evidence) == HeatMap(None, reason)


def test_a_map_is_relative_to_its_maximum() -> None:
    heat = to_heat_map(torch.tensor([[4.0, -1.0], [2.0, 0.0]]))
    assert heat.values is not None and heat.values.tolist() == [[1.0, 0.0], [0.5, 0.0]]
