"""Names become cards: the order of resolution, refusals, preprocessing, folders of others."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torchvision.transforms import InterpolationMode

from finetune.errors import UsageError
from pretrained.catalog import (
    _torchvision_preprocessing,
    find_card,
    list_names,
    torchvision_names,
)
from pretrained.sizes import count_parameters, num_parameters, parameter_counts

Folder = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> Folder:
    def write(content: object, name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    return write


# --- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full", "library"),
    [
        ("resnet18", "timm/resnet18.a1_in1k", "timm"),
        ("resnet18.tv_in1k", "timm/resnet18.tv_in1k", "timm"),
        ("timm/resnet18", "timm/resnet18.a1_in1k", "timm"),
        ("timm/resnet18.a3_in1k", "timm/resnet18.a3_in1k", "timm"),
        ("squeezenet1_0", "torchvision/squeezenet1_0.imagenet1k_v1", "torchvision"),
        ("torchvision/resnet50", "torchvision/resnet50.imagenet1k_v2", "torchvision"),
        ("torchvision/resnet50.imagenet1k_v1", "torchvision/resnet50.imagenet1k_v1", "torchvision"),
        ("torchvision/resnet50.IMAGENET1K_V1", "torchvision/resnet50.imagenet1k_v1", "torchvision"),
        ("vit_b_16.imagenet1k_swag_e2e_v1", "torchvision/vit_b_16.imagenet1k_swag_e2e_v1", "torchvision"),
        ("resnet17t", None, None),
        # names of timm's past releases
        ("convnext_tiny_in22ft1k", "timm/convnext_tiny.fb_in22k_ft_in1k", "timm"),
        ("timm/tf_efficientnet_b0_ns", "timm/tf_efficientnet_b0.ns_jft_in1k", "timm"),
        # an architecture without published weights
        ("resnet10t_no", None, None),
        ("resnet14d", None, None),
    ],
)
def test_names(name: str, full: str | None, library: str | None) -> None:
    if full is None:
        with pytest.raises(UsageError):
            find_card(name)
        return
    card = find_card(name)
    assert (card.name, card.library) == (full, library)
    assert find_card(card.name) == card


def test_a_folder_wins_over_a_name(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet18").symlink_to(tiny, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert find_card("resnet18").place == "folder"
    assert find_card("timm/resnet18").place == "hub"


def test_a_run_is_its_model_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny, target_is_directory=True)
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        card = find_card(name)
        assert (card.name, card.location) == (f"local-dir:{tmp_path}", str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet5", ["'resnet50'", "did you mean"]),
        ("torchvision/squeezenet1_2", ["'squeezenet1_0'"]),
        ("timm/squeezenet1_0", ["there is no network of that name"]),
        (
            "resnet18.a1_in2k",
            ["no weights with the tag 'a1_in2k'", "'resnet18.a1_in1k'", "resnet18.gluon_in1k"],
        ),
        ("torchvision/vgg11.imagenet1k_v2", ["no weights with the tag", "did you mean 'imagenet1k_v1'"]),
        ("microsoft/resnet18", ["start with timm/, torchvision/ or zoo/", "'resnet18'"]),
        ("./nowhere", ["it is no folder"]),
        ("local-dir:nowhere", ["there is no such folder"]),
        ("local-dir:", ["there is no"]),
        ("", ["there is no network of that name"]),
        ("timm/", ["there is no network of that name"]),
        ("hf-hub:", ["no name of a hub repository"]),
        ("hf-hub:a/b/c", ["no name of a hub repository"]),
    ],
)
def test_refusals_name_what_is_near(name: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(name)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.asked.startswith("--backbone")


def test_every_listed_name_is_a_card_that_finds_itself_again() -> None:
    names = list(list_names())
    assert len(names) == len(set(names)) > 2000
    for name in names:
        card = find_card(name)
        assert find_card(card.name) == card
        assert card.place != "none" or not card.tag
        assert bool(card.location) == (card.place != "none")
    of_timm = [name for name in names if name.startswith(("timm/", "zoo/"))]
    assert {name.partition("/")[2].partition(".")[0] for name in of_timm} == set(timm.list_models())


def test_a_search_ignores_case() -> None:
    assert list(list_names("SqueezeNet")) == ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]
    assert "timm/resnet18.a1_in1k" in list(list_names("resnet18.a"))


# --- preprocessing and passports -----------------------------------------------------------------


def test_preprocessing_is_timms_own() -> None:
    """Sapiens2 takes a rectangle, 1024 x 768."""
    for name in timm.list_pretrained():
        own = resolve_data_config({}, pretrained_cfg=get_pretrained_cfg(name).to_dict())
        ours = find_card(f"timm/{name}").preprocessing.to_timm()
        assert {key: _plain(own[key]) for key in ours} == {key: _plain(value) for key, value in ours.items()}
    rectangle = find_card("timm/vit_base_patch16_sapiens2.fb").preprocessing
    assert (rectangle.size, rectangle.size_name) == ((1024, 768), "1024x768")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def test_preprocessing_is_torchvisions_own_for_every_weights() -> None:
    num_weights = 0
    for name in torchvision_names():
        for weights in tv.get_model_weights(name):
            view = weights.transforms()
            card = find_card(f"torchvision/{name}.{weights.name.lower()}")
            resize, crop, *_, normalize = create_transform(
                **card.preprocessing.to_timm(), is_training=False
            ).transforms
            assert _side(resize.size) == view.resize_size[0], card.name
            assert _side(crop.size) == view.crop_size[0], card.name
            assert resize.interpolation == view.interpolation
            assert normalize.mean.tolist() == pytest.approx(view.mean)
            assert normalize.std.tolist() == pytest.approx(view.std)
            assert 0 < card.preprocessing.crop_pct <= 1
            assert math.isclose(card.preprocessing.crop_pct, view.crop_size[0] / view.resize_size[0])
            assert card.num_classes == 1000
            assert len(card.label_names) in (0, 1000)
            num_weights += 1
    assert num_weights > 100


def test_a_share_gives_back_the_resize_it_came_from() -> None:
    """A division and its inverse may lose a pixel; timm computes the resize by flooring."""
    pairs = [(crop, resize) for crop in range(28, 600, 7) for resize in range(crop, 2 * crop, 5)]
    assert any(math.floor(crop / (crop / resize)) != resize for crop, resize in pairs)
    filter_ = InterpolationMode.BILINEAR
    for crop, resize in pairs:
        view = SimpleNamespace(
            crop_size=[crop], resize_size=[resize], interpolation=filter_, mean=[0.5] * 3, std=[0.5] * 3
        )
        weights = SimpleNamespace(transforms=lambda view=view: view)
        assert math.floor(crop / _torchvision_preprocessing(weights).crop_pct) == resize


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


@pytest.mark.parametrize(
    ("name", "license_name"),
    [
        ("timm/resnet18.a1_in1k", "apache-2.0"),
        ("timm/resnet18.fb_swsl_ig1b_ft_in1k", "cc-by-nc-4.0"),
        ("torchvision/resnet18", "bsd-3-clause"),
        ("torchvision/vit_b_16.imagenet1k_swag_e2e_v1", "cc-by-nc-4.0"),
        ("torchvision/vit_b_16.imagenet1k_v1", "bsd-3-clause"),
    ],
)
def test_licences(name: str, license_name: str) -> None:
    assert find_card(name).license == license_name


# --- folders of others ---------------------------------------------------------------------------

VALUES = {"input_size": [3, 96, 64], "crop_pct": 0.5, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}


def test_a_new_config(write_config: Folder) -> None:
    config = {
        "architecture": "test_resnet.r160_in1k",
        "num_classes": 2,
        "label_names": ["ant", "bee"],
        "model_args": {"in_chans": 3},
        "pretrained_cfg": VALUES
        | {"num_classes": 1000, "license": "mit", "paper_ids": ["arXiv:1", "arXiv:2"]},
        "a future key": 1,
    }
    card = find_card(str(write_config(config)))
    assert (card.architecture, card.tag, card.num_classes) == ("test_resnet", "r160_in1k", 2)
    assert card.label_names == ("ant", "bee")
    assert (card.license, card.origin) == ("mit", "arXiv:1, arXiv:2")
    assert card.model_args == (("in_chans", 3),)
    view = card.preprocessing
    assert (view.img_size, view.crop_pct, view.interpolation, view.mean) == (
        (96, 64),
        0.5,
        "bilinear",
        (0.1, 0.2, 0.3),
    )
    assert view.std == (0.229, 0.224, 0.225)


def test_a_legacy_flat_config(write_config: Folder) -> None:
    config = VALUES | {
        "architecture": "test_resnet",
        "num_classes": 2,
        "labels": ["ant", "bee"],
        "license": "mit",
    }
    card = find_card(f"local-dir:{write_config(config)}")
    assert (card.num_classes, card.label_names, card.license) == (2, ("ant", "bee"), "mit")
    assert card.preprocessing.crop_pct == 0.5


def test_labels_by_index_are_put_in_order(write_config: Folder) -> None:
    names = {str(index): f"class {index}" for index in (10, 9, *range(9), 11)}
    card = find_card(
        str(write_config({"architecture": "test_resnet", "num_classes": 12, "label_names": names}))
    )
    assert card.label_names == tuple(f"class {index}" for index in range(12))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "names no architecture"),
        ({"num_classes": 2}, "names no architecture"),
        ({"architecture": 5}, "names no architecture"),
        (
            {"architecture": "resnet_18"},
            "timm does not know its architecture 'resnet_18'; did you mean 'resnet18'",
        ),
        (
            {"architecture": "squeezenet1_2", "finetune": {"library": "torchvision"}},
            "torchvision does not know its architecture 'squeezenet1_2'; did you mean",
        ),
        ({"architecture": "resnet18", "pretrained_cfg": 3}, "a value of the wrong kind"),
        ({"architecture": "resnet18", "pretrained_cfg": {"mean": "grey"}}, "a value of the wrong kind"),
        ({"architecture": "resnet18", "pretrained_cfg": {"input_size": 3}}, "a value of the wrong kind"),
        ({"architecture": "resnet18", "model_args": [1]}, "a value of the wrong kind"),
        ({"architecture": "resnet18", "num_classes": "many"}, "a value of the wrong kind"),
        ({"architecture": "resnet18", "finetune": {"head": "none"}}, "a value of the wrong kind"),
        ({"architecture": "resnet18", "finetune": "yes"}, "a value of the wrong kind"),
    ],
)
def test_damaged_configs_are_refused(write_config: Folder, content: object, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(str(write_config(content)))
    assert part in str(caught.value)


def test_a_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        find_card(str(tmp_path))


# --- sizes.csv -----------------------------------------------------------------------------------


def test_every_architecture_has_a_size() -> None:
    known = {("timm", name) for name in timm.list_models()}
    known |= {("torchvision", name) for name in torchvision_names()}
    assert {key[:2] for key in parameter_counts()} == known
    assert all(num_parameters(find_card(name)) for name in list_names())


# MetaFormers are in it for their head of two layers.
SAMPLE = ["timm/test_resnet", "torchvision/squeezenet1_0", "timm/caformer_s18", "timm/convformer_s18"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SAMPLE + random.Random(5).sample([*list_names()], 15))
def test_sizes_are_right(name: str) -> None:
    card = find_card(name)
    assert num_parameters(card) == count_parameters(card)
    if card.library == "timm":
        with torch.device("meta"):
            network = timm.create_model(card.architecture, num_classes=card.num_classes)
        assert num_parameters(card) == sum(parameter.numel() for parameter in network.parameters())
