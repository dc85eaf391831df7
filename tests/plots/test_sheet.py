"""Contact sheets: every image is at its position, whatever its shape, and every name is drawn."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from finetune.data.thumbnail import load_thumbnail
from finetune.errors import DiskError
from finetune.plots.sheet import (
    CELL,
    GAP,
    LINE,
    QUERY,
    Grid,
    Section,
    Tile,
    draw_grid,
    draw_retrieval,
    draw_sections,
    fit_text,
    load_font,
    wrap_text,
    write_retrieval,
)

RED, GREEN, BLUE = (200, 30, 30), (30, 160, 30), (30, 30, 200)
LEFT = QUERY + 3 * GAP


def image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def pixel(sheet: Image.Image, x: float, y: float) -> Any:
    return sheet.getpixel((round(x), round(y)))


def middle_of(number: int, columns: int = 5) -> tuple[float, float]:
    """Return the expected centre of a hit's tile."""
    x = LEFT + number % columns * (CELL + GAP)
    y = GAP + number // columns * (CELL + 3 * LINE + GAP)
    return x + CELL / 2, y + CELL / 2


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of text that are drawn, in order."""
    lines: list[str] = []
    text = ImageDraw.ImageDraw.text

    def record(self: Any, xy: Any, line: str, *args: Any, **kwargs: Any) -> None:
        lines.append(line)
        text(self, xy, line, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return lines


def query_of(path: Path) -> Tile:
    return Tile(load_thumbnail(path, QUERY), ("query", path.name))


def hit_of(path: Path, *lines: str) -> Tile:
    return Tile(load_thumbnail(path, CELL), (*lines, path.name))


def test_every_image_is_at_its_position(tmp_path: Path) -> None:
    query = image(tmp_path / "q.png", RED)
    hits = [hit_of(image(tmp_path / f"{n}.png", (0, 20 * n, 100)), "a") for n in range(12)]
    sheet = draw_retrieval(query_of(query), hits)
    assert sheet.mode == "RGB"
    assert sheet.size == (LEFT + 5 * (CELL + GAP), GAP + 3 * (CELL + 3 * LINE + GAP))
    assert pixel(sheet, GAP + QUERY / 2, GAP + QUERY / 2) == RED
    for number in range(12):
        assert pixel(sheet, *middle_of(number)) == (0, 20 * number, 100)


def test_captions_are_drawn_in_order(tmp_path: Path, written: list[str]) -> None:
    query = image(tmp_path / "asked.png", RED)
    draw_retrieval(query_of(query), [hit_of(image(tmp_path / "one.png", RED), "1.  0.988", "ants")])
    assert written == ["query", "asked.png", "1.  0.988", "ants", "one.png"]


def test_sections_have_rows_of_tiles() -> None:
    tiles = [
        Tile(Image.new("RGB", (CELL, CELL), (30 * n, 100, 50)), ("one", "two", str(n))) for n in range(8)
    ]
    sheet = draw_sections([Section("first", 1, tiles[:1]), Section("second", 99, tiles[1:])])
    step = CELL + GAP
    first = 2 * LINE + CELL + 3 * LINE + GAP + GAP
    for number in range(7):
        x = GAP + number % 6 * step + CELL // 2
        y = GAP + first + 2 * LINE + number // 6 * (CELL + 3 * LINE + GAP) + CELL // 2
        assert sheet.getpixel((x, y)) == (30 * (number + 1), 100, 50)
    assert sheet.getpixel((GAP + CELL // 2, GAP + 2 * LINE + CELL // 2)) == (0, 100, 50)


@pytest.mark.parametrize("size", [(1, 1), (4, 2000), (2000, 4), (1000, 800), (32, 32)])
def test_images_of_any_shape_fit_their_tile(tmp_path: Path, size: tuple[int, int]) -> None:
    query = image(tmp_path / "q.png", GREEN, size)
    sheet = draw_retrieval(query_of(query), [hit_of(query)])
    green = Image.new("1", sheet.size)
    green.putdata([colour == GREEN for colour in sheet.get_flattened_data()])
    box = green.crop((LEFT, 0, sheet.width, sheet.height)).getbbox()
    assert box is not None
    width, height = box[2] - box[0], box[3] - box[1]
    assert max(width, height) == CELL
    assert abs(width / CELL - size[0] / max(size)) < 0.01 and abs(height / CELL - size[1] / max(size)) < 0.01
    x, y = middle_of(0)
    assert abs(LEFT + (box[0] + box[2]) / 2 - x) <= 1 and abs((box[1] + box[3]) / 2 - y) <= 1


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), RED)
    image.paste(BLUE, (30, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the right half belongs at the bottom
    image.save(tmp_path / "q.png", exif=exif)
    sheet = draw_retrieval(query_of(tmp_path / "q.png"), [])
    assert pixel(sheet, GAP + QUERY / 2, GAP + QUERY / 4) == RED
    assert pixel(sheet, GAP + QUERY / 2, GAP + 3 * QUERY / 4) == BLUE


def test_images_that_cannot_be_read_show_the_reason(tmp_path: Path, written: list[str]) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    good = image(tmp_path / "good.png", GREEN)
    hits = [hit_of(file) for file in (tmp_path / "gone.jpg", tmp_path / "text.jpg", good)]
    sheet = draw_retrieval(query_of(tmp_path / "gone.jpg"), hits)
    assert written.count("file not found") == 2
    assert 'not an image (starts with "hello")' in [line.replace("\n", " ") for line in written]
    assert pixel(sheet, *middle_of(2)) == GREEN


@pytest.mark.parametrize(("num", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (6, 5, 2), (100, 10, 10)])
def test_the_grid_grows_in_both_directions(tmp_path: Path, num: int, columns: int, rows: int) -> None:
    query = image(tmp_path / "q.png", RED, (4, 4))
    sheet = draw_retrieval(query_of(query), [hit_of(query)] * num)
    assert sheet.width == LEFT + columns * (CELL + GAP)
    assert sheet.height == GAP + max(QUERY + 2 * LINE + GAP, rows * (CELL + 3 * LINE + GAP))


NAMES = ["", "é名🦊", "a\nb\tc", "\x1b[31m", "שלום", "=cmd()", "W" * 200, "a" * 60 + ".jpg", "\u202eabc"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_shortened_to_fit(name: str) -> None:
    for width in (10, 60, CELL, QUERY):
        text = fit_text(name, width, load_font())
        assert load_font().getlength(text) <= max(width, load_font().getlength("..."))
        assert text.isprintable()
        if text != name and name.isprintable():
            start, end = text.split("...")
            assert name.startswith(start) and name.endswith(end)
            longer = name[: len(start) + 1] + "..." + name[len(name) - len(end) - 1 :]
            assert load_font().getlength(longer) > width, "more would have fitted"


def test_hostile_labels_are_drawn(tmp_path: Path) -> None:
    query = image(tmp_path / "q.png", RED, (4, 4))
    draw_retrieval(query_of(query), [hit_of(query, name) for name in NAMES])


def test_the_font_has_accents() -> None:
    """Pillow's own font draws the same box for each of them."""
    drawn = {bytes(load_font().getmask(letter)) for letter in "éüñßøčжλ"}
    assert len(drawn) == 8
    assert isinstance(load_font(), ImageFont.FreeTypeFont)


def test_a_sheet_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query = image(tmp_path / "q.png", RED)
    write_retrieval(tmp_path / "sheet.png", query_of(query), [hit_of(query)])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert pixel(sheet.convert("RGB"), *middle_of(0)) == RED
    before = (tmp_path / "sheet.png").read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError):
        write_retrieval(tmp_path / "sheet.png", query_of(query), [])
    assert (tmp_path / "sheet.png").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["q.png", "sheet.png"]


# --- a grid ---


def test_a_grid_has_each_tile_at_its_place_and_its_notes_at_the_foot() -> None:
    tiles = [
        [Tile(Image.new("RGB", (100, 100), RED), ("a", "b")), Tile(Image.new("RGB", (100, 50), GREEN), ())],
        [Tile("a reason", ("c",)), Tile(Image.new("RGB", (100, 100), BLUE), ())],
    ]
    plain = draw_grid(Grid("title", tiles, side=100))
    noted = draw_grid(Grid("title", tiles, ("left", "right"), ("a note " * 40, "another"), side=100))
    top, step = GAP + 2 * LINE, 100 + 2 * LINE + GAP
    assert pixel(plain, GAP + 50, top + 50) == RED
    assert pixel(plain, GAP + 100 + GAP + 50, top + 50) == GREEN
    assert pixel(plain, GAP + 100 + GAP + 50, top + step + 50) == BLUE
    assert pixel(noted, GAP + 50, top + LINE + 50) == RED, "below the headings"
    assert noted.height >= plain.height + LINE + 3 * LINE, "headings, a note of two lines, another note"
    below = np.asarray(noted)[-GAP - 3 * LINE :].min()
    assert below < 100, "the notes are drawn"


def test_a_note_is_broken_between_words() -> None:
    font = load_font()
    lines = wrap_text("one two three " * 20, 200, font)
    assert len(lines) > 3 and all(font.getlength(line) <= 200 for line in lines)
    assert " ".join(lines).split() == ["one", "two", "three"] * 20
    assert wrap_text("", 200, font) == []
    assert (
        len(wrap_text("x" * 400, 200, font)) == 1
        and font.getlength(wrap_text("x" * 400, 200, font)[0]) <= 200
    )
