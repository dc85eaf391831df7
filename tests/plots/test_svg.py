"""SVG drawings: round ticks, every shape inside the drawing, text that is never markup."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from finetune.plots.bars import ReliabilityBin, draw_reliability, draw_seconds, format_seconds
from finetune.plots.confusion import draw_confusion_matrix, draw_cooccurrence
from finetune.plots.curves import draw_curves
from finetune.plots.intervals import Difference, draw_comparison, draw_intervals
from finetune.plots.scatter import MOST_POINTS, draw_scatter
from finetune.plots.svg import Plot, element, find_ticks, shorten


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.13, 0.42, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (3, 1234, [0, 500, 1000, 1500]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert find_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (5, 5), (-1, -1), (1e-9, 1e-9), (0, 1e-30), (1e9, 1e9 + 1)]
)
def test_flat_lines_have_an_axis(low: float, high: float) -> None:
    ticks = find_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low <= high <= ticks[-1] and ticks == sorted(set(ticks))


def assert_inside(plot: Plot) -> None:
    """Check that every shape lies inside the drawing."""
    for shape in ElementTree.fromstring(plot.file).iter():
        for key, most in (("x", plot.width), ("y", plot.height), ("cx", plot.width), ("cy", plot.height)):
            if key in shape.attrib:
                assert 0 <= float(shape.attrib[key]) <= most, (shape.tag, shape.attrib)
        if "points" in shape.attrib:
            for point in shape.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= plot.width and 0 <= y <= plot.height


@pytest.mark.parametrize("epochs", [1, 2, 37, 300])
def test_curves_lie_inside_the_drawing(epochs: int) -> None:
    curve = [(float(n), 1 / n) for n in range(1, epochs + 1)]
    plot = draw_curves("loss", "loss", {"validation": curve, "training": curve}, "{:.3g}".format, best=1.0)
    assert_inside(plot)
    assert plot.file.count("ring") > 1 and plot.file.count("<polyline") == 2


def test_intervals_lie_inside_the_drawing() -> None:
    assert_inside(
        draw_intervals([("accuracy", 0.9, (0.85, 0.95)), ("F1", 0.0, None), ("AUC", 1.0, (1.0, 1.0))])
    )


def test_a_difference_that_is_not_significant_is_grey() -> None:
    accuracies = [("<a>", 0.9, (0.85, 0.95)), ("b" * 60, 0.7, None)]
    pairs = [
        Difference("<a>", "b" * 60, -0.2, (-0.3, -0.1), True),
        Difference("c", "d", 0.0, (-0.1, 0.1), False),
    ]
    plot = draw_comparison(accuracies, pairs)
    assert_inside(plot)
    elements = ElementTree.fromstring(plot.file).iter()
    texts = {node.text: node for node in elements if node.tag.endswith("text")}
    assert texts["90.0 % (85.0 to 95.0)"].get("class") == "strong"
    assert texts["\u221220.0 (\u221230.0 to \u221210.0)"].get("class") == "strong"
    assert texts["+0.0 (\u221210.0 to +10.0)"].get("class") == "faint"
    assert {"<a>", "70.0 %", "d \u2212 c"} <= set(texts)


@pytest.mark.parametrize("count", [2, 7, 40])
def test_a_confusion_matrix_shows_every_count(count: int) -> None:
    counts = [[row * count + column for column in range(count)] for row in range(count)]
    names = [f"a class with a long name {number}" for number in range(count)]
    plot = draw_confusion_matrix(names, counts)
    assert_inside(plot)
    elements = ElementTree.fromstring(plot.file).iter()
    shown = [node.text for node in elements if node.tag.endswith("text")]
    assert {str(count * count - 1), "1", "2"} <= set(shown)
    assert "a class with a long name 0 were predicted as" not in plot.title


def test_a_class_without_images_is_an_empty_row() -> None:
    assert_inside(draw_confusion_matrix(["a", "b"], [[0, 0], [3, 1]]))
    assert_inside(draw_confusion_matrix(["a", "b"], [[0, 0], [0, 0]]))


def test_cooccurrence_is_a_share_of_the_images_of_a_row() -> None:
    plot = draw_cooccurrence(["a", "b", "empty"], [[4, 3, 0], [3, 3, 0], [0, 0, 0]])
    assert_inside(plot)
    assert "3 of 4 images of a have b (75.0 %)" in plot.file and "3 of 3 images of b have a" in plot.file


@pytest.mark.parametrize("pairs", [[(0.5, 0.5)], [(-3.0, 1e6), (2.0, -1e6)], [(0.0, 1e-9), (1.0, 1e-9)]])
@pytest.mark.parametrize("margin", [None, 0.0, 0.3, 1e9])
def test_a_scatter_lies_inside_the_drawing(pairs: list[tuple[float, float]], margin: float | None) -> None:
    plot = draw_scatter(pairs, margin)
    assert_inside(plot)
    assert plot.file.count("<circle") == len(pairs)


def test_lines_of_a_scatter_are_the_margin_beside_the_diagonal() -> None:
    plot = draw_scatter([(0.0, 0.0), (1.0, 1.0)], 0.25)
    lines = [shape.attrib for shape in ElementTree.fromstring(plot.file).iter() if shape.tag.endswith("line")]
    diagonal, *limits = [line for line in lines if line["class"] in {"main", "other"}]
    slope = {key: float(value) for key, value in diagonal.items() if key != "class"}
    units = slope["y1"] - slope["y2"]  # of one on the axis, since the axes go from 0 to 1
    below, above = ({key: float(line[key]) for key in ("x1", "y1", "x2", "y2")} for line in limits)
    assert below["x1"] - slope["x1"] == pytest.approx(0.25 * (slope["x2"] - slope["x1"]), abs=0.1)
    assert above["y1"] == pytest.approx(slope["y1"] - 0.25 * units, abs=0.1)
    assert below["x2"] == slope["x2"] and above["y2"] == slope["y2"]


def test_of_very_many_images_a_scatter_shows_some() -> None:
    plot = draw_scatter([(n / 5000, n / 5000) for n in range(5001)])
    assert 1_000 < plot.file.count("<circle") <= MOST_POINTS and "5001 images" in plot.title


def test_reliability_skips_empty_bins() -> None:
    bins = [ReliabilityBin(0.0, 0.5, 0, None, None), ReliabilityBin(0.5, 1.0, 4, 0.9, 1.0)]
    plot = draw_reliability("reliability", "before", bins)
    assert_inside(plot)
    assert plot.file.count("<title>") == 1


def test_durations_are_formatted() -> None:
    assert_inside(draw_seconds({"load": 0.0, "train": 3700.0}))
    assert [format_seconds(value) for value in (0, 0.01, 3.14, 59.6, 250, 7500)] == [
        "0.0 s", "under 0.1 s", "3.1 s", "1 min 0 s", "4 min 10 s", "2 h 5 min",
    ]  # fmt: skip


def test_text_is_escaped_and_shortened() -> None:
    assert element("text", "<b>&", aria_label='"') == '<text aria-label="&#34;">&lt;b&gt;&amp;</text>'
    assert shorten("abcdefghij", 5) == "ab\u2026ij" and shorten("abc", 5) == "abc"
    assert "\n" not in shorten("a\nb", 5)
