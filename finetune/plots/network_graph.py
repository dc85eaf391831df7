"""A network as a graph: boxes of layers from top to bottom, with the sizes of tensors at the edges.

Nodes are drawn in rows, each below all that it reads. An edge that skips rows has a place in each of them, so
that it passes beside the boxes. Within a row, places are ordered and moved towards what they are connected
with (Sugiyama, Tagawa and Toda, 1981).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from finetune.plots.svg import LETTER_WIDTH, Plot, element, shorten, text

_LINE, _PAD, _GAP = 15.0, 7.0, 26.0
"""Height of a line of text, space around the text of a box, and space between places of a row, in pixels."""
_ROOM = 34.0
"""Pixels between rows, in which sizes are written."""
_LANE = 10.0
"""Width of an edge that passes a row."""
_MARGIN = 20.0
_LONGEST = 60
"""Largest number of characters of a line."""
_SWEEPS = 6

Edge = tuple[int, int, str]
"""Indices of the node that makes a tensor and of the one that reads it, and the tensor's size."""


def draw_network(
    name: str, heading: str, nodes: Sequence[tuple[Sequence[str], bool]], edges: Sequence[Edge]
) -> Plot:
    """Draw a network as a graph.

    Args:
        name: file name without its ending.
        heading: a few words above the graph.
        nodes: the lines of each box, and whether it is a layer; the others are operations.
        edges: each leads from an earlier node to a later one.
    """
    rows, chains = _lay_rows(len(nodes), edges)
    boxes = {number: [shorten(line, _LONGEST) for line in lines] for number, (lines, _) in enumerate(nodes)}
    widths = {place: _width(boxes.get(place)) for row in rows for place in row}
    _order(rows, chains)
    middles = _place(rows, widths, chains)
    tops, bottoms = _stack(rows, boxes)
    parts = [text(_MARGIN, 22, heading, "strong")]
    parts += _draw_edges(chains, edges, middles, tops, bottoms)
    for number, (_, is_layer) in enumerate(nodes):
        parts.append(_draw_box(boxes[number], middles[number], tops[number], widths[number], is_layer))
    right = max(middles[place] + widths[place] / 2 for place in middles) + _MARGIN
    width = max(right, _MARGIN * 2 + LETTER_WIDTH * len(heading))
    title = f"{heading}: {len(nodes)} nodes and {len(edges)} tensors"
    return Plot(name, width, max(bottoms.values()) + _MARGIN, title, Markup("").join(parts))


def _width(lines: Sequence[str] | None) -> float:
    return _LANE if lines is None else 2 * _PAD + LETTER_WIDTH * max(len(line) for line in lines)


# --- rows, order, places -------------------------------------------------------------------------


def _lay_rows(num_nodes: int, edges: Sequence[Edge]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the places of each row, and for each edge the places from its first to its last.

    Numbers from ``num_nodes`` on are places where an edge passes a row.
    """
    depth = [0] * num_nodes
    for source, target, _ in sorted(edges):  # sources come before targets, so a source's depth is final
        depth[target] = max(depth[target], depth[source] + 1)
    rows: list[list[int]] = [[] for _ in range(max(depth) + 1)]
    for number, row in enumerate(depth):
        rows[row].append(number)
    chains, following = [], num_nodes
    for source, target, _ in edges:
        passed = list(range(following, following + depth[target] - depth[source] - 1))
        following += len(passed)
        for row, place in enumerate(passed, start=depth[source] + 1):
            rows[row].append(place)
        chains.append([source, *passed, target])
    return rows, chains


def _neighbours(chains: Sequence[Sequence[int]]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return the places above and below each place that it is connected with."""
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for chain in chains:
        for upper, lower in pairwise(chain):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    return above, below


def _order(rows: Sequence[list[int]], chains: Sequence[Sequence[int]]) -> None:
    """Order the places of each row by the mean position of their neighbours above, then below, in turn."""
    above, below = _neighbours(chains)
    for sweep in range(_SWEEPS):
        near, path = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for fixed, row in pairwise(path):
            position = {place: index for index, place in enumerate(fixed)}
            own = {place: index for index, place in enumerate(row)}
            row.sort(key=lambda place: _mean([position[one] for one in near.get(place, ())], own[place]))


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _place(
    rows: Sequence[Sequence[int]], widths: Mapping[int, float], chains: Sequence[Sequence[int]]
) -> dict[int, float]:
    """Return the horizontal middle of each place: near its neighbours, and without overlaps."""
    above, below = _neighbours(chains)
    middles: dict[int, float] = {}
    for row in rows:
        middles |= _separate(row, [0.0] * len(row), widths)
    for sweep in range(2 * _SWEEPS):
        near, path = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in path:
            wanted = [_mean([middles[one] for one in near.get(place, ())], middles[place]) for place in row]
            middles |= _separate(row, wanted, widths)
    left = min(middles[place] - widths[place] / 2 for place in middles)
    return {place: middle - left + _MARGIN for place, middle in middles.items()}


def _separate(row: Sequence[int], wanted: Sequence[float], widths: Mapping[int, float]) -> dict[int, float]:
    """Return the middles that are closest to the wanted ones in sum of squares, without overlaps.

    Less the widths of all places before, middles must not fall: isotonic regression, by pooling neighbours.
    """
    offsets = [0.0]
    for one, other in pairwise(row):
        offsets.append(offsets[-1] + (widths[one] + widths[other]) / 2 + _GAP)
    pools: list[tuple[float, int]] = []
    for middle, offset in zip(wanted, offsets, strict=True):
        value, number = middle - offset, 1
        while pools and pools[-1][0] > value:
            mean, size = pools.pop()
            value, number = (mean * size + value * number) / (size + number), size + number
        pools.append((value, number))
    values = [value for value, number in pools for _ in range(number)]
    return {place: value + offset for place, value, offset in zip(row, values, offsets, strict=True)}


def _stack(
    rows: Sequence[Sequence[int]], boxes: Mapping[int, Sequence[str]]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the top and the bottom of each place; an edge that passes a row takes its whole height."""
    tops: dict[int, float] = {}
    bottoms: dict[int, float] = {}
    top = 40.0
    for row in rows:
        height = max(_height(boxes.get(place)) for place in row)
        tops |= dict.fromkeys(row, top)
        bottoms |= {place: top + (_height(boxes[place]) if place in boxes else height) for place in row}
        top += height + _ROOM
    return tops, bottoms


def _height(lines: Sequence[str] | None) -> float:
    return 0.0 if lines is None else 2 * _PAD + _LINE * len(lines)


# --- drawing -------------------------------------------------------------------------------------


def _draw_edges(
    chains: Sequence[Sequence[int]],
    edges: Sequence[Edge],
    middles: Mapping[int, float],
    tops: Mapping[int, float],
    bottoms: Mapping[int, float],
) -> list[Markup]:
    """Return a line for each edge; the size of a tensor is written once below the box that makes it."""
    parts: list[Markup] = []
    sizes: list[Markup] = []  # above all lines
    written: set[tuple[int, str]] = set()
    for chain, (source, _, size) in zip(chains, edges, strict=True):
        ends = [[(middles[place], tops[place]), (middles[place], bottoms[place])] for place in chain]
        points = [point for pair in ends for point in pair][1:-1]
        parts.append(element("path", d=_curve(points), class_="edge"))
        if (source, size) not in written:
            written.add((source, size))
            (x, y), (next_x, next_y) = points[:2]
            x, y = (x + next_x) / 2, (y + next_y) / 2
            sizes.append(text(x + 5, y + 4, size, "size"))
    return parts + sizes


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path through points from top to bottom, vertical at each of them."""
    (x, y), *others = points
    path = f"M{x:.1f},{y:.1f}"
    for next_x, next_y in others:
        middle = (y + next_y) / 2
        path += f" C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{next_y:.1f}"
        x, y = next_x, next_y
    return path


def _draw_box(lines: Sequence[str], middle: float, top: float, width: float, is_layer: bool) -> Markup:
    box = element(
        "rect",
        x=middle - width / 2,
        y=top,
        width=width,
        height=_height(lines),
        rx=4,
        class_="layer" if is_layer else "join",
    )
    words = [
        text(middle, top + _PAD + _LINE * (number + 0.75), line, "middle")
        for number, line in enumerate(lines)
    ]
    return element("g", box, *words)
