"""``finetune audit`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from tests.conftest import Cli, FinishedRun, draw_folder

WORDS = ("--device", "cpu", "--workers", 0)


def draw_grey(root: Path, framed: bool) -> Path:
    """Noise that tells nothing; JPEG quality and, in half of the image sets, a frame tell the class."""
    for label in range(2):
        for number in range(20):
            rng = np.random.default_rng([label, number])
            pixels = rng.integers(60, 200, (48, 48, 3), dtype=np.uint8)
            if framed:
                pixels[:4] = pixels[-4:] = pixels[:, :4] = pixels[:, -4:] = (
                    255 * label,
                    0,
                    255 - 255 * label,
                )
            path = root / "ab"[label] / f"{int(rng.integers(10**6))}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=70 + 20 * label)
    return root


def test_planted_shortcuts_are_found_with_pictures(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_grey(tmp_path / "data", framed=True)
    words = ("-b", tiny, "-d", data, "--set", "data.val_fraction=0.1", *WORDS)
    result = cli("audit", *words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    said = json.loads((tmp_path / "out/audit.json").read_text())
    assert {"border", "quality"} <= set(said["alarms"]) and not {"aspect", "order"} & set(said["alarms"])
    assert "same for all" in said["untested"]["size"] and said["background"] is None
    shares = [one["share_of_whole_image"] for one in said["tests"] if one["alarm"]]
    assert shares == sorted(shares, reverse=True)
    assert said["independence"]["num_images"] == 36
    assert Image.open(tmp_path / "out/audit.png").width > 500
    assert "ALARM  how the file was saved" in result.stdout and "the lowest quality" in result.stdout


@pytest.mark.slow
def test_a_run_is_audited_with_its_predictions(
    cli: Cli, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.shortcuts.audit.FEWEST_GROUPS", 4)  # to a tiny network, noise looks alike
    result = cli("audit", finished_run("freeze"), "-o", tmp_path / "out", *WORDS, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["background"]["tested"] and said["background"]["split"] == "val"
    assert said["background"]["num_images"] == 18
    assert any(one["name"] == "background" for one in said["tests"])


@pytest.mark.slow
def test_the_function_returns_what_the_command_prints(tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    display = finetune.SilentDisplay()
    found = finetune.audit(data=image_folder, backbone=str(tiny), output=tmp_path / "out", display=display)
    assert found.to_dict() == json.loads((tmp_path / "out/audit.json").read_text())
    assert "brightness" in {one.name for one in found.alarms}  # of the colours


def test_invalid_audits_are_refused(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    def refuse(*words: object) -> tuple[int, str]:
        result = cli("audit", *words, "-o", tmp_path / "out", *WORDS)
        assert not (tmp_path / "out").exists()
        return result.exit_code, result.stderr

    code, said = refuse(image_folder)
    assert code == 2 and "not the folder of a run" in said and "--data" in said
    code, said = refuse(image_folder, "-d", image_folder)
    assert code == 2 and "a run was named as well" in said
    code, said = refuse()
    assert code == 2 and "no images were named" in said
    few = draw_folder(tmp_path / "few", {"red": 12, "blue": 5})
    code, said = refuse("-b", tiny, "-d", few)
    assert code == 65 and "class 'blue' has 4 training images" in said
