from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runs.files import read_rows
from tests.conftest import Cli, FinishedRun


@pytest.fixture
def trained(finished_run: FinishedRun) -> Path:
    return finished_run("freeze")


def test_a_runs_predictions_are_repeated(cli: Cli, trained: Path, image_folder: Path, tmp_path: Path) -> None:
    """On validation images, from run folder and model folder: labels, probabilities, the temperature."""
    own = {row["path"]: row for row in read_rows(trained / "predictions.csv")}
    for number, model in enumerate((trained, trained / "model", f"local-dir:{trained}/model")):
        result = cli("predict", model, image_folder / "val", "--output", tmp_path / f"{number}.csv", "--json")
        assert result.exit_code == 0, result.output
        done = json.loads(result.stdout)
        assert (done["num_images"], done["num_bad"], done["state"]) == (18, 0, "done")
        rows = read_rows(tmp_path / f"{number}.csv")
        assert {f"val/{row['path']}" for row in rows} == own.keys()
        for row in rows:
            before = own[f"val/{row['path']}"]
            assert row["label"] == before["predicted"]
            for name in ("confidence", "prob_blue", "prob_green", "prob_red"):
                assert float(row[name]) == pytest.approx(float(before[name]), abs=1e-4)


def test_the_python_api_gives_the_same_predictions(
    cli: Cli, trained: Path, image_folder: Path, tmp_path: Path
) -> None:
    import finetune

    image = image_folder / "val" / "red" / "003.jpg"
    assert cli("predict", trained, image, "-o", tmp_path / "one.jsonl").exit_code == 0
    row = json.loads((tmp_path / "one.jsonl").read_text())
    one = finetune.load(trained).predict(image)
    assert (row["path"], row["label"]) == (str(image), one.label)
    assert row["confidence"] == pytest.approx(one.confidence, abs=1e-6)


def test_bad_images_warn_and_none_is_an_error(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder / "val" / "red", tmp_path / "photos")
    (tmp_path / "photos" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    result = cli("predict", tiny, tmp_path / "photos", "--output", tmp_path / "out.csv", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["bad_images"] == str(tmp_path / "out.csv.bad.csv")
    assert "1 image has no row" in result.stderr
    result = cli("predict", tiny, tmp_path / "photos" / "cut.jpg", "--output", tmp_path / "no.csv", "--json")
    assert result.exit_code == 65
    assert json.loads(result.stdout)["exit_code"] == 65


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nothing_like_it", "{photos}", "-o", "{out}"], 2, "nothing_like_it"),
        (["{tiny}", "{photos}", "-o", "{out}", "--crops", "3"], 2, "--crops 3"),
        (["{tiny}", "{photos}", "-o", "{out}", "--top", "0"], 2, "--top"),
        (["{tiny}", "{photos}", "-o", "{out}", "--reject-below", "1.5"], 2, "--reject-below"),
        (["{tiny}", "{photos}", "-o", "{out}", "--device", "tpu"], 2, "--device tpu"),
        (["{tiny}", "{photos}", "-o", "{photos}/out.csv"], 2, "among the images"),
        (["{tiny}", "{photos}/none", "-o", "{out}"], 65, "no such file"),
        (["{tiny}", "{photos}"], 2, "--output"),
        (["{tiny}", "{photos}", "-o", ""], 2, "names no file"),
    ],
)
def test_refusals(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    places = {"tiny": tiny, "photos": image_folder / "val", "out": tmp_path / "out.csv"}
    result = cli("predict", *(word.format(**places) for word in words))
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_paths_from_standard_input(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from finetune.cli.app import app

    paths = sorted(str(path) for path in (image_folder / "val").rglob("*.jpg"))
    for flag, end in (([], "\n"), (["-0"], "\0")):
        output = tmp_path / f"out{len(flag)}.csv"
        words = ["predict", str(tiny), "-", "-o", str(output), *flag]
        result = CliRunner().invoke(app, words, input="".join(f"{path}{end}" for path in paths))
        assert result.exit_code == 0, result.output
        assert [row["path"] for row in read_rows(output)] == paths


@pytest.mark.slow
def test_a_closed_standard_input_matters_only_if_it_is_the_input(
    tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    for words, code, said in (
        (image_folder / "val", 0, "18 images"),
        ("-", 2, "standard input: it is closed"),
    ):
        line = f'exec "$0" -m finetune predict "{tiny}" "{words}" -o "{tmp_path}/out{code}.csv" <&-'
        found = subprocess.run(
            ["sh", "-c", line, sys.executable], capture_output=True, text=True, check=False
        )
        assert found.returncode == code, found.stderr
        assert said in found.stderr
