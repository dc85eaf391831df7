from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import finetune
from finetune.errors import DataError, FinetuneError, UsageError
from finetune.evaluation.predict_files import PredictRequest, predict_files
from finetune.evaluation.prediction_rows import PredictionProgress
from finetune.runs import resumable_writer
from finetune.runs.files import read_rows
from finetune.runs.journal import read_journal
from finetune.system.display import SilentDisplay
from tests.conftest import Cli, draw
from tests.sweeps import slow_except


class Words(SilentDisplay):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)


def predict(model: Path, input: Any, output: Path, **more: Any) -> tuple[dict[str, Any], list[str]]:
    words = Words()
    return predict_files(
        PredictRequest(str(model), str(input), output, **({"batch_size": 4} | more)), words
    ), words.lines


def rows_of(path: Path) -> list[dict[str, str]]:
    return read_rows(path)


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """18 images in three folders."""
    shutil.copytree(image_folder / "val", tmp_path / "photos")
    return tmp_path / "photos"


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# --- what is written -----------------------------------------------------------------------------


def test_every_image_below_a_folder_has_a_row(tiny: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    shutil.copy(folder / "red" / "000.jpg", folder / "deep" / "er" / "x.JPG")
    (folder / "notes.txt").write_text("no image")
    done, lines = predict(tiny, folder, tmp_path / "out.csv")
    rows = rows_of(tmp_path / "out.csv")
    paths = [row["path"] for row in rows]
    assert sorted(paths) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.[jJ]*"))
    expected = finetune.load(tiny).predict([folder / path for path in paths])
    for row, one in zip(rows, expected, strict=True):
        assert list(row) == ["path", "label", "confidence", *(f"prob_{name}" for name in one.classes)]
        assert row["label"] == one.label
        np.testing.assert_allclose([float(row[f"prob_{c}"]) for c in one.classes], one.values, atol=1e-6)
        assert float(row["confidence"]) == pytest.approx(one.confidence, abs=1e-6)
    assert (done["num_images"], done["num_bad"], done["bad_images"]) == (19, 0, None)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out.csv"}
    assert any("19 images" in line and "images/s" in line for line in lines)


def test_what_is_left_out_is_counted_and_named(tiny: Path, folder: Path, tmp_path: Path) -> None:
    words = Warnings()
    (folder / "noext").write_bytes(b"x")
    (folder / "deep").mkdir()
    np.save(folder / "deep" / "a.npy", np.zeros(3))
    (folder / "IMG.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    request = PredictRequest(str(tiny), str(folder), tmp_path / "out.csv", batch_size=4)
    result = predict_files(request, words)
    assert (result["num_images"], result["num_bad"]) == (18, 1)
    said = next(line for line in words.warnings if "have no row" in line)
    assert said.startswith("2 files are not images and have no row: noext, deep/a.npy")
    assert ".npy is a NumPy array, which networks of RGB images do not take: convert it" in said
    assert "a HEIC photograph: convert it" in (tmp_path / "out.csv.bad.csv").read_text()
    pattern = PredictRequest(str(tiny), str(folder / "*"), tmp_path / "two.csv", batch_size=4)
    words.warnings.clear()
    with pytest.raises(DataError):  # the photograph is the only image there, and cannot be read
        predict_files(pattern, words)
    assert any(line.startswith("1 file is not an image and has no row") for line in words.warnings)


class Warnings(Words):
    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_all_formats_hold_the_same_values(tiny: Path, folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    options = {"top": 3, "reject_below": 0.12}
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        predict(tiny, folder, tmp_path / name, **options)
    of_csv = rows_of(tmp_path / "out.csv")
    of_json = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "out.parquet")
    assert list(of_csv[0]) == list(of_json[0]) == table.column_names
    assert {str(table.schema.field(name).type) for name in ("path", "label", "label_2")} == {"string"}
    assert {str(table.schema.field(name).type) for name in ("confidence_3", "prob_0")} == {"float"}
    assert len({row["rejected"] for row in of_json}) == 2, "a threshold between them"
    for one, two, three in zip(of_csv, of_json, table.to_pylist(), strict=True):
        for name, cell in one.items():
            value = two[name]
            same = "" if value is None else str(value).lower() if isinstance(value, bool) else value
            assert cell == same if isinstance(same, str) else np.float32(cell) == np.float32(same)
            close = np.float32(value) == np.float32(three[name]) if isinstance(value, float) else False
            assert close or value == three[name]


def test_top_and_reject(tiny: Path, folder: Path, tmp_path: Path) -> None:
    done, _ = predict(tiny, folder, tmp_path / "out.jsonl", top=3, reject_below=0.12)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rejected = [row for row in rows if row["rejected"]]
    assert 0 < len(rejected) == done["num_rejected"] < len(rows)
    for row in rows:
        order = sorted(range(10), key=lambda index: -row[f"prob_{index}"])
        assert row["rejected"] == (row["confidence"] < 0.12) == (row["label"] is None)
        assert [row["label_2"], row["label_3"]] == [str(index) for index in order[1:3]]
        assert row["confidence_2"] == row[f"prob_{order[1]}"]
        assert row["rejected"] or row["label"] == str(order[0])
    with pytest.raises(UsageError, match="10 classes"):
        predict(tiny, folder, tmp_path / "x.csv", top=11)


def test_bad_images_are_listed_and_the_others_predicted(tiny: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "001.jpg").write_bytes(b"")
    (folder / "red" / "=x.jpg").write_bytes(b"GIF89a")
    done, lines = predict(tiny, folder, tmp_path / "out.csv")
    bad = rows_of(tmp_path / "out.csv.bad.csv")
    assert [row["path"] for row in bad] == ["red/001.jpg", "red/=x.jpg"]
    assert bad[0]["reason"] == "empty file"
    assert (done["num_images"], done["num_bad"]) == (17, 2)
    assert len(rows_of(tmp_path / "out.csv")) == 17
    assert any("2 images have no row" in line for line in lines)


def test_only_unreadable_images_are_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="none of 6 images"):
        predict(tiny, tmp_path / "photos", tmp_path / "out.csv")
    assert len(rows_of(tmp_path / "out.csv.bad.csv")) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out.csv.bad.csv"}


def test_formulas_are_neutralised_in_csv(tiny: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "red" / "000.jpg", folder / "=cmd().jpg")
    predict(tiny, folder, tmp_path / "out.csv")
    predict(tiny, folder, tmp_path / "out.jsonl")
    with (tmp_path / "out.csv").open() as file:
        assert next(csv.DictReader(file))["path"] == "'=cmd().jpg"
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["path"] == "=cmd().jpg"


def test_ten_crops_are_those_of_the_predictor(tiny: Path, folder: Path, tmp_path: Path) -> None:
    predict(tiny, folder / "red" / "000.jpg", tmp_path / "out.jsonl", crops=10)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    expected = finetune.load(tiny, crops=10).predict(folder / "red" / "000.jpg")
    np.testing.assert_allclose([row[f"prob_{c}"] for c in expected.classes], expected.values, atol=1e-6)


# --- where images come from --------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_rows(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.jpg"))
    (tmp_path / "list.csv").write_text("more, path \n" + "".join(f"1,{name}\n\n" for name in names))
    outputs = []
    for number, (words, content, nul) in enumerate(
        [
            ("photos/**/*.*", b"", False),
            ("list.csv", b"", False),
            ("-", "\n".join(names).encode(), False),
            ("-", "\r\n".join([*names, ""]).encode(), False),
            ("-", "\0".join([*names, ""]).encode(), True),
        ]
    ):
        stdin(monkeypatch, content)
        predict(tiny, words, Path(f"{number}.csv"), nul=nul)
        outputs.append(Path(f"{number}.csv").read_bytes())
    assert all(output == outputs[0] for output in outputs)
    assert [row["path"] for row in rows_of(tmp_path / "0.csv")] == names


def test_invalid_lines_are_listed_as_bad_images(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = str(folder / "red" / "000.jpg").encode()
    stdin(
        monkeypatch,
        good + b"\nnone.jpg\nba\xffd.jpg\n\nnu\0l.jpg\n" + str(folder).encode() + b"\n/dev/zero\n",
    )
    predict(tiny, "-", tmp_path / "out.csv")
    bad = {row["path"]: row["reason"] for row in rows_of(tmp_path / "out.csv.bad.csv")}
    assert list(bad) == ["none.jpg", r"ba\udcffd.jpg", r"nu\0l.jpg", str(folder), "/dev/zero"]
    assert bad["none.jpg"] == "file not found" and "not UTF-8" in bad[r"ba\udcffd.jpg"]


def test_text_that_is_no_path_is_shown_shortened(tiny: Path, folder: Path, tmp_path: Path, cli: Cli) -> None:
    good = bytes(folder / "red" / "000.jpg")
    for number, text in enumerate((b"x" * 50_000, b"\x1b" * 50_000)):
        output = tmp_path / f"{number}.csv"
        result = cli("predict", tiny, "-", "-o", output, "--device", "cpu", given=good + b"\n" + text)
        assert result.exit_code == 0 and len(result.stderr) < 15_000
        assert Path(f"{output}.bad.csv").stat().st_size < 5_000
        assert len(rows_of(output)) == 1
    result = cli("predict", tiny, "-", "-o", tmp_path / "o.csv", given=good + b"\n" + b"x" * 10_000_000)
    assert result.exit_code == 65 and len(result.stderr) < 1_000
    assert "a path has more than 65,536 bytes" in result.stderr


def test_a_name_that_is_not_utf8_is_a_bad_image(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "red" / "000.jpg", bytes(folder / "red") + b"/\xff.jpg")
    stdin(monkeypatch, b"\n".join(sorted(map(bytes, folder.rglob("*.jpg")))))
    for number, words in enumerate(("photos", "photos/*/*.jpg", "-")):
        done, _ = predict(tiny, words, tmp_path / f"{number}.csv")
        assert (done["num_images"], done["num_bad"]) == (18, 1)
        [bad] = rows_of(tmp_path / f"{number}.csv.bad.csv")
        assert bad["path"].endswith(r"red/\udcff.jpg") and "not UTF-8" in bad["reason"]


def test_invalid_lines_do_not_prevent_a_resume(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that names no file has no size and no modification time in the fingerprint."""
    monkeypatch.chdir(tmp_path)
    names = "\n".join(["nu\0l.jpg", *map(str, sorted(folder.rglob("*.jpg")))]).encode()
    with monkeypatch.context() as patch, pytest.raises(FinetuneError):
        stop_after(patch, 2)
        stdin(patch, names)
        predict(tiny, "-", Path("out.csv"))
    (tmp_path / "new").mkdir()
    stdin(monkeypatch, names)
    _, lines = predict(tiny, "-", Path("out.csv"))
    assert "resuming after 8 images" in lines


def test_rows_of_a_csv_stay_in_its_folder_unless_allowed(tiny: Path, folder: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(folder / "red" / "000.jpg", lists / "own.jpg")
    table = lists / "list.csv"
    table.write_text(f"path\nown.jpg\n../photos/red/001.jpg\n{folder}/red/002.jpg\n")
    done, _ = predict(tiny, table, tmp_path / "out.csv")
    assert (done["num_images"], done["num_bad"]) == (1, 2)
    done, _ = predict(tiny, table, tmp_path / "all.csv", follow_links=True)
    assert (done["num_images"], done["num_bad"]) == (3, 0)


def test_links_out_of_a_folder_are_refused_unless_allowed(tiny: Path, folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    shutil.copy(folder / "red" / "000.jpg", inner / "own.jpg")
    (inner / "linked").symlink_to(folder)
    with pytest.raises(DataError, match="--follow-links"):
        predict(tiny, inner, tmp_path / "out.csv")
    done, _ = predict(tiny, inner, tmp_path / "out.csv", follow_links=True)
    assert done["num_images"] == 19


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no column 'path'"),
        (b"caption,label\na dog,x\n", "no column 'path'"),
        (b"path,path\n", "more than one column"),
        (b"path\n\xff\x81\n", "not UTF-8"),
        (b"path\n", "there are no images"),
        (b"path\n\n" + b"x" * 200_000, "not a table"),
    ],
)
def test_an_invalid_csv_is_refused(tiny: Path, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=said):
        predict(tiny, tmp_path / "list.csv", tmp_path / "out.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"list.csv"}


def test_nothing_to_predict_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    stdin(monkeypatch, b"\n\n")
    for words in (tmp_path / "none", tmp_path / "empty", tmp_path / "*.jpg", "-"):
        with pytest.raises(DataError):
            predict(tiny, words, tmp_path / "out.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


# --- where nothing is written --------------------------------------------------------------------


def test_nothing_is_written_among_the_images(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("path\nphotos/red/000.jpg\n")
    (tmp_path / "door").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    for words, output in (
        ("photos", "photos/out.csv"),
        ("photos", "door/red/out.csv"),
        ("photos/red/*.jpg", "photos/red/out.csv"),
        ("list.csv", "photos/red/out.csv"),
    ):
        with pytest.raises(UsageError, match="among the images"):
            predict(tiny, words, Path(output))
    assert sorted(tmp_path.rglob("*")) == before
    predict(tiny, "list.csv", Path("out.csv"))


def test_paths_from_standard_input_are_checked_one_by_one(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(path) for path in sorted(folder.rglob("*.jpg"))]  # blue, green, red
    before = sorted(tmp_path.rglob("*"))
    for place in ("blue", "green", "red"):
        stdin(monkeypatch, "\n".join(names).encode())
        with pytest.raises(UsageError, match=f"among the images, in .*{place}"):
            predict(tiny, "-", folder / place / "out.csv")
        assert sorted(tmp_path.rglob("*")) == before
    shutil.copy(names[0], tmp_path / "here.jpg")
    stdin(monkeypatch, "\n".join(["here.jpg", str(tmp_path / "here.jpg"), *names]).encode())
    done, _ = predict(tiny, "-", Path("out.csv"))  # the working directory may contain both
    assert done["num_images"] == 20


def test_an_existing_list_of_bad_images_is_kept(tiny: Path, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.csv.bad.csv"
    for spoil in (False, True):
        mine.write_text("mine")
        if spoil:
            (folder / "red" / "001.jpg").write_bytes(b"")
        with pytest.raises(UsageError, match=r"out\.csv\.bad\.csv, where images .* already exists"):
            predict(tiny, folder, tmp_path / "out.csv")
        assert mine.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out.csv.bad.csv"}


class Meanwhile(SilentDisplay):
    """Does something else when a phase of the command ends."""

    def __init__(self, phase: str, act: Callable[[], object]) -> None:
        super().__init__()
        self.phase, self.act = phase, act

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        yield
        if text.startswith(self.phase):
            self.act()


def test_an_image_that_is_removed_meanwhile_is_listed(tiny: Path, folder: Path, tmp_path: Path) -> None:
    display = Meanwhile("looking through", (folder / "red/003.jpg").unlink)
    request = PredictRequest(str(tiny), str(folder), tmp_path / "out.csv", batch_size=4)
    done = predict_files(request, display)
    assert (done["num_images"], done["num_bad"]) == (17, 1)
    assert rows_of(tmp_path / "out.csv.bad.csv") == [{"path": "red/003.jpg", "reason": "file not found"}]
    assert len(rows_of(tmp_path / "out.csv")) == 17


@pytest.mark.parametrize("name", ["out.csv", "out.csv.bad.csv"])
def test_a_file_that_appears_meanwhile_is_kept(tiny: Path, folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "red/000.jpg").write_bytes(b"no image")
    taken = tmp_path / name
    display = Meanwhile("looking through", lambda: taken.write_text("mine"))
    request = PredictRequest(str(tiny), str(folder), tmp_path / "out.csv", batch_size=4)
    with pytest.raises(UsageError, match=r"Move .* away"):
        predict_files(request, display)
    assert taken.read_text() == "mine"
    taken.unlink()
    done, lines = predict(tiny, folder, tmp_path / "out.csv")
    assert (done["num_images"], done["num_bad"]) == (17, 1)
    assert any("resuming after 18 images" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out.csv", "out.csv.bad.csv"}


def test_an_output_without_a_name_is_refused(tiny: Path, folder: Path) -> None:
    for words in ("", ".", "/"):
        with pytest.raises(UsageError, match="names no file"):
            predict(tiny, folder, Path(words))


def test_an_existing_file_is_kept(tiny: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(UsageError, match="already"):
        predict(tiny, folder, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"


@pytest.mark.parametrize(("name", "format"), [("out.csv", "jsonl"), ("out.parquet", "csv"), ("out", "xml")])
def test_invalid_formats_are_refused(
    tiny: Path, folder: Path, tmp_path: Path, name: str, format: str
) -> None:
    with pytest.raises(UsageError, match="--format"):
        predict(tiny, folder, tmp_path / name, format=format)


# --- going on ------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Simulate a power cut after some batches, each of which was saved."""
    monkeypatch.setattr(resumable_writer, "SAVE_SECONDS", 0)
    save, seen = resumable_writer.ResumableWriter.save, []

    def cut(self: resumable_writer.ResumableWriter, progress: Any, *, now: bool = False) -> None:
        save(self, progress, now=now)
        seen.append(1)
        if len(seen) == batches:
            self.write(b"half a row", b"half a line")
            raise ConnectionAbortedError("the power is gone")

    monkeypatch.setattr(resumable_writer.ResumableWriter, "save", cut)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["out.csv"], ["out.csv", "out.jsonl", "out.parquet"]))
def test_a_resumed_prediction_writes_the_same_bytes(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for place in ("000", "005"):
        (folder / "green" / f"{place}.jpg").write_bytes(b"spoilt")
    predict(tiny, folder, tmp_path / "whole" / name)
    for cut in range(1, 6):
        output = tmp_path / f"cut{cut}" / name
        with monkeypatch.context() as patch, pytest.raises(FinetuneError):
            stop_after(patch, cut)
            predict(tiny, folder, output)
        assert not output.exists()
        done, lines = predict(tiny, folder, output)
        assert f"resuming after {min(18, 4 * cut):,} images" in lines
        assert (done["num_images"], done["num_bad"]) == (16, 2)
        for suffix in ("", ".bad.csv"):
            there = (tmp_path / "whole" / f"{name}{suffix}").read_bytes()
            assert (output.parent / f"{name}{suffix}").read_bytes() == there
        assert len(list(output.parent.iterdir())) == 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("change", ["image", "new", "gone", "model", "option"])
def test_a_changed_prediction_is_not_resumed(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    output, more = tmp_path / "out.csv", {}
    with monkeypatch.context() as patch, pytest.raises(FinetuneError):
        stop_after(patch, 3)
        predict(tiny, folder, output)
    model = tiny
    if change == "image":
        draw(folder / "blue" / "001.jpg", (1, 2, 3), seed=9)
    elif change == "new":
        draw(folder / "blue" / "0000.jpg", (1, 2, 3), seed=9)
    elif change == "gone":
        (folder / "blue" / "001.jpg").unlink()
    elif change == "option":
        more = {"top": 2}
    else:
        model = tmp_path / "other"
        shutil.copytree(tiny, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"finetune": {"temperature": 2.0}}))
    _, lines = predict(model, folder, output, **more)
    assert any("starting anew" in line for line in lines)
    predict(model, folder, tmp_path / "whole.csv", **more)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


SOUND = {"done": 12, "digest": "0" * 64, "bad": 2, "rejected": 3}
DAMAGED: list[Any] = [
    5, [], {}, {"done": 12}, SOUND | {"more": 1}, SOUND | {"done": -1}, SOUND | {"done": True},
    SOUND | {"done": 12.0}, SOUND | {"done": "12"}, SOUND | {"bad": -2}, SOUND | {"bad": 10},
    SOUND | {"rejected": None}, SOUND | {"digest": 5},
]  # fmt: skip
"""What a journal may say of the progress that no prediction has written."""


def test_the_progress_of_a_journal_is_read_only_if_it_can_be_one() -> None:
    assert PredictionProgress.read(SOUND) == PredictionProgress(**SOUND)
    assert [note for note in DAMAGED if PredictionProgress.read(note) is not None] == []


@pytest.mark.parametrize("note", slow_except([5, SOUND | {"done": -1}], [*DAMAGED, SOUND, {"done": 10**30}]))
def test_a_damaged_progress_is_not_resumed(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Any
) -> None:
    output, journal = tmp_path / "out.csv", tmp_path / ".out.csv.journal"
    with monkeypatch.context() as patch, pytest.raises(FinetuneError):
        stop_after(patch, 3)
        predict(tiny, folder, output)
    *lines, last = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"note": note})]) + "\n")
    _, said = predict(tiny, folder, output)
    assert any("starting anew" in line for line in said)
    predict(tiny, folder, tmp_path / "whole.csv")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_an_output_with_a_damaged_progress_beside_it_is_kept(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two last acts: the rows have their name, and the journal is still there."""
    output, journal = tmp_path / "out.csv", tmp_path / ".out.csv.journal"
    with monkeypatch.context() as patch, pytest.raises(FinetuneError):
        stop_after(patch, 5)
        predict(tiny, folder, output)
    (tmp_path / ".out.csv.rows.part").rename(output)
    *lines, last = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"note": {"done": 18}})]) + "\n")
    with pytest.raises(UsageError, match="already exists"):
        predict(tiny, folder, output)


def test_images_that_come_later_are_added(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(FinetuneError):
        stop_after(patch, 3)
        predict(tiny, folder, tmp_path / "out.csv")
    draw(folder / "red" / "zzz.jpg", (1, 2, 3), seed=9)
    _, lines = predict(tiny, folder, tmp_path / "out.csv")
    assert "resuming after 12 images" in lines
    predict(tiny, folder, tmp_path / "whole.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_standard_input_is_resumed_or_started_anew(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    for number, (paths, said) in enumerate([(names, "resuming after 12"), (names[1:], "starting anew")]):
        output = tmp_path / f"{number}.csv"
        with monkeypatch.context() as patch, pytest.raises(FinetuneError):
            stop_after(patch, 3)
            stdin(patch, "\n".join(names).encode())
            predict(tiny, "-", output)
        stdin(monkeypatch, "\n".join(paths).encode())
        _, lines = predict(tiny, "-", output)
        assert any(said in line for line in lines)
        assert [row["path"] for row in rows_of(output)] == paths


def done_of(journal: Path) -> int:
    record = read_journal(journal, 2)
    return int(record.blocks[-1].note["done"]) if record and record.blocks else 0


@pytest.mark.slow
def test_a_prediction_resumes_after_sigkill_and_sigterm(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process with slow input is killed; SIGTERM ends it with a message."""
    names = [str(path) for path in sorted(folder.rglob("*.jpg"))] * 40
    stdin(monkeypatch, "\n".join(names).encode())
    predict(tiny, "-", tmp_path / "whole.csv")
    output, journal = tmp_path / "out.csv", tmp_path / ".out.csv.journal"
    command = [sys.executable, "-m", "finetune", "predict", str(tiny), "-", "-o", str(output)]
    done = 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        pipe = subprocess.PIPE
        process = subprocess.Popen([*command, "--batch-size", "4"], stdin=pipe, stderr=pipe)
        assert process.stdin and process.stderr
        while "10 classes" not in (said := process.stderr.readline().decode()):
            assert said, "it ended before it was ready"
        for name in names:
            process.stdin.write(f"{name}\n".encode())
            process.stdin.flush()
            if done_of(journal) > done:
                break
            time.sleep(0.02)
        process.send_signal(number)
        process.stdin.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == code, said
        reached = done_of(journal)
        assert reached > done and not output.exists()
        done = reached
    assert f"it was stopped after {done} images" in said
    stdin(monkeypatch, "\n".join(names).encode())
    _, lines = predict(tiny, "-", output)
    assert f"resuming after {done} images" in lines
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
