"""Drawings of graphs: no box lies on another, and nothing is lost."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from finetune.plots.network_graph import Edge, draw_network

FIRE = [("input",), ("squeeze", "ReLU"), ("expand 1x1",), ("expand 3x3",), ("concatenate",), ("output",)]
EDGES: list[Edge] = [
    (0, 1, "3x8x8"),
    (1, 2, "4x8x8"),
    (1, 3, "4x8x8"),
    (2, 4, "8x8x8"),
    (3, 4, "8x8x8"),
    (4, 5, "16x8x8"),
]


def boxes(drawn: str) -> list[tuple[float, float, float, float]]:
    pattern = r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx'
    found = [tuple(map(float, match)) for match in re.findall(pattern, drawn)]
    return [(x, y, x + width, y + height) for x, y, width, height in found]


def test_every_box_edge_and_size_is_drawn() -> None:
    plot = draw_network("fire", "a fire module", [(lines, True) for lines in FIRE], EDGES)
    drawn = str(plot.inline)
    assert len(boxes(drawn)) == 6 and drawn.count('class="edge"') == 6
    for word in ("squeeze", "expand 3x3", "3x8x8", "16x8x8", "a fire module"):
        assert f">{word}<" in drawn
    assert drawn.count(">4x8x8<") == 1, "a tensor's size is written once"
    assert all(right <= plot.width and bottom <= plot.height for _, _, right, bottom in boxes(drawn))


@pytest.mark.parametrize("width", [3, 9])
def test_boxes_do_not_overlap_and_edges_lead_down(width: int) -> None:
    """A source, many branches of different lengths, and a skip over all of them."""
    nodes, edges = [("input",)], [(0, width * 2 + 1, "skip")]
    for branch in range(width):
        nodes += [(f"branch {branch} " * (branch + 1),), (f"second {branch}",)]
        edges += [
            (0, 2 * branch + 1, "a"),
            (2 * branch + 1, 2 * branch + 2, "b"),
            (2 * branch + 2, 2 * width + 1, "c"),
        ]
    nodes.append(("output",))
    plot = draw_network("many", "many", [(lines, True) for lines in nodes], sorted(edges))
    found = boxes(str(plot.inline))
    assert len(found) == len(nodes)
    for one, other in combinations(found, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart
    tops = [box[1] for box in found]
    assert all(tops[source] < tops[target] for source, target, _ in edges)


def test_names_are_escaped() -> None:
    drawn = str(draw_network("x", "<b>", [(("<script>",), True), (("y",), False)], [(0, 1, "&")]).inline)
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn and "&lt;b&gt;" in drawn
