"""Whatever bytes and names come in: a data set whose every path lies in it, an RGB image, or a refusal.

Thousands of cases, the same ones on every machine (``derandomize``). What they found once has a plain test
of its own, in ``tests/data``.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.channels.depth import find_range
from finetune.data.dataset import Dataset
from finetune.data.decode import BadImageError, decode_image, probe_image
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.errors import DataError
from tests.data.images import WRITTEN, encoded, noise, palette


def outcome(data: Path) -> Dataset | None:
    """The data set, held to its promises, or None for a refusal of some lines that any terminal shows."""
    try:
        dataset = discover(data, SplitConfig(0.25, 0))
    except DataError as error:
        assert error.asked.startswith("--data ") and error.fix.strip()
        assert len(str(error)) < 5000
        str(error).encode()
        return None
    top = Path(os.path.realpath(dataset.root))
    for sample in dataset.samples:
        assert Path(os.path.realpath(dataset.file(sample))).is_relative_to(top), sample
        assert ".." not in sample.path.split("/") and not sample.path.startswith("/")
        assert 0 <= sample.label < dataset.num_classes
    assert len({sample.path for sample in dataset.samples}) == len(dataset.samples)
    assert dataset.classes == tuple(sorted(set(dataset.classes)))
    str(dataset.warnings).encode()
    return dataset


# Tables


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few images, links to the world outside, and room for ``labels.csv``."""
    root = tmp_path_factory.mktemp("table")
    for name in ("a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg", "-1.jpg", "=x.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root.parent / "secret.jpg").touch()
    (root / "out.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("sub")
    (root / "loop").symlink_to("loop")
    return root / "labels.csv"


PATHS = st.sampled_from(
    ["a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg", "-1.jpg", "=x.jpg", "./a.jpg", "sub/../b.jpg", "in/c.jpg"]
)
ODD_PATHS = st.sampled_from(
    [
        "../secret.jpg", "up/secret.jpg", "out.jpg", "up", "/etc/passwd", "in/../../secret.jpg", "loop",
        "loop/x", "a.jpg/", "a.jpg/b", "sub", ".", "..", "", " ", "a.jpg\0", "~/a.jpg", "A.JPG", "a" * 300,
        "a/" * 3000, "file:///etc/passwd", "%2e%2e/secret.jpg", "\\\\host\\x", "sub\\c.jpg", "C:\\a.jpg",
        "\u202eb.jpg",
    ]
)  # fmt: skip
LABELS = st.sampled_from(["x", "y", "NA", "007", "1e5", "=cmd()", "@x", "caf\u00e9", "cafe\u0301"])
ODD_LABELS = st.sampled_from(["", " ", "..", "a/b", "a\\b", "x\0", "x\ny", "\u2028", "l" * 300, "\ufeff"])
SPLITS = st.sampled_from(["train", "val", "test", "VALID", " train "])
TEXT = st.text(max_size=12)
MARKS = st.sampled_from([*",\"';\t|\r\n\0\ufeff=+-@", "\r\n", '""', '"\n"', "x" * 70_000, "," * 500])


def quote(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def often(usual: st.SearchStrategy[str], odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """The usual five times of six: a table is refused for a single odd cell."""
    return st.integers(0, 5).flatmap(lambda number: odd if number == 0 else usual)


CELLS = (often(PATHS, ODD_PATHS | TEXT), often(LABELS, ODD_LABELS | TEXT), often(SPLITS, TEXT))
SOUND = [
    ("a.jpg", "x", "train"),
    ("b.jpg", "x", "train"),
    ("in/c.jpg", "y", "train"),
    ("sub/d.jpg", "y", "train"),
]
ROWS = st.one_of(
    st.lists(st.tuples(*CELLS), min_size=1, max_size=7),
    st.lists(st.tuples(st.sampled_from(["-1.jpg", "=x.jpg", "sub/c.jpg"]), *CELLS[1:]), max_size=2).map(
        lambda rows: SOUND + rows
    ),
    st.lists(st.tuples(*CELLS), max_size=1).map(lambda rows: SOUND + rows),
)
SPELLINGS = st.sampled_from([",".join, lambda cells: ",".join(map(quote, cells)), ", ".join])
HEADER = often(
    st.sampled_from(
        ["path,label,split", "\ufeffpath,label,split", '"path","label","split"', "path, label, split"]
    ),
    st.sampled_from(["label,path,split", "path,label", "path;label", "path,path,label", "", ","]) | TEXT,
)
LINES = st.builds(
    lambda head, rows, spell, end: end.join([head, *map(spell, rows)]).encode("utf-8", "surrogatepass"),
    HEADER,
    ROWS,
    SPELLINGS,
    st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
)
SPLICE = st.tuples(st.floats(0, 1), MARKS.map(str.encode) | st.binary(max_size=6))


def spliced(data: bytes, splices: list[tuple[float, bytes]]) -> bytes:
    for share, mark in splices:
        place = int(share * len(data))
        data = data[:place] + mark + data[place:]
    return data


TABLES = st.one_of(
    LINES,
    st.builds(spliced, LINES, st.lists(SPLICE, min_size=1, max_size=3)),
    st.builds(lambda data: b"path,label\n" + data, st.binary(max_size=80)),
    st.binary(max_size=80),
)

seen: dict[str, int] = {}


def note(kind: str) -> None:
    seen[kind] = seen.get(kind, 0) + 1


def assert_both_sides(kind: str) -> None:
    """Enough of the cases were read, and enough were refused."""
    cases = settings.default.max_examples  # type: ignore[attr-defined]
    share = 0.05 if cases >= 1000 else 0.01  # hypothesis begins with simple cases, and few of them are read
    assert seen[f"{kind} read"] > share * cases and seen[f"{kind} refused"] > 0.25 * cases, seen


@given(data=TABLES)
def fuzz_tables(table: Path, data: bytes) -> None:
    table.write_bytes(data)
    note("table read" if outcome(table) else "table refused")


@pytest.mark.slow
def test_tables(table: Path) -> None:
    seen.clear()
    fuzz_tables(table)
    assert_both_sides("table")


# Images


def kinds() -> list[bytes]:
    whole = [encoded(noise(24, 16), kind) for kind in WRITTEN]
    whole += [
        encoded(noise(24, 16), "JPEG", progressive=True),
        encoded(noise(24, 16, "CMYK"), "JPEG"),
        encoded(noise(24, 16, "L"), "JPEG"),
        encoded(palette((9, 9)), "PNG", transparency=bytes([0, 9])),
        encoded(noise(24, 16, "RGBA"), "PNG"),
        encoded(palette((9, 9)), "GIF", save_all=True, append_images=[palette((9, 9))]),
        encoded(noise(24, 16), "WEBP", lossless=True),
        encoded(noise(24, 16).convert("F"), "TIFF"),
        encoded(noise(24, 16), "TIFF", compression="tiff_lzw"),
        encoded(noise(24, 16), "TIFF", compression="jpeg"),
    ]
    return whole


PLACE = st.floats(0, 1, exclude_max=True)
MUTATIONS: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "flip": lambda data, a, b, new: data[:a] + bytes([data[a] ^ (1 << b % 8)]) + data[a + 1 :],
    "set": lambda data, a, b, new: data[:a] + new + data[a + len(new) :],
    "cut": lambda data, a, b, new: data[:a],
    "drop": lambda data, a, b, new: data[: min(a, b)] + data[max(a, b) :],
    "insert": lambda data, a, b, new: data[:a] + new + data[a:],
    "double": lambda data, a, b, new: data[: max(a, b)] + data[min(a, b) :],
}
EDGES = [struct.pack(code, value) for code in ("<H", ">H", "<I", ">I") for value in (0, 1, 0x7FFF, 0xFFFF)]
MUTATION = st.tuples(
    st.sampled_from(sorted(MUTATIONS)),
    PLACE,
    PLACE,
    st.sampled_from(EDGES) | st.binary(min_size=1, max_size=4),
)


def mutated(data: bytes, mutations: list[tuple[str, float, float, bytes]], near_start: bool) -> bytes:
    for kind, first, second, new in mutations:
        reach = min(len(data), 200) if near_start else len(data)  # the headers are where the parsers branch
        if reach:
            data = MUTATIONS[kind](data, int(first * reach), int(second * reach), new)
    return data


PICTURES = st.builds(
    mutated, st.sampled_from(kinds()), st.lists(MUTATION, min_size=1, max_size=5), st.booleans()
)


def read(reader: Callable[[Path], Any], path: Path) -> Any:
    """What a reader gave, or the short reason it refused with."""
    try:
        return reader(path)
    except BadImageError as error:
        assert error.reason and "\n" not in error.reason and len(error.reason) < 200
        return error


@given(data=PICTURES)
def fuzz_images(folder: Path, data: bytes) -> None:
    path = folder / "x.jpg"
    path.write_bytes(data)
    probed = read(probe_image, path)
    values = None if isinstance(probed, BadImageError) else probed.values
    measured = None if values is None else find_range([values])  # as training measures it
    image = read(partial(decode_image, value_range=measured), path)
    if not isinstance(image, BadImageError):
        assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height
    assert isinstance(image, BadImageError) == isinstance(probed, BadImageError), (image, probed)
    note("image refused" if isinstance(image, BadImageError) else "image read")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_images(tmp_path: Path) -> None:
    seen.clear()
    fuzz_images(tmp_path)
    assert_both_sides("image")


# Names of folders and files

ANY_NAME = (
    st.binary(min_size=1, max_size=12)
    | st.text(min_size=1, max_size=8).map(lambda text: text.encode("utf-8", "replace"))
    | st.sampled_from(["=cmd()", "<script>", "a\nb", "\x1b[31m", "..", ".x", "__MACOSX", "Thumbs.db"]).map(
        str.encode
    )
    | st.sampled_from(["\u202egpj", "caf\u00e9", "cafe\u0301", "CON", "a\\b", " ", "n" * 255]).map(str.encode)
).map(lambda name: name.replace(b"/", b"").replace(b"\0", b"") or b"_")
FOLDER = st.sampled_from([b"ant", b"bee", b"Ant", b"train", b"val", b"Valid", b"test"]) | ANY_NAME
FILE = st.builds(
    lambda stem, end: stem[:200] + end, ANY_NAME, st.sampled_from([b".jpg", b".PNG", b".heic", b""])
)
LINK = st.sampled_from(["", "", "", "", "..", "/etc/passwd", "ant", ".", "nowhere", "../.."])
PLACES = st.tuples(st.lists(FOLDER, max_size=3), FILE, LINK)
TAME = st.tuples(st.sampled_from([[b"ant"], [b"bee"], [b"bee", b"deep"]]), FILE, st.just(""))
ANTS = [([name], file, "") for name in (b"ant", b"bee") for file in (b"0.jpg", b"1.jpg")]
TREES = st.one_of(
    st.lists(PLACES, max_size=5),
    st.lists(PLACES, max_size=2).map(lambda more: ANTS + more),
    st.lists(TAME, max_size=3).map(lambda more: ANTS + more),
)


def plant(root: Path, places: list[tuple[list[bytes], bytes, str]]) -> None:
    """Make files and links below a folder; what cannot be made is left out."""
    for folders, name, target in places:
        folder = root.joinpath(*(os.fsdecode(name) for name in folders if name != b".."))
        path = folder / os.fsdecode(name)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if target:
                path.symlink_to(target)
            else:
                path.touch(exist_ok=False)


@given(places=TREES)
def fuzz_names(root: Path, places: list[tuple[list[bytes], bytes, str]]) -> None:
    plant(root, places)
    note("tree read" if outcome(root) else "tree refused")
    shutil.rmtree(root)
    root.mkdir()


def test_names(tmp_path: Path) -> None:
    seen.clear()
    (tmp_path / "x").mkdir()
    fuzz_names(tmp_path / "x")
    assert_both_sides("tree")
