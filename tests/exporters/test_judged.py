"""The images that an export is compared on: unchanged images of the run, or a reason why there are none."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.data.transforms import build_eval_transform
from finetune.errors import DataError
from finetune.exporters import source as module
from finetune.exporters.source import ProofInputs, load_evaluated
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from pretrained.catalog import Card, find_card
from tests.conftest import draw


@pytest.fixture
def card() -> Card:
    card = find_card("timm/test_resnet")
    return replace(card, preprocessing=replace(card.preprocessing, img_size=32), num_classes=2)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Ten evaluated images of two classes; the second class has the name of a formula."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    paths = [f"val/{name}/{number}.png" for name in ("a", "=b") for number in range(5)]
    split, rows = [], []
    for place, path in enumerate(paths):
        file = tmp_path / "data" / path
        draw(file, (20 * place, 0, 0), place)
        split.append((path, file.parent.name, "val", hashlib.sha256(file.read_bytes()).hexdigest()))
        share = (place + 1) / 20
        rows.append((path, file.parent.name, "a", 1 - share, 1 - share, share))
    write_csv(folder.split, split, ("path", "label", "split", "sha256"))
    write_csv(folder.predictions, rows, ("path", "label", "predicted", "confidence", "prob_a", "prob_=b"))
    return folder


def load(run: RunFolder, card: Card) -> ProofInputs:
    found = load_evaluated(run, run.path.parent / "data", card)
    assert isinstance(found, ProofInputs), found
    return found


def test_views_and_probabilities_belong_together(run: RunFolder, card: Card) -> None:
    found = load(run, card)
    assert (found.num_evaluated, found.source, found.notes) == (10, "judged images", ())
    assert found.recorded is not None
    assert found.recorded[:, 1].tolist() == pytest.approx([(place + 1) / 20 for place in range(10)])
    transform = build_eval_transform(card.preprocessing)
    last = run.path.parent / "data" / "val" / "=b" / "4.png"
    assert found.views[9].equal(transform(Image.open(last).convert("RGB")))


def test_many_images_are_sampled_evenly(run: RunFolder, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 5)
    found = load(run, card)
    assert found.recorded is not None
    assert (found.recorded[:, 1] * 20).round().tolist() == [1, 3, 5, 7, 9]
    assert (len(found.views), found.num_evaluated) == (5, 10)


def test_of_large_images_fewer_are_compared(
    run: RunFolder, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 3 * 32 * 32)
    assert len(load(run, card).views) == 3


def test_changed_and_missing_images_are_left_out_and_named(run: RunFolder, card: Card) -> None:
    data = run.path.parent / "data" / "val"
    (data / "a" / "0.png").unlink()
    draw(data / "a" / "1.png", (0, 0, 200), 99)
    found = load(run, card)
    assert (len(found.views), found.num_evaluated) == (8, 10)
    assert found.notes == (
        "2 of 10 evaluated images are missing or have changed: val/a/0.png (no such file or directory)",
    )
    assert found.recorded is not None
    assert found.recorded[0, 1].item() == pytest.approx(3 / 20)


def test_without_images_there_is_a_reason(run: RunFolder, card: Card, tmp_path: Path) -> None:
    why = load_evaluated(run, tmp_path / "elsewhere", card)
    assert why == "none of its 10 evaluated images is unchanged: val/a/0.png (no such file or directory)"
    run.predictions.unlink()
    assert load_evaluated(run, tmp_path / "data", card) == f"{run.predictions} does not exist"


def test_probabilities_of_other_classes_are_not_compared(run: RunFolder, card: Card) -> None:
    found = load(run, replace(card, num_classes=3))
    assert found.recorded is None
    assert found.notes == (
        "predictions.csv holds no probabilities of the model's 3 classes in their order: it is not compared",
    )
    assert torch.is_tensor(found.views)


@pytest.mark.parametrize(("names", "compared"), [(("a", "=b"), True), (("=b", "a"), False)])
def test_columns_must_be_the_classes_in_order(
    run: RunFolder, card: Card, names: tuple[str, ...], compared: bool
) -> None:
    found = load(run, replace(card, label_names=names))
    assert (found.recorded is not None, not found.notes) == (compared, compared)


def test_a_table_without_paths_is_refused(run: RunFolder, card: Card) -> None:
    text = run.predictions.read_text()
    run.predictions.write_text(text.replace("path,", "file,", 1))
    with pytest.raises(DataError, match="there is no column path"):
        load(run, card)
