"""Find weights, read them safely, and say how they fit.

Only tensors are ever read: safetensors, or PyTorch files with ``weights_only=True`` and no fallback.
Weights by name are taken from the libraries' own caches, else downloaded into them:

- timm: the Hugging Face cache (``HF_HOME``), from the hub or the mirror that ``HF_ENDPOINT`` names;
- torchvision: ``$TORCH_HOME/hub/checkpoints``, from its server or the mirror that
  ``FINETUNE_MIRROR`` names (a folder URL that holds files of the same names).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune.errors import EnvironmentFaultError, UsageError
from pretrained.catalog import Card

MIRROR_VARIABLE = "FINETUNE_MIRROR"
NETWORK_TIMEOUT_SECONDS = 10.0
SMALLEST_MATCH = 0.9
"""Share of a backbone's tensors that weights must fill; below it they belong to another network."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Match:
    """How weights fitted a network.

    Attributes:
        source: file or name the weights came from; ``""`` for random weights.
        matched: backbone tensors that were filled.
        total: backbone tensors there are (parameters and buffers, without the classifier's).
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
    shown = ", ".join(list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


# --- finding -------------------------------------------------------------------------------------


def find_weights(card: Card, weights: str | None = None, offline: bool = False) -> Path:
    """Return the file that holds a backbone's weights, downloading it when it must and may.

    Args:
        card: whose weights.
        weights: a file or folder the user named, None for the card's own.
        offline: never ask the network.

    Raises:
        UsageError: the named file or folder is not there or holds no weights, or the card has none.
        EnvironmentFaultError: they are not on this machine and cannot be had.
    """
    if weights is not None:
        return _file_of(f"--weights {weights}", Path(weights))
    if card.place == "folder":
        return _file_of(f"--backbone {card.name}", Path(card.location))
    if card.place == "none":
        found = f"no weights were ever published for {card.name}"
        fix = "Give --weights FILE, take a backbone that has some, or --strategy scratch."
        raise UsageError(f"--backbone {card.name}", found, fix)
    cached = find_cached(card)
    if cached is not None:
        return cached
    if offline or _offline_by_environment():
        raise _not_here(card, "offline mode is on")
    return _download(card)


def find_cached(card: Card) -> Path | None:
    """Return the card's weights file when it is on this machine already, else None."""
    if card.place == "folder":
        return next((path for path in _weight_files(Path(card.location))), None)
    if card.place == "url":
        path = _torch_cache() / Path(urlsplit(card.location).path).name
        return path if path.is_file() else None
    if card.place == "hub":
        return _cached_on_hub(card.location, _hub_files(card))
    return None


def _file_of(asked: str, path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise UsageError(asked, "there is no such file or folder", "Check the path.")
    files = _weight_files(path)
    if not files:
        raise UsageError(asked, f"the folder holds no {', '.join(_SUFFIXES)} file", "Name the file itself.")
    if len(files) > 1 and files[0].name != _HUB_FILES[0]:
        found = f"the folder holds several weight files: {_some([file.name for file in files])}"
        raise UsageError(asked, found, "Name one of them.")
    return files[0]


def _weight_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.glob("*")) if path.suffix in _SUFFIXES and path.is_file()]
    return sorted(files, key=lambda path: path.name != _HUB_FILES[0])


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _hub_files(card: Card) -> tuple[str, ...]:
    config = timm.get_pretrained_cfg(f"{card.architecture}.{card.tag}") if card.tag else None
    named = config.hf_hub_filename if config is not None and config.hf_hub_id == card.location else None
    return (named,) if named else _HUB_FILES


def _cached_on_hub(hub_id: str, names: Collection[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = hub_id.partition("@")
    for name in names:
        found = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _offline_by_environment() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


# --- downloading ---------------------------------------------------------------------------------


def _download(card: Card) -> Path:
    if card.place == "hub":
        return find_hub_file(f"--backbone {card.name}", card.location, _hub_files(card), card)
    try:
        return _download_url(card.location)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash in the file's name does not fit
        raise _not_here(card, " ".join(str(error).split())) from None


def _download_url(url: str) -> Path:
    """Fetch into torch.hub's cache; a part file is renamed only when its hash fits its name."""
    target = _torch_cache() / Path(urlsplit(url).path).name
    mirror = os.environ.get(MIRROR_VARIABLE)
    source = f"{mirror.rstrip('/')}/{target.name}" if mirror else url
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = target.stem.rpartition("-")[2] if "-" in target.stem else None
    with _network_timeout():
        torch.hub.download_url_to_file(source, str(target), hash_prefix=digest)
    return target


@contextmanager
def _network_timeout() -> Iterator[None]:
    """urllib waits for ever by default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def find_hub_file(asked: str, hub_id: str, names: Collection[str], card: Card | None = None) -> Path:
    """Return the first of ``names`` that a hub repository holds, from the cache or by download.

    Raises:
        EnvironmentFaultError: none can be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = _cached_on_hub(hub_id, names)
    if cached is not None:
        return cached
    repo, _, revision = hub_id.partition("@")
    problem = "the repository holds none of these files"
    for name in names:
        try:
            options: dict[str, Any] = {"revision": revision or None, "etag_timeout": NETWORK_TIMEOUT_SECONDS}
            return Path(hf_hub_download(repo, name, **options))
        except (
            LocalEntryNotFoundError
        ) as error:  # the library's word for "no network"; a kind of the next one
            problem = _root_cause(error)
            break
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client's error classes change with every release
            problem = _root_cause(error)
            break
    raise _no_hub_file(asked, hub_id, names, problem, card)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _not_here(card: Card, problem: str) -> EnvironmentFaultError:
    if card.place == "hub":
        return _no_hub_file(f"--backbone {card.name}", card.location, _hub_files(card), problem, card)
    target = _torch_cache() / Path(urlsplit(card.location).path).name
    return EnvironmentFaultError(
        f"--backbone {card.name}",
        f"its weights file {target.name} is not on this machine, and {card.location} gave none ({problem})",
        f"Put the file at {target}, or give --weights FILE, or name a mirror in {MIRROR_VARIABLE}.",
    )


def _no_hub_file(
    asked: str, hub_id: str, names: Collection[str], problem: str, card: Card | None
) -> EnvironmentFaultError:
    from huggingface_hub import constants

    file = " or ".join(names)
    where = f"{constants.ENDPOINT}/{hub_id.partition('@')[0]}"
    alternative = "give --weights FILE" if card else "name a local folder"
    return EnvironmentFaultError(
        asked if asked.startswith("--") else f"--backbone {asked}",
        f"its file {file} is not in the cache ({constants.HF_HUB_CACHE}), and {where} gave none ({problem})",
        f"Fetch it where there is a network and {alternative}, copy that machine's cache here, "
        "or name a mirror in HF_ENDPOINT.",
    )


# --- reading -------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, unwrapping what training scripts and ``torch.compile`` put around it.

    Raises:
        UsageError: the file is damaged, holds more than tensors, or holds none.
    """
    asked = f"weights {path}"
    try:
        content = _read(path)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        fix = "Fetch the file again."
        raise UsageError(
            asked, f"the file cannot be read: {' '.join(str(error).split())[:300]}", fix
        ) from None
    except Exception as error:  # the unpickler's refusals have no common class
        found = f"it holds more than tensors, and nothing else is ever loaded ({_root_cause(error)[:200]})"
        raise UsageError(asked, found, "Save its state_dict as safetensors.") from None
    tensors = {_clean(key): value for key, value in _unwrap(content).items() if isinstance(value, Tensor)}
    if not tensors:
        raise UsageError(asked, "it holds no tensors", "Name a file with a state dict.")
    return tensors


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Any) -> Mapping[str, Any]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _unwrap(content[key])
    return content if isinstance(content, Mapping) else {}


def _clean(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


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
    state = read_weights(path)
    match = _compare(network, state, head, str(path), load_head)
    if match.missing and card.library == "timm":
        converted = _convert_by_timm(card, state)
        if converted is not None:
            state = converted
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
    in_head = _head_state(own, head)
    backbone = [key for key in own if key not in in_head]
    fitting = _fitting(network, state)
    return Match(
        source=source,
        matched=sum(key in fitting for key in backbone),
        total=len(backbone),
        missing=tuple(key for key in backbone if key not in fitting),
        head=tuple(in_head),
        head_replaced=not load_head,
        unused=tuple(key for key in state if key not in own),
    )


def _head_state(own: Mapping[str, Tensor], head: Collection[str]) -> list[str]:
    """The classifier's parameters, and buffers of the same layers (LeViT normalises in its head)."""
    layers = {name.rpartition(".")[0] for name in head}
    return [key for key in own if key in head or key.rpartition(".")[0] in layers]


def _convert_by_timm(card: Card, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Let timm rename original releases' tensors and resize position embeddings; None when it cannot."""
    overlay = {"state_dict": dict(state), "source": "", "num_classes": card.num_classes, "custom_load": False}
    kwargs: dict[str, Any] = dict(card.model_args)
    if card.preprocessing.img_size != timm.get_pretrained_cfg(card.architecture).input_size[-1]:
        kwargs["img_size"] = card.preprocessing.img_size
    try:
        network = timm.create_model(
            card.architecture,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=card.num_classes,
            **kwargs,
        )
    except Exception:  # converters index into what they expect: a foreign file fails in any way it likes
        return None
    converted: dict[str, Tensor] = network.state_dict()
    return converted


def _check_match(match: Match, card: Card, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    share = match.matched / max(match.total, 1)
    if share < SMALLEST_MATCH:
        found = (
            f"only {match.matched} of the backbone's {match.total} tensors match ({share:.0%}, under 90 %)"
        )
        fix = "They belong to another network: name that one with --backbone, or give its own weights."
        raise UsageError(f"weights {match.source} for {card.name}", found, fix)
    fitting = _fitting(network, state)
    absent = [key for key in match.head if key not in fitting]
    if absent and not match.head_replaced:
        found = f"the classifier does not fit: {_some(absent)}"
        raise UsageError(f"strategy.head=keep with {match.source}", found, "Take head=replace.")
