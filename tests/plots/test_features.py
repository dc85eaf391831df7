"""Plots of features: they are written, show the right text, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from finetune.errors import DiskError
from finetune.plots import features
from finetune.plots.features import Curve, draw_map, draw_probe, draw_strategy_matrix

ROOT = Path(__file__).parents[2]
LAYERS = ["conv1", "layer1", "layer2", "layer3", "layer4"]
CURVES: dict[str, Curve] = {
    "logistic regression": ([0.6, 0.7, 0.8, 0.93, 0.9], [0.02] * 5),
    "linear SVM": ([0.6, 0.71, 0.8, 0.92, 0.93], [0.03] * 5),
}
CELLS = {
    ("little", "similar"): "a linear classifier on the last features",
    ("little", "different"): "linear classifiers on features of different stages",
    ("a lot", "similar"): "fine-tune a few layers",
    ("a lot", "different"): "fine-tune all",
}
HOSTILE = ["$x$", r"$\frac{$", "_hidden", "a\x1b[31mb", "名前🦊", "", "a\nb", "x" * 255, "%s {0}", "<b>"]


Points = npt.NDArray[np.float64]


def points_of(num_classes: int, each: int = 5) -> tuple[Points, list[int]]:
    labels = [index for index in range(num_classes) for _ in range(each)]
    middles = np.array([[index % 6, index // 6] for index in labels]) * 10.0
    return middles + np.random.default_rng(0).normal(size=middles.shape), labels


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        colours = image.convert("RGB").getcolors(2**24)
        assert colours is not None and len(colours) > 20, "nothing is drawn"
        return image.size


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures instead of writing them."""
    figures: list[Figure] = []
    monkeypatch.setattr(features, "write_figure", lambda _, figure: figures.append(figure))
    return figures


def texts_of(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


# --- Accuracy by depth ---


def test_a_probe_plot_is_written(tmp_path: Path) -> None:
    draw_probe(tmp_path / "probe.png", LAYERS, CURVES, 0.5, "ants and bees")
    width, height = size_of(tmp_path / "probe.png")
    assert 800 < width < 1400 and 500 < height < 900


def test_a_probe_plot_names_layers_curves_and_chance(drawn: list[Figure]) -> None:
    draw_probe(Path("unused"), LAYERS, CURVES, 0.5, "ants and bees")
    texts = texts_of(drawn[0])
    for text in (*LAYERS, *CURVES, "ants and bees", "chance 0.5", "best: layer3, 0.930"):
        assert texts.count(text) == 1, text
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert 0.4 < low < 0.5 and 0.95 < high < 1.1
    assert [line for line in axes.lines if line.is_dashed() and list(line.get_ydata()) == [0.5, 0.5]]


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_the_best_layer_is_marked(drawn: list[Figure], depth: int) -> None:
    accuracies = [0.5] * 5
    accuracies[depth] = 0.8
    draw_probe(
        Path("unused"), LAYERS, {"a": (accuracies, [0.01] * 5), "b": ([0.79] * 5, [0.01] * 5)}, 0.1, "t"
    )
    ring = next(line for line in drawn[0].axes[0].lines if line.get_fillstyle() == "none")
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([depth - 0.06], [0.8])
    assert f"best: {LAYERS[depth]}, 0.800" in texts_of(drawn[0])
    best, *others = drawn[0].axes[0].texts
    assert best.get_text().startswith("best")
    assert not any(best.get_window_extent().overlaps(other.get_window_extent()) for other in others)


def test_names_of_curves_do_not_overlap(drawn: list[Figure]) -> None:
    curves: dict[str, Curve] = {f"classifier {n}": ([0.5, 0.9 + n / 1000], [0.01, 0.01]) for n in range(7)}
    draw_probe(Path("unused"), ["a", "b"], curves, 0.89, "t")
    from matplotlib.text import Text

    drawn[0].draw_without_rendering()
    names = [*curves, "chance 0.89"]
    boxes = [text.get_window_extent() for text in drawn[0].findobj(Text) if text.get_text() in names]
    assert len(boxes) == 8
    boxes.sort(key=lambda box: box.y0)
    assert all(one.y1 <= two.y0 + 1 for one, two in pairwise(boxes))


@pytest.mark.parametrize(
    "layers", [["avgpool"], [f"features.{n}" for n in range(13)], [f"blocks.{n}.mlp.fc2" for n in range(24)]]
)
def test_names_of_layers_do_not_overlap(drawn: list[Figure], layers: list[str]) -> None:
    size = len(layers)
    draw_probe(Path("unused"), layers, {"a": ([0.5] * size, [0.1] * size)}, 0.1, "t")
    drawn[0].draw_without_rendering()
    ticks = drawn[0].axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == layers
    if not ticks[0].get_rotation():
        boxes = [tick.get_window_extent() for tick in ticks]
        assert all(one.x1 < two.x0 for one, two in pairwise(boxes))
    else:
        assert size > 5


# --- Maps ---


@pytest.mark.sample(2)
@pytest.mark.parametrize("num_classes", [1, 2, 20, 21, 60])
def test_a_map_is_written(tmp_path: Path, num_classes: int) -> None:
    classes = [f"class {index}" for index in range(num_classes)]
    draw_map(tmp_path / "map.png", *points_of(num_classes), classes, "t", ("x", "y"), (0.5, 0.25))
    width, height = size_of(tmp_path / "map.png")
    assert 1000 < width < 1800 and 700 < height < 1000


def test_a_map_names_axes_and_classes(drawn: list[Figure]) -> None:
    draw_map(Path("unused"), *points_of(2), ["ants", "bees"], "resnet50", ("first", "second"), (0.5, 0.123))
    texts = texts_of(drawn[0])
    for text in ("resnet50", "first (50.0% of the variance)", "second (12.3% of the variance)"):
        assert texts.count(text) == 1
    for name in ("ants", "bees"):
        assert texts.count(name) == 2, "in the legend, and on its points"


def test_axes_without_a_unit_have_no_ticks(drawn: list[Figure]) -> None:
    draw_map(Path("unused"), *points_of(2), ["ants", "bees"], "t", ("UMAP 1", "UMAP 2"))
    assert sorted(texts_of(drawn[0])) == sorted(["t", "UMAP 1", "UMAP 2", *["ants", "bees"] * 2])


def test_twenty_classes_look_different(drawn: list[Figure]) -> None:
    draw_map(Path("unused"), *points_of(20), [str(index) for index in range(20)], "t", ("x", "y"))
    styles = set()
    points = drawn[0].axes[0].collections[::2]  # every other one is for the legend
    for drawing in points:
        (colour,) = drawing.get_facecolor()
        styles.add((tuple(colour[:3]), len(drawing.get_paths()[0].vertices)))
    assert len(points) == len(styles) == 20


def test_more_classes_are_coloured_by_their_index(drawn: list[Figure]) -> None:
    draw_map(Path("unused"), *points_of(30), [f"c{index}" for index in range(30)], "t", ("x", "y"))
    texts = texts_of(drawn[0])
    assert "t\n30 classes, coloured by their index" in texts
    assert "class index" in texts
    assert "c29" in texts


def test_names_on_a_map_do_not_overlap(drawn: list[Figure]) -> None:
    points = np.random.default_rng(0).normal(size=(300, 2))
    labels = [index % 30 for index in range(300)]
    draw_map(Path("unused"), points, labels, [f"class {index}" for index in range(30)], "t", ("x", "y"))
    drawn[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawn[0].axes[0].texts]
    assert 1 <= len(boxes) < 30
    assert not any(one.overlaps(two) for place, one in enumerate(boxes) for two in boxes[:place])


def test_a_class_without_images_is_not_drawn(tmp_path: Path) -> None:
    draw_map(tmp_path / "map.png", np.zeros((3, 2)), [0, 0, 2], ["a", "b", "c"], "t", ("x", "y"))
    size_of(tmp_path / "map.png")


# --- The matrix of strategies ---


@pytest.mark.slow
def test_a_matrix_is_written_with_its_cell_marked(tmp_path: Path) -> None:
    sizes, shares = set(), []
    for marked in CELLS:
        draw_strategy_matrix(tmp_path / "matrix.png", CELLS, marked, "your data")
        sizes.add(size_of(tmp_path / "matrix.png"))
        with Image.open(tmp_path / "matrix.png") as image:
            blue = image.convert("RGB").point(lambda value: value)
            width, height = blue.size
            pixels = [
                sum(blue.getpixel((x, y)) == (0, 0x72, 0xB2) for x in xs for y in ys)
                for ys in (range(0, height // 2, 9), range(height // 2, height, 9))
                for xs in (range(0, width * 58 // 100, 9), range(width * 58 // 100, width, 9))
            ]
        shares.append(pixels)
    assert all(700 < width < 1400 and 400 < height < 900 for width, height in sizes)
    assert [pixels.index(max(pixels)) for pixels in shares] == [0, 1, 2, 3]


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_text_stays_in_its_cell(drawn: list[Figure], rows: int, columns: int) -> None:
    long = (
        "a linear classifier on the best stage or on all together, then everything at a tenth of the lr " * 2
    )
    cells = {(f"r{row}", f"c{column}"): long for row in range(rows) for column in range(columns)}
    draw_strategy_matrix(Path("unused"), cells, ("r0", "c0"), "t")
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"r{row}" for row in range(rows)]
    boxes = [patch.get_window_extent() for patch in axes.patches]
    assert len(boxes) == len(axes.texts) == rows * columns
    for box, text in zip(boxes, axes.texts, strict=True):
        inside = text.get_window_extent()
        assert box.x0 <= inside.x0 and inside.x1 <= box.x1 and box.y0 <= inside.y0 and inside.y1 <= box.y1
        assert text.get_text().split() == long.split()


# --- All plots ---

Draw = Callable[[Path, list[str]], None]


def probe_of(path: Path, names: list[str]) -> None:
    size = len(names)
    curves: dict[str, Curve] = {name: ([0.5] * size, [0.1] * size) for name in names[:7]}
    draw_probe(path, names, curves, 0.1, "; ".join(names))


def map_of(path: Path, names: list[str]) -> None:
    draw_map(path, *points_of(len(names)), names, "; ".join(names), (names[0], names[-1]), (0.5, 0.2))


def matrix_of(path: Path, names: list[str]) -> None:
    draw_strategy_matrix(path, {(name, name): name for name in names}, (names[0], names[0]), "; ".join(names))


DRAWINGS: tuple[Draw, ...] = (probe_of, map_of, matrix_of)


@pytest.mark.sample(3)
@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("names", [HOSTILE[:5], HOSTILE[5:]])
def test_any_name_is_drawn(tmp_path: Path, draw: Draw, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path / "a.png", names)
    width, height = size_of(tmp_path / "a.png")
    assert width < 3500 and height < 2500


def test_names_are_drawn_literally(drawn: list[Figure]) -> None:
    map_of(Path("unused"), ["$x$", "_hidden", "a\x1b[31m", "x" * 255])
    texts = [text.replace(r"\$", "$") for text in texts_of(drawn[0])]
    for name in ("$x$", "_hidden", "a\ufffd[31m"):
        assert name in texts
    assert "x" * 19 + "…" + "x" * 19 in texts


@pytest.mark.parametrize("draw", DRAWINGS)
def test_the_same_plot_is_the_same_file(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png", ["a"])
    draw(tmp_path / "b.png", ["a"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError):
        draw(tmp_path / "a.png", ["a"])
    assert list(tmp_path.iterdir()) == []


ALONE = """
import sys
from pathlib import Path
import numpy as np
from finetune.plots.features import draw_map, draw_probe, draw_strategy_matrix
assert not {"matplotlib", "torch"} & set(sys.modules), "importing a drawing loads them"
import matplotlib
before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
path = Path(sys.argv[1])
draw_probe(path, ["a"], {"b": ([0.5], [0.1])}, 0.1, "t")
draw_map(path, np.random.rand(30, 2), list(range(30)), [str(n) for n in range(30)], "t", ("x", "y"))
draw_strategy_matrix(path, {("a", "b"): "c"}, ("a", "b"), "t")
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
assert before == (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)), "settings"
"""


@pytest.mark.slow
def test_plots_change_no_global_state_and_need_no_display(tmp_path: Path) -> None:
    environment: dict[str, Any] = {**os.environ, "MPLBACKEND": "tkagg"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "a.png")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
