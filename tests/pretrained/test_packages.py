"""Weights of installed packages: found without an import, named as timm names them, and compared by hash."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from finetune.data.transforms import Normalizer, build_eval_transform
from finetune.errors import UsageError
from pretrained import catalog
from pretrained.backbone import load_backbone, load_source
from pretrained.catalog import find_card
from pretrained.efficientnet_names import is_first_port, to_timm_names
from pretrained.packages import PACKAGES, WeightsPackage
from pretrained.weights import find_cached, find_weights

LITE = "tf_efficientnet_lite0"
PALACE = 698
"""Index of the class in ImageNet-1k."""
OUTER = {
    "conv_stem": "_conv_stem",
    "bn1": "_bn0",
    "conv_head": "_conv_head",
    "bn2": "_bn1",
    "classifier": "_fc",
}


def to_first_port(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other direction, from the blocks as they come: each convolution has the norm after it."""
    renamed, numbers = {}, dict[str, int]()
    for name, tensor in state.items():
        found = re.match(r"(blocks\.\d+\.\d+)\.(.*)", name)
        if found is None:
            layer, _, rest = name.partition(".")
            renamed[f"{OUTER[layer]}.{rest}"] = tensor
            continue
        block, rest = found.groups()
        expands = f"{block}.conv_pwl.weight" in state
        convs = ["conv_pw", "conv_dw", "conv_pwl"] if expands else ["conv_dw", "conv_pw"]
        theirs = ["_expand_conv", "_depthwise_conv", "_project_conv"][-len(convs) :]
        norms = {f"bn{place}": f"_bn{place - len(convs) + 2}" for place in range(1, len(convs) + 1)}
        layers = dict(zip(convs, theirs, strict=True)) | norms
        layers |= {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
        layer, _, what = rest.rpartition(".")
        number = numbers.setdefault(block, len(numbers))
        renamed[f"_blocks.{number}.{layers[layer]}.{what}"] = tensor
    return renamed


@pytest.mark.parametrize("name", [LITE, "efficientnet_b0"])
def test_every_tensor_of_the_first_port_gets_its_name(name: str) -> None:
    network = timm.create_model(name)
    state = network.state_dict()
    theirs = to_first_port(state)
    assert is_first_port(theirs) and not is_first_port(state)
    renamed = to_timm_names(theirs, network)
    assert list(renamed) == list(state)
    assert all(torch.equal(renamed[key], state[key]) for key in state)
    odd = {"_blocks.99._bn0.weight": torch.zeros(1), "_blocks.x": torch.zeros(1), "other": torch.zeros(1)}
    assert set(to_timm_names(theirs | odd, network)) == set(state) | set(odd)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PACKAGES)
def test_the_real_weights_are_whole_and_see_a_palace(name: str) -> None:
    """On a photograph of scikit-learn's: the Summer Palace in Beijing."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    card = find_card(name)
    assert card.place == "package", f"pip install {PACKAGES[name].name}"
    source = load_source(card, offline=True)
    assert source.match.matched == source.match.total and not source.match.head_replaced
    transform = build_eval_transform(card.preprocessing)
    image = transform(Image.fromarray(load_sample_image("china.jpg")))
    images = Normalizer(card.preprocessing, torch.device("cpu"))(image[None])
    with torch.inference_mode():
        assert PALACE in source.network.eval()(images).topk(5).indices


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution whose module must not be imported; the path of its weights."""
    root, folder = tmp_path / "site", tmp_path / "site/some_lite"
    info = root / "some_lite-1.0.dist-info"
    for path in (folder, info):
        path.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-lite\nVersion: 1.0\n")
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.manual_seed(0)
    torch.save(to_first_port(timm.create_model(LITE).state_dict()), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(
        PACKAGES, f"{LITE}.in1k", WeightsPackage("some-lite", "some_lite/weights.pth", digest)
    )
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    return folder / "weights.pth"


@pytest.mark.slow
def test_an_installed_file_is_used_before_any_network_is_asked(package: Path) -> None:
    card = find_card(LITE)
    assert (card.name, card.place, card.license) == (f"timm/{LITE}.in1k", "package", "apache-2.0")
    assert find_cached(card) == find_weights(card, offline=True) == package
    source = load_source(card, offline=True)
    assert source.match.matched == source.match.total and not source.match.head_replaced
    torch.manual_seed(0)
    expected = timm.create_model(LITE).eval()
    images = torch.randn(1, *card.preprocessing.input_size)
    with torch.inference_mode():
        assert torch.equal(source.network.eval()(images), expected(images))
    assert load_backbone(card, classes=["a", "b"], offline=True).match.missing == ()
    assert "some_lite" not in sys.modules


def test_another_file_in_the_package_is_refused(package: Path) -> None:
    content = bytearray(package.read_bytes())
    content[-1] ^= 1
    package.write_bytes(content)
    with pytest.raises(UsageError, match="sha256"):
        load_source(find_card(LITE), offline=True)


def test_without_the_package_the_card_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PACKAGES", {f"{LITE}.in1k": WeightsPackage("no-such-package", "x", "0")})
    assert find_card(LITE).place == "hub"
