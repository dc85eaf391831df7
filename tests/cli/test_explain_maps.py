"""``finetune explain cam``, ``saliency`` and ``localise`` from the command line and from Python."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.errors import DataError, UsageError
from finetune.system.display import SilentDisplay
from tests.conftest import Cli, FinishedRun

SIZE = ("--img-size", 64, "--device", "cpu")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_folder(output: Path, record: dict[str, object], images: list[Path]) -> None:
    """The four files agree with each other."""
    assert {path.name for path in output.iterdir()} == {
        "explain.json",
        "heat-maps.csv",
        "heat-maps.npz",
        "heat-maps.png",
    }
    written = json.loads((output / "explain.json").read_text("utf-8"))
    assert {"output": str(output), **written} == record
    table = rows(output / "heat-maps.csv")
    assert [row["path"] for row in table] == [str(image) for image in images]
    assert all(0 <= float(row["probability"]) <= 1 for row in table)
    with np.load(output / "heat-maps.npz") as arrays:
        assert list(arrays["paths"]) == [row["path"] for row in table]
        assert arrays["maps"].shape[0] == len(images) and arrays["maps"].dtype == np.float32
        assert arrays["maps"].min() >= 0 and arrays["maps"].max() <= 1
    assert set(written["checks"]) == {"randomisation", "deletion"}
    assert written["num_shown"] == sum(not row["not_shown"] for row in table)
    assert Image.open(output / "heat-maps.png").size[0] > 500
    assert set(written["versions"]) == {"finetune", "torch", "torchvision", "timm"}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("words", "method"),
    [
        (("cam",), "grad-cam"),
        (("cam", "--method", "layer-cam", "--layer", "layer3", "--class", "4"), "layer-cam"),
        (("saliency",), "gradient"),
        (("saliency", "--method", "integrated", "--class", "2"), "integrated"),
    ],
)
def test_maps_of_images(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...], method: str
) -> None:
    images = sorted((image_folder / "val").rglob("*.jpg"))[:4]
    name, *more = words
    result = cli("explain", name, tiny, *images, "-o", tmp_path / "out", *more, *SIZE, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["method"] == method
    assert record["class"] == (more[more.index("--class") + 1] if "--class" in more else None)
    if "--layer" in more:
        assert record["layer"] == "layer3" and min(record["layer_size"]) > 1
    check_folder(tmp_path / "out", record, images)


@pytest.mark.slow
def test_a_run_is_explained_with_its_own_classes(
    finished_run: FinishedRun, image_folder: Path, tmp_path: Path
) -> None:
    """From Python; the images are those of a data set, whose paths are relative to it."""
    run = finished_run("freeze")
    record = finetune.explain_cam(
        run, data=str(image_folder), output=tmp_path / "out", class_name="red", display=SilentDisplay()
    )
    table = rows(tmp_path / "out/heat-maps.csv")
    assert record["num_images"] == len(table) == 54
    assert {row["class"] for row in table} == {"red"} and "val/red/000.jpg" in {row["path"] for row in table}
    red = [float(row["probability"]) for row in table if "/red/" in row["path"]]
    other = [float(row["probability"]) for row in table if "/red/" not in row["path"]]
    assert np.mean(red) > np.mean(other)


def test_what_cannot_be_read_is_listed_and_the_others_go_on(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    good, bad, missing = image_folder / "val/red/000.jpg", tmp_path / "broken.jpg", tmp_path / "list.csv"
    bad.write_bytes(good.read_bytes()[:200])
    missing.write_text("path\nnowhere.jpg\n", encoding="utf-8")
    words = ("explain", "cam", tiny, bad, good, missing, "-o", tmp_path / "out", *SIZE, "--json")
    result = cli(*words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_bad"] == 2
    assert [row["path"] for row in rows(tmp_path / "out/bad_images.csv")] == [str(bad), "nowhere.jpg"]
    assert "cannot be read" in result.stderr
    result = cli("explain", "saliency", tiny, bad, "-o", tmp_path / "none", *SIZE)
    assert result.exit_code == 65 and "none of 1 image can be read" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("cam", "--layer", "layr3"), 2, "did you mean 'layer3'"),
        (("cam", "--layer", "pre_logits"), 2, "it is no map"),
        (("cam", "--method", "gradcam"), 2, "did you mean 'grad-cam'"),
        (("cam", "--class", "eleven"), 2, "the model has no such class"),
        (("cam", "--class", "10"), 2, "Take 0, 1, 2"),
        (("saliency", "--method", "smooth"), 2, "did you mean 'smoothgrad'"),
        (("localise", "--boxes", "nowhere.csv"), 65, "there is no such file"),
    ],
)
def test_mistakes_are_refused(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    name, *more = words
    image = image_folder / "val/red/000.jpg"
    result = cli("explain", name, tiny, image, "-o", tmp_path / "out", *more, *SIZE)
    assert result.exit_code == code and said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in result.stderr


@pytest.mark.slow
def test_images_and_model_must_be_named(tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    quiet = SilentDisplay()
    with pytest.raises(UsageError, match="no images were named"):
        finetune.explain_cam(tiny, output=tmp_path / "out", display=quiet)
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        finetune.explain_cam("resnet81", image_folder, output=tmp_path / "out", display=quiet)
    with pytest.raises(UsageError, match="named already"):
        finetune.explain_cam(tiny, image_folder, output=tmp_path / "out", backbone="x", display=quiet)
    with pytest.raises(DataError, match="no such file"):
        finetune.explain_cam(tiny, "nowhere.jpg", output=tmp_path / "out", display=quiet)
    with pytest.raises(UsageError, match="lies among the images"):
        finetune.explain_cam(tiny, image_folder, output=image_folder / "out", display=quiet)


def test_output_that_exists_is_kept(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    result = cli(
        "explain", "cam", tiny, image_folder / "val/red/000.jpg", "-o", tmp_path / "out", "--device", "cpu"
    )
    assert result.exit_code == 2 and "not empty" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


# --- boxes ---


@pytest.mark.slow
def test_boxes_are_compared_with_given_ones(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    """One given box is the found one; another lies elsewhere. The checks of random weights may speak against
    a map: then the image has no box, and counts as a miss."""
    images = sorted((image_folder / "val").rglob("*.jpg"))[:6]
    words = ("explain", "localise", tiny, *images, *SIZE, "--json")
    first = cli(*words, "-o", tmp_path / "one")
    assert first.exit_code == 0, first.stderr
    found = rows(tmp_path / "one/boxes.csv")
    assert len(found) == 6 and all(row["iou"] == "" for row in found)
    for row in found:
        assert bool(row["no_box"]) is (row["x0"] == "")
        if row["x0"]:
            x0, y0, x1, y1 = (float(row[name]) for name in ("x0", "y0", "x1", "y1"))
            assert 0 <= x0 < x1 <= 40 and 0 <= y0 < y1 <= 36  # in pixels of the image, not of the view
    given = tmp_path / "given.csv"
    lines = [f"{row['path']},{row['x0']},{row['y0']},{row['x1']},{row['y1']}" for row in found if row["x0"]]
    lines = lines or [f"{found[0]['path']},1,1,9,9"]
    given.write_text("\n".join(["path,x0,y0,x1,y1", *lines]) + "\n", encoding="utf-8")
    again = cli(*words, "--boxes", given, "-o", tmp_path / "two")
    assert again.exit_code == 0, again.stderr
    share = json.loads(again.stdout)["share_over_half"]
    assert share["num_images"] == len(lines)
    assert share["value"] == (1 if found[0]["x0"] or len(lines) > 1 else 0)
    assert Image.open(tmp_path / "two/boxes.png").size[0] > 500


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("path,x0,y0,x1\na.jpg,1,2,3", "x1, y1|y1"),
        ("path,x0,y0,x1,y1\na.jpg,1,2,3,2", "line 2 holds no box"),
        ("path,x0,y0,x1,y1\na.jpg,1,2,3,x", "line 2 holds no box"),
        ("path,x0,y0,x1,y1\na.jpg,1,2,3,4", "none of its paths is one of the images"),
    ],
)
def test_boxes_that_are_none_are_refused(
    tiny: Path, image_folder: Path, tmp_path: Path, lines: str, said: str
) -> None:
    given = tmp_path / "boxes.csv"
    given.write_text(lines + "\n", encoding="utf-8")
    image = image_folder / "val/red/000.jpg"
    with pytest.raises(DataError, match=said):
        finetune.explain_localise(tiny, image, output=tmp_path / "out", boxes=given, display=SilentDisplay())
    assert not (tmp_path / "out").exists()
