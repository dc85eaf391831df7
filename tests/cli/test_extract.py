"""``finetune extract`` from the command line: tables for other programs, resuming, invalid input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from finetune.features import extract as command
from finetune.features import extraction as source
from finetune.features.store import KeptRows
from finetune.runs import claim
from pretrained.catalog import find_card
from tests.conftest import Cli, draw_folder
from tests.damage import KINDS
from tests.sweeps import slow_except


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def extract(cli: Cli, tiny: Path, data: Path, output: Path, *words: object) -> Any:
    return cli("extract", "--backbone", tiny, "--data", data, "--output", output, *words)


def test_a_table_for_each_stage_and_an_index(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    result = extract(cli, tiny, image_folder, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    index = pd.read_csv(tmp_path / "out/index.csv")
    assert json.loads(result.stdout)["num_images"] == 54
    assert len(index) > 2 and (index["num_images"] == 54).all()
    for row in index.itertuples():
        table = pd.read_csv(tmp_path / "out" / str(row.file))
        names = [f"{row.layer}.{i}" for i in range(int(row.num_features))]  # type: ignore[call-overload]
        assert list(table.columns) == ["path", "label", "split", *names]
        assert list(table["path"]) == sorted(table["path"])
        assert not table.isna().any().any()


def test_features_equal_those_of_the_network(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Compared with the plain network, image by image, with timm's transform."""
    import timm
    from timm.data import create_transform

    assert extract(cli, tiny, image_folder, tmp_path / "f.csv", "--layers", "pre_logits").exit_code == 0
    table = pd.read_csv(tmp_path / "f.csv")
    network = timm.create_model(f"local-dir:{tiny}", pretrained=True).eval()
    card = find_card(str(tiny))
    view = create_transform(**card.preprocessing.to_timm(), is_training=False)
    for row in table.iloc[[0, 20, 53]].itertuples(index=False):
        with Image.open(image_folder / row[0]) as image, torch.no_grad():
            features = network.forward_head(  # type: ignore[operator]
                network.forward_features(view(image.convert("RGB")).unsqueeze(0)),
                pre_logits=True,  # type: ignore[operator]
            )
        assert np.allclose(np.array(row[3:], dtype=np.float32), features[0].numpy(), atol=1e-5)
        assert row[1] == row[0].split("/")[1] and row[2] == row[0].split("/")[0]


def test_scikit_learn_trains_on_the_files(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    assert extract(cli, tiny, image_folder, tmp_path / "f.csv", "--layers", "all").exit_code == 0
    table = pd.read_csv(tmp_path / "f.csv")
    train, val = table[table["split"] == "train"], table[table["split"] == "val"]
    classifier = LogisticRegression(max_iter=1000).fit(train.iloc[:, 3:], train["label"])
    assert classifier.score(val.iloc[:, 3:], val["label"]) > 0.8


@pytest.mark.slow
def test_formats_hold_the_same_bits(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    for name in ("f.csv", "f.parquet", "f.npz"):
        result = extract(cli, tiny, image_folder, tmp_path / name, "-l", "layer1,layer4")
        assert result.exit_code == 0, result.stderr
    csv = pd.read_csv(tmp_path / "f.csv", dtype=dict.fromkeys(_number_columns(tmp_path), np.float32))
    parquet = pd.read_parquet(tmp_path / "f.parquet")
    assert csv.iloc[:, 3:].to_numpy().tobytes() == parquet.iloc[:, 3:].to_numpy(np.float32).tobytes()
    arrays = np.load(tmp_path / "f.npz")
    assert list(arrays["path"]) == list(csv["path"])
    joined = np.concatenate([arrays["layer1"], arrays["layer4"]], axis=1)
    assert joined.tobytes() == csv.iloc[:, 3:].to_numpy(np.float32).tobytes()


def _number_columns(folder: Path) -> list[str]:
    return list(pd.read_csv(folder / "f.csv", nrows=0).columns[3:])


def test_images_without_labels(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "flat", {"inner/red": 3})
    shutil.copy(tmp_path / "flat/inner/red/000.jpg", tmp_path / "flat/top.jpg")
    result = extract(cli, tiny, tmp_path / "flat", tmp_path / "f.csv", "-l", "last")
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv(tmp_path / "f.csv")
    assert list(table["path"]) == ["inner/red/000.jpg", "inner/red/001.jpg", "inner/red/002.jpg", "top.jpg"]
    assert table["label"].isna().all() and table["split"].isna().all()
    assert table.iloc[0, 3:].equals(table.iloc[3, 3:].set_axis(table.columns[3:]))


def test_no_split_is_drawn(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Neither is a class with one image refused, nor are copies moved: nothing is trained."""
    draw_folder(tmp_path / "data", {"red": 6, "blue": 6, "green": 1})
    for number in range(3):
        shutil.copy(tmp_path / "data/red/000.jpg", tmp_path / f"data/red/copy{number}.jpg")
    result = extract(cli, tiny, tmp_path / "data", tmp_path / "f.csv", "-l", "last")
    assert result.exit_code == 0 and "moved" not in result.stderr + result.stdout, result.stderr
    table = pd.read_csv(tmp_path / "f.csv")
    assert (
        len(table) == 16
        and set(table["split"]) == {"train"}
        and set(table["label"]) == {"red", "blue", "green"}
    )


@pytest.mark.slow
def test_a_csv_and_a_runs_split(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "data", {"red": 10, "blue": 10})
    rows = [f"data/red/{i:03}.jpg,red\n" for i in range(10)] + [
        f"data/blue/{i:03}.jpg,blue\n" for i in range(9)
    ]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(rows))
    assert extract(cli, tiny, tmp_path / "list.csv", tmp_path / "f.csv", "-l", "last").exit_code == 0
    assert len(pd.read_csv(tmp_path / "f.csv")) == 19
    words = ("--strategy", "freeze", "--epochs", 1, "--seed", 7, "--device", "cpu")
    assert cli("run", "-b", tiny, "-d", tmp_path / "data", *words, "-o", tmp_path / "run").exit_code == 0
    result = cli(
        "extract", "-b", tmp_path / "run", "-d", tmp_path / "run", "-o", tmp_path / "g.csv", "-l", "last"
    )
    assert result.exit_code == 0, result.stderr
    split = pd.read_csv(tmp_path / "run/split.csv").set_index("path")["split"].to_dict()
    table = pd.read_csv(tmp_path / "g.csv")
    assert dict(zip(table["path"], table["split"], strict=True)) == split


def test_a_bad_image_is_listed_and_has_no_row(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 20, "blue": 5})
    good = tmp_path / "good.csv"
    assert extract(cli, tiny, data, good, "-l", "all").exit_code == 0
    (data / "red/004.jpg").write_bytes(b"no image at all")
    whole = (data / "blue/001.jpg").read_bytes()
    (data / "blue/001.jpg").write_bytes(whole[: len(whole) // 2])
    result = extract(cli, tiny, data, tmp_path / "f.csv", "-l", "all")
    assert result.exit_code == 0, result.stderr
    bad = pd.read_csv(tmp_path / "f.bad_images.csv")
    assert list(bad["path"]) == ["blue/001.jpg", "red/004.jpg"]
    table, before = pd.read_csv(tmp_path / "f.csv"), pd.read_csv(good)
    left = before[~before["path"].isin(bad["path"])].reset_index(drop=True)
    assert list(table["path"]) == list(left["path"])
    assert np.allclose(table.iloc[:, 3:], left.iloc[:, 3:], atol=1e-5)  # the other rows are unchanged


def test_nothing_but_bad_images_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one.jpg").write_bytes(b"nothing")
    result = extract(cli, tiny, tmp_path / "data", tmp_path / "f.csv")
    assert result.exit_code == 65 and "no image can be decoded" in result.stderr
    assert not (tmp_path / "f.csv").exists()


@pytest.mark.slow
def test_a_bad_image_is_recognised_by_its_content(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Cached rows are found by content, so a renamed folder finds them, without the bad image."""
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 6})
    (data / "blue/003.jpg").write_bytes(b"no image at all")
    assert extract(cli, tiny, data, tmp_path / "one.csv", "-l", "last").exit_code == 0
    (data / "blue").rename(data / "azure")
    result = extract(cli, tiny, data, tmp_path / "two.csv", "-l", "last")
    assert result.exit_code == 0, result.stderr
    assert list(pd.read_csv(tmp_path / "two.bad_images.csv")["path"]) == ["azure/003.jpg"]
    assert "azure/003.jpg" not in set(pd.read_csv(tmp_path / "two.csv")["path"])


@pytest.mark.parametrize("gone", slow_except([False], [True, False]))
def test_an_image_that_changes_during_extraction_is_not_cached(
    cli: Cli, tiny: Path, tmp_path: Path, gone: bool
) -> None:
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 6})
    image = data / "blue/003.jpg"
    content = image.read_bytes()
    extractor = source.FeatureExtractor

    def change(*arguments: Any, **keys: Any) -> Any:
        image.unlink() if gone else shutil.copy(data / "red/000.jpg", image)
        return extractor(*arguments, **keys)

    with mock.patch.object(source, "FeatureExtractor", change):
        result = extract(cli, tiny, data, tmp_path / "f.csv", "-l", "last", "--workers", 0)
    assert result.exit_code == 65 and "changed or removed meanwhile" in result.stderr
    image.write_bytes(content)
    assert extract(cli, tiny, data, tmp_path / "f.csv", "-l", "last").exit_code == 0
    assert len(pd.read_csv(tmp_path / "f.csv")) == 12


def test_other_labels_are_another_extraction(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 6})
    assert extract(cli, tiny, data, tmp_path / "out", "-l", "last").exit_code == 0
    (data / "blue").rename(data / "azure")
    result = extract(cli, tiny, data, tmp_path / "out", "-l", "last")
    assert result.exit_code == 2 and "another extraction" in result.stderr


@pytest.mark.slow
def test_features_of_the_classifier_depend_on_its_weights(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 3, "blue": 3})
    state = load_file(tiny / "model.safetensors")
    state |= {key: 2 * value for key, value in state.items() if key.startswith("fc.")}
    save_file(state, tmp_path / "w.safetensors")
    assert extract(cli, tiny, data, tmp_path / "one.csv", "-l", "fc").exit_code == 0
    words = ("-l", "fc", "--weights", tmp_path / "w.safetensors")
    other = extract(cli, tiny, data, tmp_path / "two.csv", *words)
    assert other.exit_code == 0, other.stderr
    one, two = (pd.read_csv(tmp_path / name).iloc[:, 3:] for name in ("one.csv", "two.csv"))
    assert np.allclose(two, 2 * one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_second_time_nothing_is_computed(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    assert extract(cli, tiny, image_folder, tmp_path / "one.csv", "-l", "layer1,layer4").exit_code == 0
    with mock.patch.object(KeptRows, "_compute", side_effect=AssertionError("computed again")):
        result = extract(cli, tiny, image_folder, tmp_path / "two.csv", "-l", "layer4,layer1")
        assert result.exit_code == 0, result.stderr
    assert extract(cli, tiny, image_folder, tmp_path / "three.csv", "-l", "layer4,layer2").exit_code == 0
    one, three = pd.read_csv(tmp_path / "one.csv"), pd.read_csv(tmp_path / "three.csv")
    both = [name for name in one.columns if name.startswith("layer4.")]
    assert one[both].equals(three[both])  # the same bits, cached or computed with another layer


DAMAGED: list[dict[str, Any]] = [
    {"note": {"99": "gone"}},
    {"note": {"0": 5}},
    {"note": {"first": "gone"}},
    {"note": [1]},
    {"bytes": [0], "sha256": [hashlib.sha256().hexdigest()]},
]
"""What a journal may say of a block of features that is not so."""


@pytest.mark.sample(1)
@pytest.mark.parametrize("change", slow_except([DAMAGED[0], DAMAGED[-1]], DAMAGED))
def test_damaged_features_are_computed_again(
    cli: Cli, tiny: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    data = draw_folder(tmp_path / "data", {"red": 3, "blue": 3})
    assert extract(cli, tiny, data, tmp_path / "one.csv", "-l", "last").exit_code == 0
    (journal,) = (tmp_path / "cache/finetune/kept").glob("*.journal")
    facts, block = journal.read_text().splitlines()
    journal.write_text(f"{facts}\n{json.dumps(json.loads(block) | change)}\n")
    result = extract(cli, tiny, data, tmp_path / "two.csv", "-l", "last")
    assert result.exit_code == 0 and "computed again" in result.stderr
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("kind", slow_except([None, "pipe"], [None, *KINDS]))
def test_a_damaged_record_is_none_of_an_extraction(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, kind: str | None
) -> None:
    record = tmp_path / "out" / "extraction.json"
    record.parent.mkdir()
    record.write_text("[" * 100_000) if kind is None else KINDS[kind](record)
    result = extract(cli, tiny, image_folder, tmp_path / "out", "-l", "last")
    assert result.exit_code == 2 and "another extraction, or something else" in result.stderr


def test_a_finished_folder_is_kept(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert extract(cli, tiny, image_folder, out, "-l", "last").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    result = extract(cli, tiny, image_folder, out, "-l", "last")
    assert result.exit_code == 0 and "already" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    slow_except(
        [("-l", "layer1")],
        [("-l", "layer1"), ("-l", "last", "--pool", "max"), ("-l", "last", "--format", "npz")],
    ),
)
def test_another_extraction_is_not_overwritten(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    assert extract(cli, tiny, image_folder, out, "-l", "last").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = extract(cli, tiny, image_folder, out, *words)
    assert result.exit_code == 2 and "another extraction" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_foreign_files_are_not_overwritten(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("mine")
    result = extract(cli, tiny, image_folder, tmp_path / "f.csv")
    assert result.exit_code == 2 and (tmp_path / "f.csv").read_text() == "mine"
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    result = extract(cli, tiny, image_folder, tmp_path / "out")
    assert result.exit_code == 2 and [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["f.csv", "f.bad_images.csv"])
def test_files_that_appear_meanwhile_are_kept(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 5})
    (data / "red/004.jpg").write_bytes(b"no image at all")
    write = command.write_table

    def write_meanwhile(*args: Any) -> None:
        write(*args)
        (tmp_path / name).write_text("mine")

    monkeypatch.setattr(command, "write_table", write_meanwhile)
    result = extract(cli, tiny, data, tmp_path / "f.csv", "-l", "last")
    assert result.exit_code == 2 and "Move it away" in result.stderr
    assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / ".f.csv.work/f.csv").is_file()  # what was computed
    monkeypatch.undo()
    result = extract(cli, tiny, data, tmp_path / "f.csv", "-l", "last")
    assert result.exit_code == 2 and "already" in result.stderr
    (tmp_path / name).unlink()
    assert extract(cli, tiny, data, tmp_path / "f.csv", "-l", "last").exit_code == 0
    assert not (tmp_path / ".f.csv.work").exists()
    assert len(pd.read_csv(tmp_path / "f.csv")) == 10 and len(pd.read_csv(tmp_path / "f.bad_images.csv")) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["blocks.csv", "index.csv", "bad_images.csv"])
def test_files_that_appear_in_the_folder_are_kept(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 5})
    (data / "red/004.jpg").write_bytes(b"no image at all")
    output, precious = tmp_path / "f", tmp_path / "precious"
    precious.write_text("mine")
    open_kept = command._open_kept
    layer = "layer3"

    def appear(*arguments: Any) -> Any:
        (output / name.replace("blocks", layer)).symlink_to(precious)
        return open_kept(*arguments)

    monkeypatch.setattr(command, "_open_kept", appear)
    result = extract(cli, tiny, data, output, "-l", layer)
    assert result.exit_code == 2 and "was made by something else meanwhile" in result.stderr
    assert precious.read_text() == "mine"
    monkeypatch.undo()
    (output / name.replace("blocks", layer)).unlink()
    assert extract(cli, tiny, data, output, "-l", layer).exit_code == 0
    assert len(pd.read_csv(output / f"{layer}.csv")) == 10
    assert not (output / ".work").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["layer1.csv", "index.csv"])
def test_a_table_that_appears_between_a_kill_and_the_repeat_is_kept(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is neither taken for the extraction's own table nor replaced."""
    output, words = tmp_path / "f", ("-l", "layer1,layer3")
    with monkeypatch.context() as patch:
        place = command.PlacedFiles.place

        def place_then_end(placed: Any, part: Path, path: Path) -> None:
            place(placed, part, path)
            raise KeyboardInterrupt  # as if it were killed now

        patch.setattr(command.PlacedFiles, "place", place_then_end)
        assert extract(cli, tiny, image_folder, output, *words).exit_code == 75
    own = (output / "layer1.csv").read_bytes()
    assert not (output / "layer3.csv").exists()
    (output / name).unlink(missing_ok=True)
    (output / name).write_text("mine")
    result = extract(cli, tiny, image_folder, output, *words)
    assert result.exit_code == 2 and "was made by something else" in result.stderr
    assert (output / name).read_text() == "mine"
    (output / name).unlink()
    assert extract(cli, tiny, image_folder, output, *words).exit_code == 0
    assert (output / "layer1.csv").read_bytes() == own and not (output / ".work").exists()


@pytest.mark.slow
def test_own_tables_are_kept_by_the_repeat(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    output, words = tmp_path / "f", ("-l", "layer1,layer3")
    assert extract(cli, tiny, image_folder, output, *words).exit_code == 0
    inode = (output / "layer1.csv").stat().st_ino
    (output / "layer3.csv").unlink()
    assert extract(cli, tiny, image_folder, output, *words).exit_code == 0
    assert (output / "layer1.csv").stat().st_ino == inode and (output / "layer3.csv").is_file()


@pytest.mark.parametrize("output", ["f.csv", "f"])
def test_a_link_in_place_of_the_folder_for_work_is_not_followed(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, output: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "f.csv").write_text("mine")
    link = tmp_path / ("f/.work" if output == "f" else ".f.csv.work")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    result = extract(cli, tiny, image_folder, tmp_path / output, "-l", "last")
    assert result.exit_code == 2 and "is a link to another folder" in result.stderr
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("output", ["f.csv", "folder"])
def test_two_extractions_do_not_write_one_output(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(claim, "LOCK_WAIT", 0.0)
    words = (cli, tiny, image_folder, tmp_path / output, "-l", "last")
    write, others = command.write_table, []

    def write_meanwhile(*args: Any) -> None:
        if not others:
            others.append(extract(*words))
        write(*args)

    monkeypatch.setattr(command, "write_table", write_meanwhile)
    result = extract(*words)
    assert result.exit_code == 0, result.stderr
    assert [other.exit_code for other in others] == [2]
    assert "another process is working in it" in others[0].stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cache", output])


@pytest.mark.slow
def test_a_damaged_record_of_an_extraction_is_refused(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert extract(cli, tiny, image_folder, out, "-l", "last").exit_code == 0
    whole = (out / "extraction.json").read_bytes()
    for content in (b"", b"[" * 100_000, b"null", b"[]", b"\xff", whole[:-20]):
        (out / "extraction.json").write_bytes(content)
        result = extract(cli, tiny, image_folder, out, "-l", "last")
        assert result.exit_code == 2 and "something else" in result.stderr, content
    (out / "extraction.json").write_bytes(whole)
    for tables in (5, [5], "x", None):  # made again
        now = json.loads((out / "extraction.json").read_bytes())
        (out / "extraction.json").write_text(json.dumps(now | {"tables": tables}))
        assert extract(cli, tiny, image_folder, out, "-l", "last").exit_code == 0
        again = json.loads((out / "extraction.json").read_bytes())
        assert {**again, "placed": None} == {**json.loads(whole), "placed": None}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("-l", "layr4"), 2, "did you mean 'layer4'"),
        (("-l", "all", "--pool", "mean"), 2, "no such pool"),
        (("-l", "layer1", "--pool", "token"), 2, "no class token"),
        (("--format", "tsv"), 2, "no such format"),
        (("-l", ","), 2, "no layer was named"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    result = extract(cli, tiny, image_folder, tmp_path / "out", *words)
    assert result.exit_code == code and said in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_data_is_refused(cli: Cli, tiny: Path, image_folder: Path) -> None:
    result = extract(cli, tiny, image_folder, image_folder / "out")
    assert result.exit_code == 2 and "lies in the data" in result.stderr


@pytest.mark.slow
def test_missing_data_or_output_are_reported(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    assert "no output" in cli("extract", "-b", tiny, "-d", tmp_path).stderr
    assert "no data" in cli("extract", "-b", tiny, "-o", tmp_path / "x").stderr
    # The images are looked at first: arrays say how many channels the network takes.
    assert "no backbone" in cli("extract", "-d", image_folder, "-o", tmp_path / "x").stderr


def test_the_list_of_layers(cli: Cli, tiny: Path) -> None:
    result = cli("extract", "-b", tiny, "--layers", "list", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    stages = [row["layer"] for row in rows if row["kind"] == "stage"]
    assert stages[-1] == "layer4" and {"layer1.0", "fc"} <= {row["layer"] for row in rows}


def test_a_full_disk_leaves_nothing_under_the_final_name(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    error = OSError(28, "No space left on device")
    with mock.patch("finetune.runs.files.os.fsync", side_effect=error):
        result = extract(cli, tiny, image_folder, tmp_path / "f.csv", "-l", "last")
    assert result.exit_code == 74, result.stderr
    assert not (tmp_path / "f.csv").exists()
    assert extract(cli, tiny, image_folder, tmp_path / "f.csv", "-l", "last").exit_code == 0


@pytest.mark.slow
def test_features_that_do_not_fit_the_cache_are_kept_beside_the_output(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("-l", "last", "--set", "cache.max_gb=0.000001")
    result = extract(cli, tiny, image_folder, tmp_path / "f.csv", *words)
    assert result.exit_code == 0, result.stderr
    assert "not cached for other commands" in result.stderr
    assert len(pd.read_csv(tmp_path / "f.csv")) == 54
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" not in path.name) == ["f.csv"]


@pytest.mark.slow
def test_a_killed_extraction_resumes_to_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 200, "blue": 200})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "finetune",
        "extract",
        "-b",
        str(tiny),
        "-d",
        str(data),
        "--workers",
        "0",
    ]
    subprocess.run([*command, "-o", str(whole)], check=True, env=_env(tmp_path / "c1"), capture_output=True)
    environment = _env(tmp_path / "c2")
    process = subprocess.Popen([*command, "-o", str(killed)], env=environment, stderr=subprocess.PIPE)
    kept = tmp_path / "c2/finetune/kept"
    until = time.monotonic() + 60
    while not any(path.stat().st_size > 3000 for path in kept.glob("*.bin")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = sum(path.stat().st_size for path in kept.glob("*.bin"))
    assert 0 < before < 200 * 4 * 400
    assert not list(killed.glob("*.csv"))
    subprocess.run([*command, "-o", str(killed)], check=True, env=environment, capture_output=True)
    for path in whole.glob("*.csv"):
        assert (killed / path.name).read_bytes() == path.read_bytes()


def _env(cache: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
