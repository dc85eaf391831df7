"""The drawn learning curve: everything inside the drawing, the forecast and the target marked."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from finetune.plots.learning_curve import (
    CurvePoint,
    LearningCurvePlot,
    draw_learning_curve,
    write_learning_curve,
)
from tests.plots.test_svg import assert_inside

SVG = "{http://www.w3.org/2000/svg}"


def build(level: float, reach: float, target: float | None = None) -> LearningCurvePlot:
    def at(images: int) -> CurvePoint:
        value = min(1.0, level + 0.0001 * images)
        return CurvePoint(images, value, max(0.0, value - reach), min(1.0, value + reach))

    measured = [at(images) for images in (12, 25, 50, 100)]
    fitted = [at(images) for images in range(12, 401, 8)] + [at(400)]
    return LearningCurvePlot(measured, fitted, [at(100), at(200), at(400)], target, "a <network> & $x$")


@pytest.mark.parametrize("target", [None, 0.05, 0.99])
@pytest.mark.parametrize(("level", "reach"), [(0.5, 0.1), (0.0, 0.9), (1.0, 0.0), (0.93, 0.001)])
def test_all_lies_inside_the_drawing(
    level: float, reach: float, target: float | None, tmp_path: Path
) -> None:
    drawn = build(level, reach, target)
    plot = draw_learning_curve(drawn)
    assert_inside(plot)
    for shape in ElementTree.fromstring(plot.file).iter():
        for pair in shape.attrib.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= plot.width and 0 <= y <= plot.height
    write_learning_curve(tmp_path / "curve.png", drawn)
    assert Image.open(tmp_path / "curve.png").size[0] > 700


def test_the_forecast_and_the_target_are_marked() -> None:
    root = ElementTree.fromstring(draw_learning_curve(build(0.6, 0.05, 0.7)).file)
    circles = [shape.attrib["class"] for shape in root.iter(f"{SVG}circle")]
    assert circles == ["dot"] * 4 + ["ring"] * 2
    words = [shape.text for shape in root.iter(f"{SVG}text")]
    assert {"12", "25", "50", "100", "200", "400", "target 70 %", "training images"} <= set(words)
    assert "400 images 64.0 %, 59.0 to 69.0" in root.attrib["aria-label"]
    assert "target" not in "".join(
        shape.text or ""
        for shape in ElementTree.fromstring(draw_learning_curve(build(0.6, 0.05)).file).iter()
    )
