"""Find the file with a network's weights, or download it.

Published weights are taken from the caches of their libraries, and downloaded into them:

- timm: the Hugging Face cache (``HF_HOME``), from the hub or the mirror in ``HF_ENDPOINT``;
- torchvision: ``$TORCH_HOME/hub/checkpoints``, from its server or the mirror in ``FINETUNE_MIRROR`` (the URL
  of a folder with files of the same names).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib import request
from urllib.parse import unquote, urlsplit

import torch

from finetune.errors import DiskError, EnvironmentFaultError, UsageError
from pretrained import hub
from pretrained.catalog import Card
from pretrained.hub import Progress, cached_on_hub, find_hub_file, offline_by_environment

MIRROR_VARIABLE = "FINETUNE_MIRROR"

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_CHUNK = 2**17
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.")
"""The first digits of a file's sha256 in its name."""


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
    if card.place in ("folder", "package"):
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
    if card.place == "package":
        return Path(card.location)
    if card.place == "folder":
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
        if all(_SHARD.search(file.name) for file in files):
            found = (
                f"the weights are divided among {len(files)} files: {_some_of([file.name for file in files])}"
            )
            raise UsageError(
                asked, found, "Save them as one file (save_pretrained with a larger max_shard_size)."
            )
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
    target, began = _torch_file(card), time.time()
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _with_login(_url_of(card)) as url:
            digest = _copy(url, part, on_progress)
        expected = _DIGEST.search(target.name)
        if expected and not digest.startswith(expected[1]):
            raise ValueError(f"invalid hash value: {digest[:16]}..., and its name says {expected[1]}")
        part.replace(target)
        hub.remove_leftovers(target.parent, f"{glob.escape(target.name)}.*.part", began)
    except (OSError, ValueError, HTTPException) as error:  # ValueError also if the mirror is no URL
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"writing {target}", "there is no room for it", "Make room on the disk."
            ) from None
        raise _no_url_file(card, " ".join(str(error).split()) or type(error).__name__) from None
    finally:
        part.unlink(missing_ok=True)
    return target


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
            hub.check_size(done, total, hub.MAX_FILE_BYTES)
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
