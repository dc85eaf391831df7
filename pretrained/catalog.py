"""The catalog of backbones: resolve a name to a card.

A name is resolved in this order; the first match is taken:

1. a folder on this machine: a finished run, or its ``model`` folder (with or without ``local-dir:``);
2. a prefix that names the source: ``timm/NAME``, ``torchvision/NAME``, ``zoo/NAME``, ``hf-hub:ORG/NAME``;
3. a name of timm, also of its earlier releases, with or without a tag (``resnet50.a1_in1k``), or of
   :mod:`pretrained.zoo`, whose published networks are registered with timm;
4. a name of torchvision.

For example, ``resnet50`` is timm's, and ``squeezenet1_0`` is torchvision's, because timm has none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torchvision.models as tv
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag
from timm.models._registry import _deprecated_models as timm_old_names

from finetune.errors import UsageError, suggest
from pretrained.config import (
    MAX_CONFIG_BYTES,
    TEMPERATURES,
    check_preprocessing,
    describe_invalid_value,
    read_arguments,
    read_config,
    read_interpolation,
    read_label_names,
    read_num_classes,
    read_number,
    read_pool,
    read_taps,
    read_target,
    read_text,
    read_value_range,
)
from pretrained.graph.pooling import Pool
from pretrained.hub import find_hub_file
from pretrained.packages import PACKAGES
from pretrained.preprocessing import (
    IMAGE_CHANNELS,
    MOST_CHANNELS,
    Preprocessing,
    find_resize,
    to_img_size,
)
from pretrained.zoo import NAMES as ZOO_NAMES

Library = Literal["timm", "torchvision"]
Place = Literal["hub", "url", "folder", "package", "none"]
HeadChoice = Literal["replace", "keep", "drop_fc"]


@dataclass(frozen=True)
class Card:
    """The metadata of a network: how it is built, where its weights are, and its preprocessing.

    Attributes:
        name: the full name; it resolves to this card.
        architecture: name of the network in its library.
        tag: name of its weights, ``""`` for none.
        location: hub id, URL, folder or installed file of the weights, depending on ``place``.
        num_classes: number of outputs of its own classifier.
        label_names: class names of its own classifier in index order, if known.
        head: how the classifier of an exported network differs from the library's.
        sha256: digest of the weights file of an exported network, or of an installed package.
        taps: points whose features the classifier reads, if these are not the last ones: module, number of
            the call, and whether it is the input of the call.
        pool: how these features are pooled.
        temperature: divisor of the logits before the softmax (arXiv:1706.04599).
        target: what its labels are (:func:`finetune.targets.read_target`); empty for one class an image.
    """

    name: str
    library: Library
    architecture: str
    tag: str
    place: Place
    location: str
    preprocessing: Preprocessing
    num_classes: int
    license: str = ""
    origin: str = ""
    label_names: tuple[str, ...] = ()
    head: HeadChoice = "keep"
    dropout: float = 0.0
    model_args: tuple[tuple[str, Any], ...] = ()
    sha256: str = ""
    taps: tuple[tuple[str, int, bool], ...] = ()
    pool: Pool = "auto"
    temperature: float = 1.0
    target: tuple[tuple[str, Any], ...] = ()

    @property
    def source(self) -> str:
        """What its name begins with: ``timm``, ``torchvision``, or ``zoo`` for :mod:`pretrained.zoo`."""
        return "zoo" if self.library == "timm" and self.architecture in ZOO_NAMES else self.library

    def with_input(self, preprocessing: Preprocessing) -> Card:
        """Return the card with other preprocessing."""
        return replace(self, preprocessing=preprocessing)

    def with_value_range(self, value_range: tuple[float, float]) -> Card:
        """Return the card with another range of values, which only photographs have."""
        if not self.preprocessing.is_rgb:
            return self
        return self.with_input(replace(self.preprocessing, value_range=value_range))


# --- resolving a name ----------------------------------------------------------------------------


def find_card(name: str, offline: bool = False) -> Card:
    """Return the card of a backbone by name, in the order of the module's docstring.

    Args:
        name: name, folder or hub id from the user.
        offline: never access the internet; only ``hf-hub:`` names do, to get their ``config.json``.

    Raises:
        UsageError: there is no such backbone; the message lists similar names.
        EnvironmentFaultError: the ``config.json`` of an ``hf-hub:`` name cannot be downloaded.
    """
    prefix, colon, rest = name.partition(":")
    if name and _is_folder(Path(name)) and (_holds_model(Path(name)) or not _is_known(name)):
        return _card_from_folder(name, Path(name))
    if _is_file(Path(name)):
        fix = f"Name the network that it belongs to: --backbone NAME --weights {name}"
        raise UsageError(f"--backbone {name}", "it is a file, and not the name of a network", fix)
    if colon and prefix == "local-dir":
        return _card_from_folder(name, Path(rest))
    if colon and prefix == "hf-hub":
        return _card_from_hub(name, rest, offline)
    library, slash, bare = name.partition("/")
    if not slash:
        library, bare = "", name
    if library not in ("", "timm", "torchvision", "zoo"):
        found = "it is no folder, and names with a slash start with timm/, torchvision/ or zoo/"
        fix = "Check the path, or see `finetune backbones`."
        raise UsageError(f"--backbone {name}", found + _nearest(Path(name).name), fix)
    if (library in ("", "timm") and is_model(bare)) or (library == "zoo" and bare in ZOO_NAMES):
        return _card_from_timm(timm_old_names.get(bare) or bare)
    if library in ("", "torchvision") and bare.partition(".")[0] in torchvision_names():
        return _card_from_torchvision(bare)
    found = f"there is no network of that name{_nearest(bare)}"
    raise UsageError(f"--backbone {name}", found, "See `finetune backbones`.")


def _holds_model(folder: Path) -> bool:
    return any(_is_file(path / "config.json") for path in (folder, folder / "model"))


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises on a name that is too long


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - as above


def _is_known(name: str) -> bool:
    """Whether it names a network; such a name has precedence over a folder without a model."""
    return is_model(name) or name.partition(".")[0] in torchvision_names()


def _nearest(name: str) -> str:
    return suggest(name.partition(".")[0], [*timm.list_models(), *torchvision_names()])


@cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers, without quantised ones."""
    return tuple(tv.list_models(module=tv))


def _card_from_timm(name: str) -> Card:
    architecture, tag = split_model_name_tag(name)
    config = _timm_config(name, architecture, tag)
    tag = config.tag or "" if config.has_weights else ""
    hub = config.hf_hub_id or ""
    place: Place = "hub" if hub and config.has_weights else "url" if config.url else "none"
    card = Card(
        name=f"timm/{architecture}{'.' + tag if tag else ''}",
        library="timm",
        architecture=architecture,
        tag=tag,
        place=place,
        location=(hub if place == "hub" else config.url) or "",
        preprocessing=_timm_preprocessing(config.to_dict()),
        num_classes=config.num_classes,
        license=config.license or "",
        origin=read_text(config.paper_ids or config.origin_url),
    )
    if card.source == "zoo":
        own = _with_channels(card.preprocessing, architecture)
        return replace(card, name=f"zoo/{architecture}", preprocessing=own)
    package = PACKAGES.get(f"{architecture}.{tag}")
    if package is None or (file := package.find()) is None:
        return card
    return replace(card, place="package", location=str(file), sha256=package.sha256, license=package.license)


def _timm_config(name: str, architecture: str, tag: str) -> Any:
    try:
        config = get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:
        known = timm.list_pretrained(f"{architecture}.*")
        found = f"{architecture} has no weights with the tag {tag!r}{suggest(name, known)}"
        fix = f"Its weights: {', '.join(known) or 'none'}."
        raise UsageError(f"--backbone {name}", found, fix) from None
    return config


def _timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    default = Preprocessing()
    return Preprocessing(
        img_size=to_img_size(*(config.get("input_size") or default.input_size)[-2:]),
        crop_pct=config.get("crop_pct") or default.crop_pct,
        resize=find_resize(config.get("crop_mode") or "center"),
        interpolation=read_interpolation(config.get("interpolation") or default.interpolation),
        mean=_three(config.get("mean") or default.mean),
        std=_three(config.get("std") or default.std),
    )


def _with_channels(preprocessing: Preprocessing, architecture: str) -> Preprocessing:
    """Return the preprocessing of an architecture; networks of one channel take RGB, and make it grey."""
    channels = get_pretrained_cfg(architecture).input_size[0] if architecture in ZOO_NAMES else IMAGE_CHANNELS
    if channels in (1, IMAGE_CHANNELS):
        return preprocessing
    return replace(preprocessing, channels=channels, kind="array")


def _read_bands(preprocessing: Preprocessing, ours: Any, inner: Any) -> Preprocessing:
    channels = int(read_number("channels", ours.get("channels"), 1, MOST_CHANNELS))
    mean, std = (tuple(float(value) for value in inner[key]) for key in ("mean", "std"))
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean and std have {len(mean)} and {len(std)} values, for {channels} channels")
    return replace(preprocessing, channels=channels, kind="bands", mean=mean, std=std)


def _three(values: Any) -> tuple[float, float, float]:
    """Return one value per channel; configurations of single-channel networks have one value."""
    first, second, third = values if len(values) == 3 else (values[0],) * 3
    return (float(first), float(second), float(third))


def _card_from_torchvision(name: str) -> Card:
    architecture, _, tag = name.partition(".")
    known = tv.get_model_weights(architecture)
    weights = known.DEFAULT if not tag else _torchvision_tag(name, tag, known)
    labels = tuple(weights.meta.get("categories") or ())
    return Card(
        name=f"torchvision/{architecture}.{weights.name.lower()}",
        library="torchvision",
        architecture=architecture,
        tag=weights.name.lower(),
        place="url",
        location=weights.url,
        preprocessing=_torchvision_preprocessing(weights),
        num_classes=len(labels) or 1000,
        license="cc-by-nc-4.0" if "SWAG" in weights.name else "bsd-3-clause",
        origin=weights.meta.get("recipe", ""),
        label_names=labels,
    )


def _torchvision_tag(name: str, tag: str, known: Any) -> Any:
    by_name = {weights.name.lower(): weights for weights in known}
    if tag.lower() not in by_name:
        found = f"torchvision has no weights with the tag {tag!r}{suggest(tag.lower(), by_name)}"
        raise UsageError(f"--backbone {name}", found, f"Its weights: {', '.join(by_name)}.")
    return by_name[tag.lower()]


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    view = weights.transforms()
    crop, resize = view.crop_size[0], view.resize_size[0]
    crop_pct = crop / resize
    if math.floor(crop / crop_pct) != resize:  # the size to resize to is computed from this by flooring
        crop_pct = math.nextafter(crop_pct, 0)
    return Preprocessing(
        img_size=crop,
        crop_pct=min(crop_pct, 1.0),
        interpolation=view.interpolation.value,
        mean=_three(view.mean),
        std=_three(view.std),
    )


def _card_from_folder(name: str, folder: Path) -> Card:
    model = folder / "model" if _is_file(folder / "model" / "config.json") else folder
    path = model / "config.json"
    if not _is_file(path) or name == "local-dir:":
        found = "there is no config.json in it" if _is_folder(folder) else "there is no such folder"
        fix = "Name a finished run, or a folder with config.json and model.safetensors."
        raise UsageError(f"--backbone {name}", found, fix)
    config = read_config(f"--backbone {name}", path)
    return _card_from_config(f"local-dir:{folder}", config, place="folder", location=str(model))


def _card_from_config(name: str, config: dict[str, Any], place: Place, location: str) -> Card:
    try:
        return _card_from_values(name, config, place, location)
    except (AttributeError, LookupError, ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"--backbone {name}", describe_invalid_value(error), "Export it again.") from None


def _card_from_values(name: str, config: dict[str, Any], place: Place, location: str) -> Card:
    ours = config.get("finetune", {})
    library: Library = "torchvision" if ours.get("library") == "torchvision" else "timm"
    architecture, tag = split_model_name_tag(ours.get("architecture") or config["architecture"])
    known = torchvision_names() if library == "torchvision" else timm.list_models()
    if architecture not in known:
        architecture = architecture[:100]
        found = f"{library} does not know its architecture {architecture!r}{suggest(architecture, known)}"
        raise UsageError(f"--backbone {name}", found, f"Upgrade {library}, or take another backbone.")
    inner = config.get("pretrained_cfg") or config
    head = ours.get("head", "keep")
    if head not in get_args(HeadChoice):
        raise ValueError(f"head {head!r}")
    preprocessing = replace(_timm_preprocessing(inner), value_range=read_value_range(ours.get("value_range")))
    preprocessing = _with_channels(preprocessing, architecture)
    if ours.get("kind") == "bands":
        preprocessing = _read_bands(preprocessing, ours, inner)
    check_preprocessing(preprocessing.to_dict())
    return Card(
        name=name,
        library=library,
        architecture=architecture,
        tag=read_text(tag or inner.get("tag")),
        place=place,
        location=location,
        preprocessing=preprocessing,
        num_classes=read_num_classes(config, inner),
        license=read_text(inner.get("license")),
        origin=read_text(inner.get("paper_ids") or inner.get("origin_url")),
        label_names=read_label_names(config) or read_label_names(inner),
        head=head,
        dropout=read_number("dropout", ours.get("dropout", 0.0), 0, 0.999),
        model_args=read_arguments(config),
        sha256=read_text(ours.get("sha256")),
        taps=read_taps(ours.get("taps")),
        temperature=read_number("temperature", ours.get("temperature", 1.0), *TEMPERATURES),
        target=read_target(ours.get("target")),
        pool=read_pool(ours.get("pool")),
    )


def _card_from_hub(name: str, hub_id: str, offline: bool) -> Card:
    asked = f"--backbone {name}"
    path = find_hub_file(asked, hub_id, ("config.json",), offline, most_bytes=MAX_CONFIG_BYTES)
    return _card_from_config(name, read_config(asked, path), place="hub", location=hub_id)


# --- listing -------------------------------------------------------------------------------------


def list_names(search: str = "") -> Iterator[str]:
    """Yield every full name that contains ``search`` (case-insensitive): timm, torchvision, the zoo."""
    tagged, wanted = timm.list_pretrained(), search.lower()
    bare = set(timm.list_models()) - {name.partition(".")[0] for name in tagged} - set(ZOO_NAMES)
    timm_names = (f"timm/{name}" for name in sorted([*tagged, *bare]))
    torchvision = (f"torchvision/{name}" for name in torchvision_names())
    for name in [*timm_names, *torchvision, *(f"zoo/{name}" for name in ZOO_NAMES)]:
        if wanted in name.lower():
            yield name
