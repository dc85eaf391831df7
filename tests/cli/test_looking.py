"""``finetune probe``, ``similar`` and ``map`` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.conftest import Cli, draw_folder

WORDS = ("--device", "cpu", "--workers", 0)


@pytest.mark.slow
def test_a_probe_of_every_layer(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    words = ("--per-class", 8, "--repeats", 3, "--classifiers", "softmax,knn,svm,logreg")
    result = cli("probe", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *words, *WORDS)
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv(tmp_path / "out/probe.csv")
    assert set(table["classifier"]) == {"softmax", "knn", "svm", "logreg"}
    assert len(table) == 4 * table["layer"].nunique() and table["layer"].iloc[-1] == "layer4"
    assert table["mean_accuracy"].between(1 / 3, 1).all() and (table["std_accuracy"] >= 0).all()
    assert table["depth"].is_monotonic_increasing
    assert (table[table["classifier"] == "knn"]["regularisation"].isna()).all()
    assert Image.open(tmp_path / "out/probe.png").size[0] > 500
    assert "softmax" in result.stdout and "layer4" in result.stdout


@pytest.mark.slow
def test_a_probe_is_the_same_twice(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    words = ("-l", "layer4", "--per-class", 5, "--repeats", 2, "--json", *WORDS)
    given = [
        json.loads(cli("probe", "-b", tiny, "-d", image_folder, "-o", tmp_path / name, *words).stdout)
        for name in ("one", "two")
    ]
    assert given[0] == given[1]
    other = cli("probe", "-b", tiny, "-d", image_folder, "-o", tmp_path / "three", *words, "--seed", 1)
    assert json.loads(other.stdout) != given[0]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--per-class", 18), 65, "one must be left for testing"),
        (("--per-class", 40), 65, "Use --per-class 17 or fewer"),
        (("--per-class", 5, "--classifiers", "svn"), 2, "did you mean 'svm'"),
        (("--per-class", 5, "-l", "layr4"), 2, "did you mean 'layer4'"),
    ],
)
def test_invalid_probes_are_refused(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[object, ...], code: int, said: str
) -> None:
    result = cli("probe", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *words, *WORDS)
    assert result.exit_code == code and said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_the_most_similar_images_are_of_the_same_colour(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    query = image_folder / "val/red/003.jpg"
    words = ("--layer", "layer1", "--top", 6, "--json", *WORDS)
    result = cli("similar", query, "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["rank"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert {row["label"] for row in found} == {"red"}
    assert "val/red/003.jpg" not in {row["path"] for row in found}  # the query itself
    cosines = [row["similarity"] for row in found]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] <= 1 + 1e-6
    table = pd.read_csv(tmp_path / "out/similar.csv")
    assert list(table["path"]) == [row["path"] for row in found]
    assert Image.open(tmp_path / "out/similar.png").size[0] > 300


def test_a_copy_of_the_query_is_found_first(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    shutil.copy(image_folder / "train/blue/009.jpg", tmp_path / "query.jpg")
    words = ("-l", "layer4", "--top", 1, "--json", *WORDS)
    result = cli(
        "similar", tmp_path / "query.jpg", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *words
    )
    [found] = json.loads(result.stdout)
    assert found["path"] == "train/blue/009.jpg" and found["similarity"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_invalid_queries_are_refused(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"nothing")
    for name in ("no.jpg", "missing.jpg"):
        result = cli(
            "similar", tmp_path / name, "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *WORDS
        )
        assert result.exit_code == 65 and name in result.stderr, result.stderr
    result = cli(
        "similar", image_folder / "val/red/003.jpg", "-b", tiny, "-d", image_folder, "-l", "layer*", *WORDS
    )
    assert result.exit_code == 2 and "it matches 4 layers" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_map_has_a_point_for_each_image(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, labelled: bool
) -> None:
    data = image_folder if labelled else draw_folder(tmp_path / "data", {"red": 5})
    result = cli("map", "-b", tiny, "-d", data, "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv(tmp_path / "out/map.csv")
    assert len(table) == (54 if labelled else 5) and not table[["x", "y"]].isna().any().any()
    assert Image.open(tmp_path / "out/map.png").size[0] > 500


def test_existing_results_are_not_overwritten(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    result = cli("map", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 2 and "not empty" in result.stderr
    assert "umap" in cli("map", "-b", tiny, "-d", image_folder, "--method", "tsne").stderr
