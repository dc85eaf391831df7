"""What comes with the installation is whole, is what its card says, and loads as any other weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from finetune.errors import UsageError
from pretrained import bundle
from pretrained.backbone import load_backbone, load_source
from pretrained.catalog import find_card, list_names
from pretrained.weights import find_cached, find_weights

MOST_BYTES = 12_000_000
ROOT = Path(__file__).parents[2]
NAMES = bundle.list_bundled()


def test_there_is_one() -> None:
    assert NAMES
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    assert "bundled/*/*" in packed["pretrained"]
    assert list(list_names("finetune/")) == [f"finetune/{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_card_says(name: str) -> None:
    folder = bundle.find_bundled(name)
    assert folder is not None
    content = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert len(content) <= MOST_BYTES
    card = find_card(f"finetune/{name}")
    readme = (folder / "README.md").read_text("utf-8")
    assert card.sha256 == digest
    size = f"{len(content):,} bytes"
    for fact in (digest, size, card.architecture, "top-1", "top-5", "seed 0", "Apache-2.0"):
        assert fact in readme, fact
    assert f"{card.preprocessing.img_size} x {card.preprocessing.img_size} pixels" in readme
    recipe = readme.partition("--recipe ")[2].split()[0]
    assert (ROOT / "recipes" / f"{recipe}.yaml").is_file()
    matrices = [one for one in load_file(folder / "model.safetensors").values() if one.ndim > 1]
    assert {one.dtype for one in matrices} == {torch.float16}


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_as_any_other(name: str) -> None:
    card = find_card(f"finetune/{name}")
    assert find_card(name) == card, "without its prefix, too"
    assert find_cached(card) == find_weights(card, offline=True)
    source = load_source(card, offline=True)
    assert source.match.matched == source.match.total
    assert not source.match.head_replaced
    assert all(parameter.dtype == torch.float32 for parameter in source.network.parameters())
    new = load_backbone(card, classes=["ants", "bees"], offline=True)
    assert new.network(torch.zeros(2, *card.preprocessing.input_size)).shape == (2, 2)
    # Plain timm reads the same numbers from the same folder.
    plain = timm.create_model(f"local-dir:{card.location}", pretrained=True).eval()
    images = torch.randn(2, *card.preprocessing.input_size)
    with torch.inference_mode():
        assert torch.equal(plain(images), source.network.eval()(images))


def test_a_flipped_bit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(find_card(NAMES[0]).location).parent, tmp_path / "bundled")
    monkeypatch.setattr(bundle, "_root", lambda: tmp_path / "bundled")
    file = tmp_path / "bundled" / NAMES[0] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match="sha256"):
        load_backbone(find_card(f"finetune/{NAMES[0]}"), classes=["a", "b"])


def test_its_classifier_is_kept_for_its_own_labels_only() -> None:
    card = find_card(f"finetune/{NAMES[0]}")
    labels = list(card.label_names)
    assert len(labels) == card.num_classes
    assert load_backbone(card, classes=labels, head="keep").match.head
    with pytest.raises(UsageError, match="other labels or another order"):
        load_backbone(card, classes=labels[::-1], head="keep")


def test_a_bundled_name_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="no network of that name"):
        find_card("finetune/resnet50")
    assert json.loads((Path(find_card(NAMES[0]).location) / "config.json").read_text("utf-8"))["architecture"]
