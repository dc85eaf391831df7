"""Find weights, read them safely, and say how they fit.

Only tensors are ever read: safetensors, or PyTorch files with ``weights_only=True`` and no fallback.
Weights by name are taken from the libraries' own caches, else downloaded into them:

- timm: the Hugging Face cache (``HF_HOME``), from the hub or the mirror that ``HF_ENDPOINT`` names;
- torchvision: ``$TORCH_HOME/hub/checkpoints``, from its server or the mirror that
  ``FINETUNE_MIRROR`` names (a folder URL that holds files of the same names).
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
SMALLEST_MATCH = 0.9
"""Share of a backbone's tensors that weights must fill; below it they belong to another network."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_COUNTER = "num_batches_tracked"
"""A buffer of BatchNorm that says nothing of what was learned; files of before 2018 have none."""
_LEFTOVER_SECONDS = 3600
_CHUNK = 2**17
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.")
"""First digits of a file's SHA-256, where its name tells them."""
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class Match:
    """How weights fitted a network.

    Attributes:
        source: file or name the weights came from; ``""`` for random weights.
        matched: backbone tensors that were filled.
        total: backbone tensors there are (parameters and buffers, without the classifier's and counters).
        missing: backbone tensors that kept their random values.
        head: classifier tensors, all of them replaced by a new head or all kept.
        head_replaced: whether a new head took their place.
        unused: tensors of the file that the network has no place for.
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
        missing = f", {len(self.missing)} missing ({_some(self.missing)})" if self.missing else ", 0 missing"
        unused = f", {len(self.unused)} unused in the file ({_some(self.unused)})" if self.unused else ""
        backbone = f"{self.matched} of {self.total} tensors matched"
        classifier = f"{len(self.head)} {head} (the head: {_some(self.head)})"
        return f"{backbone}, {classifier}{missing}{unused}; from {self.source}"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(name[:100] for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


# --- finding -------------------------------------------------------------------------------------


def find_weights(
    card: Card, weights: str | None = None, offline: bool = False, on_progress: Progress | None = None
) -> Path:
    """Return the file that holds a backbone's weights, downloading it when it must and may.

    Args:
        card: whose weights.
        weights: a file or folder the user named, None for the card's own.
        offline: never ask the network.
        on_progress: told of a download as it comes.

    Raises:
        UsageError: the named file or folder is not there or holds no weights, or the card has none.
        EnvironmentFaultError: they are not on this machine and cannot be had.
    """
    if weights is not None:
        return _file_of(f"--weights {weights}", Path(weights))
    if card.place in ("folder", "bundled"):
        return _file_of(f"--backbone {card.name}", Path(card.location))
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
    """Return the card's weights file when it is on this machine already, else None."""
    if card.place in ("folder", "bundled"):
        return next((path for path in _weight_files(Path(card.location))), None)
    if card.place == "url":
        path = _torch_file(card)
        return path if path.is_file() else None
    if card.place == "hub":
        return cached_on_hub(card.location, _HUB_FILES)
    return None


def _file_of(asked: str, path: Path) -> Path:
    if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises on a name that is too long
        return path
    if not os.path.exists(path):  # noqa: PTH110
        raise UsageError(asked, "there is no such file or folder", "Check the path.")
    files = _weight_files(path / "model" if (path / "model" / "config.json").is_file() else path)
    if not files:
        raise UsageError(asked, f"the folder holds no {', '.join(_SUFFIXES)} file", "Name the file itself.")
    if len(files) > 1 and files[0].name != _HUB_FILES[0]:
        found = f"the folder holds several weight files: {_some([file.name for file in files])}"
        raise UsageError(asked, found, "Name one of them.")
    return files[0]


def _weight_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.glob("*")) if path.suffix in _SUFFIXES and path.is_file()]
    return sorted(files, key=lambda path: path.name != _HUB_FILES[0])


def _torch_file(card: Card) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(card.location).path).name


# --- downloading ---------------------------------------------------------------------------------


def _download(card: Card, on_progress: Progress | None) -> Path:
    """Fetch into torch.hub's cache; a part file is renamed only when its hash fits its name."""
    target = _torch_file(card)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with _signed_in(_url_of(card)) as url:
            digest = _copy(url, part, on_progress)
        expected = _DIGEST.search(target.name)
        if expected and not digest.startswith(expected[1]):
            raise ValueError(f"invalid hash value: {digest[:16]}..., and its name says {expected[1]}")
        part.replace(target)
    except (OSError, ValueError, HTTPException) as error:  # ValueError: the mirror is no URL, too
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"writing {target}", "there is no room for it", "Make room on the disk."
            ) from None
        raise _no_url_file(card, " ".join(str(error).split()) or type(error).__name__) from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _remove_leftovers(target: Path) -> None:
    """Remove what killed downloads left behind: parts that nothing has been written into for an hour."""
    for part in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _LEFTOVER_SECONDS:
                part.unlink()


def _copy(url: str, part: Path, on_progress: Progress | None) -> str:
    """Write what a server sends into a file, and return its sha256."""
    digest, done = hashlib.sha256(), 0
    # The address is a mirror that the user named, or the library's own.
    with request.urlopen(url, timeout=hub.NETWORK_TIMEOUT_SECONDS) as answer, part.open("wb") as file:  # noqa: S310
        total = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read1(_CHUNK):  # what is there: a slow server needs long for a whole one
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
def _signed_in(url: str) -> Iterator[str]:
    """Yield an address without its ``user:password@``, which urllib, unable to read them there, is told."""
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
    target = _torch_file(card)
    return EnvironmentFaultError(
        f"--backbone {card.name}",
        f"its weights file {target.name} is not on this machine, and {hub.no_answer(_url_of(card), problem)}",
        f"Put the file at {target}, or give --weights FILE, or name a mirror in {MIRROR_VARIABLE}.",
    )


# --- loading -------------------------------------------------------------------------------------


def load_weights(network: nn.Module, card: Card, path: Path, head: Collection[str], load_head: bool) -> Match:
    """Fill a network's backbone, and its classifier when asked, from a file.

    Args:
        network: built from ``card``, still with the classifier of the weights.
        card: names the library, whose converters for older layouts are used where names do not fit.
        path: a file of :func:`find_weights`.
        head: names of the classifier's parameters.
        load_head: the classifier is kept, so its tensors must fit too.

    Raises:
        UsageError: under 90 % of the backbone's tensors match, or the kept classifier does not.
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
    backbone = [key for key in own if key not in in_head and not key.endswith(_COUNTER)]
    fitting = _fitting(network, state)
    return Match(
        source=source,
        matched=sum(key in fitting for key in backbone),
        total=len(backbone),
        missing=tuple(key for key in backbone if key not in fitting),
        head=tuple(key for key in own if key in in_head and not key.endswith(_COUNTER)),
        head_replaced=not load_head,
        unused=tuple(key for key in state if key not in own),
    )


def _head_state(own: Mapping[str, Tensor], head: Collection[str]) -> list[str]:
    """The classifier's parameters, and buffers of the same layers (LeViT normalises in its head)."""
    layers = {name.rpartition(".")[0] for name in head}
    return [key for key in own if key in head or key.rpartition(".")[0] in layers]


def _converted(network: nn.Module, card: Card, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename what older or original releases call otherwise, and resize position embeddings.

    A file that the converter cannot make sense of comes back as it is, and is judged by its names.
    """
    if card.taps:  # ours, under its own names
        return state
    try:
        convert = _find_timm_filter(card) if card.library == "timm" else _convert_for_torchvision
        return convert(dict(state), network)
    except Exception:  # converters index into what they expect: a foreign file fails in any way it likes
        return state


_Convert = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]


def _find_timm_filter(card: Card) -> _Convert:
    """Return what timm does to a state dict before loading it; each architecture brings its own.

    timm hands the filter to its loader and tells it to nobody else, so a stand-in for the loader takes it
    while the network is built a second time, on the meta device.
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
    if share < SMALLEST_MATCH:
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
        found = f"{len(broken)} of its tensors hold NaN or infinity ({_some(broken)})"
        raise UsageError(f"weights {match.source} for {card.name}", found, "Take other weights.")
    absent = [key for key in match.head if key not in fitting]
    if absent and not match.head_replaced:
        found = f"the classifier does not fit: {_some(absent)}"
        raise UsageError(f"strategy.head=keep with {match.source}", found, "Take head=replace.")
