"""The contact sheet shows the images of every kind of issue."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune.data.quality.sheet import MOST_TILES, find_sections
from finetune.plots.sheet import write_sections
from tests.data.quality.spoilt import build_clean, spoil
from tests.data.quality.test_report import look


def test_every_kind_has_its_section(tmp_path: Path) -> None:
    sections = find_sections(look(spoil(tmp_path / "data")))
    shown = {section.title: [tile.lines[-1] for tile in section.tiles] for section in sections}
    assert shown["The same image in two splits"] == ["001.jpg", "copy.jpg"]
    assert shown["The same image under two labels"] == ["003.jpg", "copy.jpg"]
    assert shown["Nearly the same image in two splits (pairs)"] == ["001.jpg", "smaller.jpg"]
    assert shown["Nearly the same image under two labels (pairs)"] == ["005.jpg", "near.jpg"]
    assert shown["Placeholders, and images unlike all others"][0] == "imageNotFound.gif"
    assert len(sections) == 11
    assert write_sections(tmp_path / "check.png", sections)
    with Image.open(tmp_path / "check.png") as sheet:
        assert sheet.format == "PNG" and sheet.width < sheet.height


def test_without_issues_there_is_no_sheet(tmp_path: Path) -> None:
    root = build_clean(tmp_path / "data", {"train/ants": 12, "train/bees": 12, "val/ants": 3, "val/bees": 3})
    assert not write_sections(tmp_path / "check.png", find_sections(look(root)))
    assert not (tmp_path / "check.png").exists()


def test_a_section_has_at_most_two_rows(tmp_path: Path) -> None:
    root = build_clean(tmp_path / "data", {"train/ants": 40, "train/bees": 40})
    for file in list((root / "train/ants").iterdir())[:30]:
        (root / "train/bees" / f"copy{file.name}").write_bytes(file.read_bytes())
    [section] = [one for one in find_sections(look(root)) if "two labels" in one.title]
    assert (section.total, len(section.tiles)) == (60, MOST_TILES)
