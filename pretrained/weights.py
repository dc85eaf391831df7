"""Find or download weights, load them into a network, and report which tensors match.

Only tensors are read: safetensors, or PyTorch files with ``weights_only=True``, without a fallback.
Published weights are taken from the caches of their libraries, and downloaded into them:

- timm: the Hugging Face cache (``HF_HOME``), from the hub or the mirror in ``HF_ENDPOINT``;
- torchvision: ``$TORCH_HOME/hub/checkpoints``, from its server or the mirror in ``FINETUNE_MIRROR`` (the URL
  of a folder with files of the same names).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib import request
from urllib.parse import unquote, urlsplit

import timm
import torch
from timm.models import _builder as timm_builder
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from finetune.errors import DiskError, EnvironmentFaultError, UsageError
from pretrained import hub
from pretrained.catalog import Card
from pretrained.hub import Progress, cached_on_hub, find_hub_file, offline_by_environment
from pretrained.network import timm_arguments, timm_name
from pretrained.state_dict import read_weights

MIRROR_VARIABLE = "FINETUNE_MIRROR"
MIN_MATCHED_SHARE = 0.9
"""Smallest share of the backbone's tensors that must match; otherwise the weights are of another network."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_BATCH_COUNTER = "num_batches_tracked"
"""A buffer of BatchNorm without learned values; files from before 2018 do not have it."""
_LEFTOVER_SECONDS = 3600
_CHUNK = 2**17
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.")
"""The first digits of a file's sha256 in its name."""
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class Match:
    """Which tensors of a network were loaded from a file.

    Attributes:
        source: the file; ``""`` for random weights.
        matched: number of backbone tensors that were loaded.
        total: number of backbone tensors: parameters and buffers, without the classifier and counters.
        missing: backbone tensors that kept their random values.
        head: tensors of the classifier.
        head_replaced: whether a new head replaces them, otherwise all are kept.
        unused: tensors of the file that the network does not have.
    """

    source: str
    matched: int
    total: int
    missing: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_replaced: bool = False
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.source:
            return f"random weights: {self.total} tensors, none loaded"
        head = "replaced" if self.head_replaced else "kept"
        missing = (
            f", {len(self.missing)} missing ({_some_of(self.missing)})" if self.missing else ", 0 missing"
        )
        unused = f", {len(self.unused)} unused in the file ({_some_of(self.unused)})" if self.unused else ""
        backbone = f"{self.matched} of {self.total} tensors matched"
        classifier = f"{len(self.head)} {head} (the head: {_some_of(self.head)})"
        return f"{backbone}, {classifier}{missing}{unused}; from {self.source}"


def _some_of(names: Collection[str]) -> str:
    shown = ", ".join(name[:100] for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


# --- finding -------------------------------------------------------------------------------------


def find_weights(
    card: Card, weights: str | None = None, offline: bool = False, on_progress: Progress | None = None
) -> Path:
    """Return the file with a backbone's weights; download it if necessary and allowed.

    Args:
        card: the backbone.
        weights: a file or folder from the user, None for the card's own weights.
        offline: never access the internet.
        on_progress: called during a download.

    Raises:
        UsageError: the file or folder does not exist or has no weights, or none were published.
        EnvironmentFaultError: they are not on this machine and cannot be downloaded.
    """
    if weights is not None:
        return _file_in(f"--weights {weights}", Path(weights))
    if card.place in ("folder", "bundled"):
        return _file_in(f"--backbone {card.name}", Path(card.location))
    if card.place == "none":
        found = f"no weights were ever published for {card.name}"
        fix = "Give --weights FILE, take a backbone that has some, or --strategy scratch."
        raise UsageError(f"--backbone {card.name}", found, fix)
    cached = find_cached(card)
    if cached is not None:
        return cached
    if card.place == "hub":
        asked, fix = f"--backbone {card.name}", "give --weights FILE"
        return find_hub_file(asked, card.location, _HUB_FILES, offline, fix, on_progress)
    if offline or offline_by_environment():
        raise _no_url_file(card, hub.OFFLINE)
    return _download(card, on_progress)


def find_cached(card: Card) -> Path | None:
    """Return the card's weights file if it is on this machine, else None."""
    if card.place in ("folder", "bundled"):
        return next((path for path in _weight_files(Path(card.location))), None)
    if card.place == "url":
        path = _torch_file(card)
        return path if path.is_file() else None
    if card.place == "hub":
        return cached_on_hub(card.location, _HUB_FILES)
    return None


def _file_in(asked: str, path: Path) -> Path:
    if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises on a name that is too long
        return path
    if not os.path.exists(path):  # noqa: PTH110
        raise UsageError(asked, "there is no such file or folder", "Check the path.")
    files = _weight_files(path / "model" if (path / "model" / "config.json").is_file() else path)
    if not files:
        raise UsageError(asked, f"the folder holds no {', '.join(_SUFFIXES)} file", "Name the file itself.")
    if len(files) > 1 and files[0].name != _HUB_FILES[0]:
        found = f"the folder holds several weight files: {_some_of([file.name for file in files])}"
        raise UsageError(asked, found, "Name one of them.")
    return files[0]


def _weight_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.glob("*")) if path.suffix in _SUFFIXES and path.is_file()]
    return sorted(files, key=lambda path: path.name != _HUB_FILES[0])


def _torch_file(card: Card) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(card.location).path).name


# --- downloading ---------------------------------------------------------------------------------


def _download(card: Card, on_progress: Progress | None) -> Path:
    """Download into torch.hub's cache; the partial file is renamed after its hash was checked."""
    target = _torch_file(card)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with _with_login(_url_of(card)) as url:
            digest = _copy(url, part, on_progress)
        expected = _DIGEST.search(target.name)
        if expected and not digest.startswith(expected[1]):
            raise ValueError(f"invalid hash value: {digest[:16]}..., and its name says {expected[1]}")
        part.replace(target)
    except (OSError, ValueError, HTTPException) as error:  # ValueError also if the mirror is no URL
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"writing {target}", "there is no room for it", "Make room on the disk."
            ) from None
        raise _no_url_file(card, " ".join(str(error).split()) or type(error).__name__) from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _remove_leftovers(target: Path) -> None:
    """Remove partial files of killed downloads: those that were not written for an hour."""
    for part in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _LEFTOVER_SECONDS:
                part.unlink()


def _copy(url: str, part: Path, on_progress: Progress | None) -> str:
    """Download a URL into a file, and return the sha256 of its content."""
    digest, done = hashlib.sha256(), 0
    # The URL is the library's own, or a mirror from the user.
    with request.urlopen(url, timeout=hub.NETWORK_TIMEOUT_SECONDS) as answer, part.open("wb") as file:  # noqa: S310
        total = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read1(_CHUNK):  # the available bytes; a whole chunk can take long
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    if done < total:
        raise OSError(f"the connection ended after {done:,} of {total:,} bytes")
    return digest.hexdigest()


def _url_of(card: Card) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}/{_torch_file(card).name}" if mirror else card.location


@contextmanager
def _with_login(url: str) -> Iterator[str]:
    """Yield a URL without ``user:password@``, and give both to urllib, which does not read them in URLs."""
    parts = urlsplit(url)
    if parts.username is None:
        yield url
        return
    bare = hub.without_user(url)
    users = request.HTTPPasswordMgrWithPriorAuth()
    users.add_password(None, bare, unquote(parts.username), unquote(parts.password or ""), True)
    before = getattr(request, "_opener", None)
    request.install_opener(request.build_opener(request.HTTPBasicAuthHandler(users)))
    try:
        yield bare
    finally:
        request.install_opener(before)


def _no_url_file(card: Card, problem: str) -> EnvironmentFaultError:
    target, failure = _torch_file(card), hub.describe_failure(_url_of(card), problem)
    return EnvironmentFaultError(
        f"--backbone {card.name}",
        f"its weights file {target.name} is not on this machine, and {failure}",
        f"Put the file at {target}, or give --weights FILE, or name a mirror in {MIRROR_VARIABLE}.",
    )


# --- loading -------------------------------------------------------------------------------------


def load_weights(network: nn.Module, card: Card, path: Path, head: Collection[str], load_head: bool) -> Match:
    """Load a network's backbone, and its classifier if wanted, from a file.

    Args:
        network: built from ``card``, with the classifier of the weights.
        card: names the library, whose converters for older layouts are applied.
        path: a file of :func:`find_weights`.
        head: names of the classifier's parameters.
        load_head: the classifier is kept, so its tensors must match too.

    Raises:
        UsageError: less than 90 % of the backbone's tensors match, some are not finite, or the classifier to
            keep does not match.
    """
    state = _converted(network, card, read_weights(path))
    match = _compare(network, state, head, str(path), load_head)
    _check_match(match, card, network, state)
    fitting = {key: value for key, value in _fitting(network, state).items() if load_head or key not in head}
    network.load_state_dict(fitting, strict=False)
    return match


def _fitting(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = network.state_dict()
    return {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}


def _compare(
    network: nn.Module, state: Mapping[str, Tensor], head: Collection[str], source: str, load_head: bool
) -> Match:
    own = network.state_dict()
    in_head = set(_head_state(own, head))
    backbone = [key for key in own if key not in in_head and not key.endswith(_BATCH_COUNTER)]
    fitting = _fitting(network, state)
    return Match(
        source=source,
        matched=sum(key in fitting for key in backbone),
        total=len(backbone),
        missing=tuple(key for key in backbone if key not in fitting),
        head=tuple(key for key in own if key in in_head and not key.endswith(_BATCH_COUNTER)),
        head_replaced=not load_head,
        unused=tuple(key for key in state if key not in own),
    )


def _head_state(own: Mapping[str, Tensor], head: Collection[str]) -> list[str]:
    """The classifier's parameters, and the buffers of its layers (LeViT has a batch norm in its head)."""
    layers = {name.rpartition(".")[0] for name in head}
    return [key for key in own if key in head or key.rpartition(".")[0] in layers]


def _converted(network: nn.Module, card: Card, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Convert names of older or original releases, and resize position embeddings.

    If the converter fails, the state dict is returned unchanged, and the check of matching names decides.
    """
    if card.taps:  # an exported run, with current names
        return state
    try:
        convert = _find_timm_filter(card) if card.library == "timm" else _convert_for_torchvision
        return convert(dict(state), network)
    except Exception:  # converters do not check their input, and may raise anything
        return state


_Convert = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]


def _find_timm_filter(card: Card) -> _Convert:
    """Return the function with which timm converts a state dict of this architecture before loading.

    timm passes it only to its internal loader. So the loader is replaced by one that keeps the function,
    while the network is built a second time on the meta device.
    """
    filters: list[_Convert] = []
    overlay = {"state_dict": {"": None}, "source": "", "custom_load": False}
    with _replaced_timm_loader(filters), torch.device("meta"):
        timm.create_model(
            timm_name(card), pretrained=True, pretrained_cfg_overlay=overlay, **timm_arguments(card)
        )
    return filters[0] if filters else lambda state, _: state


@contextmanager
def _replaced_timm_loader(filters: list[_Convert]) -> Iterator[None]:
    def take_filter(*_: object, filter_fn: _Convert | None = None, **__: object) -> None:
        if filter_fn is not None:
            filters.append(filter_fn)

    original = timm_builder.load_pretrained
    timm_builder.load_pretrained = take_filter
    try:
        yield
    finally:
        timm_builder.load_pretrained = original


def _convert_for_torchvision(state: dict[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(network, VisionTransformer):
        resized: dict[str, Tensor] = interpolate_embeddings(network.image_size, network.patch_size, state)
        return resized
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def _check_match(match: Match, card: Card, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    share = match.matched / max(match.total, 1)
    if share < MIN_MATCHED_SHARE:
        found = (
            f"only {match.matched} of the backbone's {match.total} tensors match "
            f"({math.floor(100 * share)} %, under 90 %)"
        )
        fix = "They belong to another network: name that one with --backbone, or give its own weights."
        raise UsageError(f"weights {match.source} for {card.name}", found, fix)
    fitting = _fitting(network, state)
    broken = [
        key for key, _ in network.named_parameters() if key in fitting and not fitting[key].isfinite().all()
    ]
    if broken:
        found = f"{len(broken)} of its tensors hold NaN or infinity ({_some_of(broken)})"
        raise UsageError(f"weights {match.source} for {card.name}", found, "Take other weights.")
    absent = [key for key in match.head if key not in fitting]
    if absent and not match.head_replaced:
        found = f"the classifier does not fit: {_some_of(absent)}"
        raise UsageError(f"strategy.head=keep with {match.source}", found, "Take head=replace.")
