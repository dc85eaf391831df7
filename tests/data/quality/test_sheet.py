"""The sheet of the worst cases shows them, whatever they are."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune.data.quality.sheet import (
    MOST_TILES,
    Section,
    Tile,
    draw_sections,
    find_sections,
    write_sections,
)
from finetune.preflight.tiles import CELL, GAP, LINE
from tests.data.quality.spoilt import build_clean, spoil
from tests.data.quality.test_report import look


def test_every_kind_has_its_section(tmp_path: Path) -> None:
    sections = find_sections(look(spoil(tmp_path / "data")))
    shown = {section.title: [tile.file.name for tile in section.tiles] for section in sections}
    assert shown["The same image in two parts"] == ["001.jpg", "copy.jpg"]
    assert shown["The same image under two labels"] == ["003.jpg", "copy.jpg"]
    assert shown["Nearly the same image in two parts (pairs)"] == ["001.jpg", "smaller.jpg"]
    assert shown["Nearly the same image under two labels (pairs)"] == ["005.jpg", "near.jpg"]
    assert shown["Placeholders, and unlike all others"][0] == "imageNotFound.gif"
    assert len(sections) == 11
    assert write_sections(tmp_path / "check.png", sections)
    with Image.open(tmp_path / "check.png") as sheet:
        assert sheet.format == "PNG" and sheet.width < sheet.height


def test_nothing_to_show_is_no_sheet(tmp_path: Path) -> None:
    root = build_clean(tmp_path / "data", {"train/ants": 12, "train/bees": 12, "val/ants": 3, "val/bees": 3})
    assert not write_sections(tmp_path / "check.png", find_sections(look(root)))
    assert not (tmp_path / "check.png").exists()


def test_tiles_are_in_their_places(tmp_path: Path) -> None:
    files = []
    for number in range(8):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20, 20), (30 * number, 100, 50)).save(files[-1])
    tiles = [Tile(file, ("one", "two", file.name)) for file in files]
    sheet = draw_sections([Section("first", 1, tiles[:1]), Section("second", 99, tiles[1:])])
    step = CELL + GAP
    first = 2 * LINE + CELL + 3 * LINE + GAP + GAP
    for place in range(7):
        x = GAP + place % 6 * step + CELL // 2
        y = GAP + first + 2 * LINE + place // 6 * (CELL + 3 * LINE + GAP) + CELL // 2
        assert sheet.getpixel((x, y)) == (30 * (place + 1), 100, 50)
    assert sheet.getpixel((GAP + CELL // 2, GAP + 2 * LINE + CELL // 2)) == (0, 100, 50)


def test_many_are_cut_to_two_rows(tmp_path: Path) -> None:
    root = build_clean(tmp_path / "data", {"train/ants": 40, "train/bees": 40})
    for file in list((root / "train/ants").iterdir())[:30]:
        (root / "train/bees" / f"copy{file.name}").write_bytes(file.read_bytes())
    [section] = [one for one in find_sections(look(root)) if "two labels" in one.title]
    assert (section.total, len(section.tiles)) == (60, MOST_TILES)
