from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DataError, FinetuneError, UsageError
from finetune.recipe import load_recipe
from finetune.runs import reader
from finetune.runs.files import write_csv, write_json, write_text
from finetune.runs.folder import Outcome, RunFolder
from finetune.runs.reader import PredictionRow, RunReader

READERS: dict[str, Callable[[RunReader], Any]] = {
    "recipe.yaml": lambda run: run.recipe,
    "environment.json": lambda run: run.environment,
    "classes.txt": lambda run: run.classes,
    "split.csv": lambda run: run.split,
    "bad_images.csv": lambda run: run.bad_images,
    "plan.csv": lambda run: run.plan,
    "advice.json": lambda run: run.advice,
    "trunk.json": lambda run: run.trunk,
    "history.csv": lambda run: run.history,
    "metrics.json": lambda run: run.metrics,
    "predictions.csv": lambda run: run.predictions,
    "confusion_matrix.csv": lambda run: run.confusion[1],
    "cooccurrence.csv": lambda run: run.cooccurrence[1],
    "per_class.csv": lambda run: run.per_class,
    "check.json": lambda run: run.check,
    "outcome.json": lambda run: run.outcome,
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with every file."""
    folder = RunFolder(tmp_path)
    write_text(folder.recipe, load_recipe(None, {"data.path": "x"}).to_yaml())
    for path in (folder.environment, folder.advice, folder.trunk, folder.metrics, folder.check):
        write_json(path, {"of": path.name})
    folder.write_outcome(Outcome("interrupted", "stopped", attempt=3))
    write_text(folder.classes, "ants\n=bees\n")
    write_csv(folder.split, [("=a/1.jpg", "ants", "val", "12")], ("path", "label", "split", "sha256"))
    write_csv(folder.bad_images, [("a/2.jpg", "train", "cut short")], ("path", "split", "reason"))
    plan = ("group", "stage", "parameters", "trained", "rate")
    write_csv(folder.plan, [("head", "fc", 10, True, 0.1)], plan)
    write_csv(folder.history, [(1, None), (2, 0.5)], ("epoch", "eval_loss"))
    columns = ("path", "label", "predicted", "confidence", "prob_ants", "prob_=bees")
    write_csv(folder.predictions, [("=a/1.jpg", "ants", "=bees", 0.75, 0.25, 0.75)], columns)
    write_csv(folder.confusion_matrix, [("ants", 0, 1), ("=bees", 0, 0)], ("label", "ants", "=bees"))
    write_csv(folder.cooccurrence, [("ants", 2, 1), ("=bees", 1, 1)], ("label", "ants", "=bees"))
    write_csv(
        folder.per_class, [("ants", 0.5, 0.5, 0.5, 1)], ("label", "precision", "recall", "f1", "support")
    )
    return folder


def test_every_file_is_read(folder: RunFolder) -> None:
    run = RunReader(folder)
    assert run.recipe is not None and run.recipe.data.path == "x"
    for name in ("environment", "advice", "trunk", "metrics", "check"):
        assert getattr(run, name) == {"of": f"{name}.json"}
    assert (run.state, run.attempt) == ("interrupted", 3)
    assert run.classes == run.confusion[0] == run.predicted_classes == ("ants", "=bees")
    assert run.confusion[1] == ((0, 1), (0, 0))
    assert run.cooccurrence == (("ants", "=bees"), ((2, 1), (1, 1))) and run.numbers == ()
    assert run.split == ({"path": "=a/1.jpg", "label": "ants", "split": "val", "sha256": "12"},)
    assert run.digests == {"=a/1.jpg": "12"}
    assert run.bad_images == ({"path": "a/2.jpg", "split": "train", "reason": "cut short"},)
    assert run.plan[0]["trained"] == "True" and run.per_class[0]["support"] == "1"
    assert run.history == ({"epoch": 1.0}, {"epoch": 2.0, "eval_loss": 0.5})
    assert run.predictions == (PredictionRow("=a/1.jpg", "ants", "=bees", 0.75),)
    assert run.prediction_rows[0]["prob_ants"] == "0.25"


def test_the_test_covers_every_file_name(folder: RunFolder) -> None:
    assert {path.name for path in folder.path.iterdir()} == READERS.keys()


def test_absent_files_are_none_or_empty(tmp_path: Path) -> None:
    run = RunReader(RunFolder(tmp_path / "nowhere"))
    assert not any(read(run) for read in READERS.values())
    assert (run.state, run.attempt, run.digests) == ("done", 0, {})
    assert run.damaged == []


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"\xff\x00\n", b"[]\n1,2,3\n", None])
def test_damaged_files_are_refused_by_name(folder: RunFolder, name: str, content: bytes | None) -> None:
    path = folder.path / name
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    if name == "classes.txt" and content == b"[]\n1,2,3\n":
        return  # any text is a valid list of names
    with pytest.raises(UsageError if name == "recipe.yaml" else DataError) as refusal:
        READERS[name](RunReader(folder))
    assert name in refusal.value.asked and refusal.value.found and refusal.value.fix
    run = RunReader(folder, tolerant=True)
    assert not READERS[name](run)
    assert run.damaged == [name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.csv", "path,label,split,digest\na,ants,val,12\n"),
        ("predictions.csv", "path,label,predicted\na,ants,ants\n"),
        ("predictions.csv", "path,label,predicted,confidence\na,ants,ants,sure\n"),
        ("predictions.csv", "path,label,predicted,confidence\na,ants\n"),
        ("confusion_matrix.csv", ",ants,bees\nants,1,0\n"),
        ("predictions.csv", "path,label,predicted,confidence\na,ants,ants,nan\n"),
        ("predictions.csv", "path,label,predicted,confidence\na,ants,ants,1.5\n"),
        ("predictions.csv", "path,label,predicted,confidence,prob_ants,else\na,ants,ants,1,1,0\n"),
        ("predictions.csv", "path,label,predicted,confidence,prob_ants,prob_ants\na,ants,ants,1,1,0\n"),
        *(
            ("predictions.csv", f"path,label,predicted,confidence,prob_ants,prob_bees\na,ants,{row}\n")
            for row in (
                "ants,0.9,0.9,nan",
                "ants,0.9,0.9,inf",
                "ants,0.9,0.9,0.9",
                "ants,0.9,0.9",
                "ants,0.9,0.9,x",
                "ants,1,1.5,-0.5",
                "ants,0.8,0.9,0.1",
                "bees,0.9,0.9,0.1",
                "wasps,0.9,0.9,0.1",
                "ants,0.9,0.9,0.1,0",
            )
        ),
        ("confusion_matrix.csv", "label,ants,bees\nants,1,-1\nbees,0,1\n"),
        ("confusion_matrix.csv", f"label,ants,bees\nants,1,{10**400}\nbees,0,1\n"),
        ("confusion_matrix.csv", "label,ants,bees\nbees,1,0\nants,0,1\n"),
        ("confusion_matrix.csv", "label,ants,ants\nants,1,0\nants,0,1\n"),
        ("cooccurrence.csv", "label,ants,bees\nants,1,2\nbees,0,1\n"),
        ("cooccurrence.csv", "label,ants,bees\nants,1,0\n"),
        ("plan.csv", "group,stage,parameters,trained,rate\nhead,fc,many,True,0.1\n"),
        ("plan.csv", "group,stage,parameters,trained,rate\nhead,fc,-1,True,0.1\n"),
        *(
            ("history.csv", f"epoch,eval_loss\n{row}\n")
            for row in ("1,nan", "1,inf", "1,1e300", "-1,1", "0,1")
        ),
        *(("history.csv", f"epoch,eval_loss\n{row}\n") for row in ("1.5,1", "nan,1", "1e300,1", ",1")),
        ("history.csv", "eval_loss\n1\n"),
        ("history.csv", "epoch\nfirst\n"),
        ("metrics.json", "[" * 100_000),
    ],
)
def test_content_of_another_shape_is_refused(folder: RunFolder, name: str, text: str) -> None:
    (folder.path / name).write_text(text)
    with pytest.raises(FinetuneError, match="cannot be read"):
        READERS[name](RunReader(folder))


NUMBERS = "path,label,predicted,low,high\n"


def test_numbers_are_read(folder: RunFolder) -> None:
    folder.predictions.write_text(f"{NUMBERS}a,1.5,2,1,3\nb,-1,0.25,-1,1\n")
    run = RunReader(folder)
    assert run.numbers == ((1.5, 2.0), (-1.0, 0.25)) and run.predictions == () == run.predicted_classes


@pytest.mark.parametrize("row", ["a,1,nan,0,1", "a,inf,1,0,1", "a,1", "a,one,1,0,1", "a,1,1e300,0,1"])
def test_what_is_no_number_is_refused(folder: RunFolder, row: str) -> None:
    folder.predictions.write_text(f"{NUMBERS}{row}\n")
    with pytest.raises(DataError, match="cannot be read"):
        _ = RunReader(folder).numbers
    run = RunReader(folder, tolerant=True)
    assert (run.numbers, run.predictions, run.damaged) == ((), (), ["predictions.csv"])


def test_half_of_a_character_is_damage(folder: RunFolder) -> None:
    """JSON can name it, and no page, terminal or file can hold it."""
    folder.metrics.write_text('{"strategy": "top", "names": [{"\\ud800": 1}]}')
    with pytest.raises(DataError, match="cannot be read"):
        _ = RunReader(folder).metrics
    assert RunReader(folder, tolerant=True).metrics == {}


@pytest.mark.parametrize("name", READERS)
def test_a_sparse_file_is_refused_and_not_read(folder: RunFolder, name: str) -> None:
    """It takes no room on the disk, and would take all of the memory."""
    os.truncate(folder.path / name, 2**40)
    began = time.monotonic()
    with pytest.raises(FinetuneError):
        READERS[name](RunReader(folder))
    assert time.monotonic() - began < 10


def test_a_file_that_does_not_fit_in_memory_is_damaged(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reader, "read_object", fail)
    with pytest.raises(DataError, match="does not fit in memory"):
        assert RunReader(folder).metrics is None
    tolerant = RunReader(folder, tolerant=True)
    assert tolerant.metrics == {} and tolerant.damaged == ["metrics.json"]
