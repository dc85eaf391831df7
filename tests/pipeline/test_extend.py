"""A run is extended by images and classes: the bits of training afresh, and what was forgotten."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
import torch

from finetune.data.dataset import Split
from finetune.errors import ExitCode
from finetune.evaluation.predictor import load
from finetune.pipeline.extend import LabelledFile, grow
from finetune.targets import SINGLE
from pretrained.backbone import load_backbone
from pretrained.catalog import find_card
from tests.cli.test_labels import draw_tables
from tests.conftest import QUICK_RUN, Cli, draw_folder
from tests.sweeps import slow_except

SOLVED = ("-s", "freeze", "--set", "strategy.features=all")


def ok(cli: Cli, *words: object) -> str:
    result = cli(*words)
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Images of two classes, and some more of one of them and of a third."""
    old = draw_folder(tmp_path / "old", {"blue": 12, "green": 12})
    more = draw_folder(tmp_path / "more", {"blue": 24, "red": 12})
    for number in range(12):  # the others are other images
        (more / "blue" / f"{number:03}.jpg").unlink()
    return old, more


def test_a_solved_run_has_the_bits_of_a_fresh_one(
    cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, more = folders
    ok(cli, "run", "-b", tiny, "-d", old, *SOLVED, *QUICK_RUN, "-o", tmp_path / "run")
    before = (tmp_path / "run/split.csv").read_bytes()
    said = ok(cli, "extend", tmp_path / "run", "-d", more, "--workers", 0, "-o", tmp_path / "grown")
    assert "24 images new, 24 of the run, new classes: red" in said
    assert "images are kept from other commands" in said
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    ok(cli, "run", "--recipe", tmp_path / "grown/recipe.yaml", "-o", tmp_path / "fresh")
    models = [tmp_path / name / "model/model.safetensors" for name in ("grown", "fresh")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert (tmp_path / "run/split.csv").read_bytes() == before
    splits = [pd.read_csv(tmp_path / name / "split.csv").set_index("sha256") for name in ("run", "grown")]
    assert splits[1].loc[splits[0].index, "split"].equals(splits[0]["split"])
    assert {*splits[1]["label"]} == {"blue", "green", "red"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_any_edits_end_in_the_bits_of_a_fresh_run(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Four edits, each of the run before: images and classes come and go, by adding or by replacing."""
    chance = random.Random(seed)
    drawn = draw_folder(tmp_path / "drawn", dict.fromkeys(("blue", "green", "red"), 14))
    images = sorted(drawn.rglob("*.jpg"))

    def arrange(name: str, files: Iterable[Path]) -> Path:
        for file in files:
            target = tmp_path / name / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        return tmp_path / name

    own = [*images[:8], *images[14:22]]
    ok(cli, "run", "-b", tiny, "-d", arrange("data-0", own), *SOLVED, *QUICK_RUN, "-o", tmp_path / "run-0")
    for number in range(1, 5):
        classes = chance.sample(("blue", "green", "red"), chance.choice([2, 3]))
        some = [
            one for one in images if one.parent.name in classes and (chance.random() < 0.6 or one in own[:3])
        ]
        replaces = chance.random() < 0.5 and {one.parent.name for one in some} >= {*classes[:2]}
        if {*some} <= {*own} and not (replaces and {*some} < {*own}):
            some = [*some, *[one for one in images if one not in own][:3]]
        own = some if replaces else [*own, *some]
        before, after = tmp_path / f"run-{number - 1}", tmp_path / f"run-{number}"
        words = ("-d", arrange(f"data-{number}", some), *(("--replace",) if replaces else ()), "-o", after)
        ok(cli, "extend", before, *words)
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty" / str(number)))
            ok(cli, "run", "--recipe", after / "recipe.yaml", "-o", tmp_path / f"fresh-{number}")
        grown, fresh = (
            (tmp_path / f"{name}-{number}/model/model.safetensors").read_bytes() for name in ("run", "fresh")
        )
        assert grown == fresh
        listed = {*pd.read_csv(after / "split.csv")["sha256"]}
        assert listed == {sha256(file.read_bytes()).hexdigest() for file in own}


def test_what_was_forgotten_is_shown(
    cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Beside the answers that both networks give for these images, one by one."""
    old, more = folders
    run, grown = tmp_path / "run", tmp_path / "grown"
    ok(cli, "run", "-b", tiny, "-d", old, "-s", "full", *QUICK_RUN, "-o", run)
    words = ("-d", more, "--workers", 0, "--epochs", 2, "-o", grown)
    said = ok(cli, "extend", run, *words)
    table = pd.read_csv(grown / "forgotten.csv", index_col="class")
    told = pd.read_csv(grown / "predictions.csv")
    predictor, kept = load(str(run)), told[told["label"] != "red"]
    before = [predictor.predict(tmp_path / path).label for path in kept["path"]]
    whole = table.loc["(all old classes)"]
    assert whole["images"] == len(kept) > 4
    assert whole["before"] == pytest.approx((kept["label"] == before).mean(), abs=1e-4)
    assert whole["after"] == pytest.approx((kept["label"] == kept["predicted"]).mean(), abs=1e-4)
    assert whole["low"] <= whole["difference"] <= whole["high"]
    assert pd.isna(table.loc["red", "before"]) and table.loc["red", "images"] > 0
    assert "old classes: accuracy" in said
    again = ok(cli, "extend", run, *words)
    assert "already holds this run" in again


def test_the_head_begins_with_the_rows_of_known_classes(
    cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    ok(cli, "run", "-b", tiny, "-d", folders[0], "-s", "freeze", *QUICK_RUN, "-o", tmp_path / "run")
    card = find_card(str(tmp_path / "run"))
    one = load_backbone(card, classes=("blue", "green"), head="keep").network.eval()
    images = torch.randn(3, *card.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    for classes in (("azure", "blue", "green"), ("green", "red"), ("blue",)):
        grown = load_backbone(card, classes=classes, keeps_rows=True)
        with torch.inference_mode():
            logits, expected = grown.network.eval()(images), one(images)
        assert logits.shape == (3, len(classes)) and grown.card.label_names == classes
        for column, name in enumerate(classes):
            if name in card.label_names:
                assert torch.allclose(logits[:, column], expected[:, card.label_names.index(name)], atol=1e-5)


@pytest.mark.slow
def test_a_head_without_a_known_class_is_refused(
    cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    ok(cli, "run", "-b", tiny, "-d", folders[0], "-s", "freeze", *QUICK_RUN, "-o", tmp_path / "run")
    shutil.rmtree(folders[1] / "blue")
    shutil.copytree(folders[1] / "red", folders[1] / "rosy")
    for number, file in enumerate(sorted((folders[1] / "rosy").iterdir())):
        file.write_bytes(file.read_bytes() + bytes([number]))
    words = ("-b", tmp_path / "run", "-d", folders[1], "--set", "strategy.head=extend", *QUICK_RUN)
    result = cli("run", *words, "-o", tmp_path / "out")
    assert result.exit_code == ExitCode.USAGE and "knows none of the classes" in result.stderr


def test_images_can_be_replaced(cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of the run need not be there any more."""
    old, more = folders
    ok(cli, "run", "-b", tiny, "-d", old, *SOLVED, *QUICK_RUN, "-o", tmp_path / "run")
    shutil.copytree(old / "blue", more / "blue", dirs_exist_ok=True)
    shutil.rmtree(old)
    said = ok(cli, "extend", tmp_path / "run", "-d", more, "--replace", "-o", tmp_path / "grown")
    assert "24 images new, 12 of the run, 12 removed, new classes: red, removed classes: green" in said
    assert {*pd.read_csv(tmp_path / "grown/split.csv")["label"]} == {"blue", "red"}


@pytest.mark.slow
def test_a_new_class_may_come_alone(cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder with a single folder has no classes elsewhere."""
    old, more = folders
    ok(cli, "run", "-b", tiny, "-d", old, *SOLVED, *QUICK_RUN, "-o", tmp_path / "run")
    shutil.rmtree(more / "blue")
    said = ok(cli, "extend", tmp_path / "run", "-d", more, "-o", tmp_path / "grown")
    assert "12 images new, 24 of the run, new classes: red" in said
    assert ok(cli, "extend", tmp_path / "run", "-d", more, "-o", tmp_path / "json", "--json").startswith("{")


WRONG = ("same", "case", "renamed", "gone", "one gone", "no run", "unlabelled")


@pytest.mark.parametrize("wrong", slow_except(["renamed", "gone"], WRONG))
def test_refusals(cli: Cli, tiny: Path, folders: tuple[Path, Path], tmp_path: Path, wrong: str) -> None:
    old, more = folders
    run = tmp_path / "run"
    ok(cli, "run", "-b", tiny, "-d", old, *SOLVED, *QUICK_RUN, "-o", run)
    if wrong == "same":
        more = old
    elif wrong == "case":
        (more / "blue").rename(more / "Blue")
    elif wrong == "renamed":
        shutil.copytree(old / "green", more / "verdant")
    elif wrong == "gone":
        old.rename(tmp_path / "elsewhere")
    elif wrong == "one gone":
        (old / "blue/003.jpg").unlink()
    elif wrong == "no run":
        run = old
    else:
        more = more / "blue"
    result = cli("extend", run, "-d", more, "-o", tmp_path / "grown")
    code = ExitCode.USAGE if wrong == "no run" else ExitCode.DATA
    assert result.exit_code == code and not (tmp_path / "grown.csv").exists(), result.stderr
    for word in {
        "same": ("all of these images already",),
        "case": ("'Blue' is 'blue'", "blue, green", "Blue, red"),
        "renamed": ("'verdant' is 'green'", "blue, green"),
        "gone": ("they are gone", "finetune run --backbone"),
        "one gone": ("1 of 24 images are gone", "finetune run --backbone"),
        "no run": ("finished run",),
        "unlabelled": ("label",),
    }[wrong]:
        assert word in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi", "number"])
@pytest.mark.parametrize("strategy", ["solved", "full"])
def test_other_labels(cli: Cli, tiny: Path, tmp_path: Path, kind: str, strategy: str) -> None:
    table = pd.read_csv(draw_tables(tmp_path / "tables") / f"{kind}.csv", keep_default_na=False)
    is_old = table.index % 3 > 0
    if kind == "multi":  # red is a new class
        is_old &= ~table["labels"].str.contains("red")
    table[is_old].to_csv(tmp_path / "tables/old.csv", index=False)
    table.drop(columns="split").to_csv(tmp_path / "tables/more.csv", index=False)
    way = SOLVED if strategy == "solved" else ("-s", "full")
    ok(cli, "run", "-b", tiny, "-d", tmp_path / "tables/old.csv", *way, *QUICK_RUN, "-o", tmp_path / "run")
    words = ("extend", tmp_path / "run", "-d", tmp_path / "tables/more.csv", "-o", tmp_path / "grown")
    if (kind, strategy) == ("number", "full"):
        result = cli(*words)
        assert result.exit_code == ExitCode.USAGE and "solved again" in result.stderr
        return
    said = ok(cli, *words)
    metric = {"multi": "mean average precision", "number": "R squared"}[kind]
    assert f"old classes: {metric}" in said
    (row,) = pd.read_csv(tmp_path / "grown/forgotten.csv").to_dict("records")
    assert row["low"] <= row["difference"] <= row["high"] and row["images"] >= 7


# --- the split -----------------------------------------------------------------------------------


def draw_images(names: Iterable[str], split: Split = "train") -> list[LabelledFile]:
    digests = {name: sha256(name.encode()).hexdigest() for name in names}
    return [LabelledFile(Path("/data") / name, name[0], split, digest) for name, digest in digests.items()]


@pytest.mark.parametrize("seed", slow_except(range(5), range(100)))
def test_splits_do_not_depend_on_the_order_of_edits(seed: int) -> None:
    """No image moves between training and validation, and each content occurs once."""
    chance = random.Random(seed)
    names = [f"{label}{number}" for label in "abc" for number in range(chance.randint(3, 30))]
    first, *later = [[name for name in names if chance.random() < 0.5] + ["a0", "a1"] for _ in range(3)]
    began = [*draw_images(first)[2:], *draw_images(first[:2], "val")]
    step, state = began, {image.digest: image.split for image in began}
    for added in later:
        step = grow(step, draw_images(added), False, 0.2, SINGLE)
        for image in step:
            assert state.setdefault(image.digest, image.split) == image.split
        assert len({image.digest for image in step}) == len(step)
    at_once = grow(began, draw_images([*later[0], *later[1]]), False, 0.2, SINGLE)
    assert {image.file for image in at_once} == {image.file for image in step}
    by_label = {label: {image.split for image in step if image.label == label} for label in "abc"}
    assert all("train" in splits for splits in by_label.values() if splits)
    kept = grow(step, draw_images(later[0]), True, 0.2, SINGLE)
    assert {image.file.name for image in kept} == {*later[0]}
