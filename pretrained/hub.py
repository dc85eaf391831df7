"""Files of the Hugging Face hub: from the cache, else by download, else a refusal that says what to do."""

from __future__ import annotations

import hashlib
import io
import os
import re
import ssl
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from finetune.errors import EnvironmentFaultError, UsageError

Progress = Callable[[int, int], None]
"""Told the bytes that are there, and how many there will be (0 where nobody knows)."""
NETWORK_TIMEOUT_SECONDS = 10.0
OFFLINE = "offline mode is on"
_CHUNK = 2**15
"""Bytes: what a broken connection can lose, and what a slow one needs for a sign of life."""
_MOST_RESTARTS = 3
_LONGEST_WAIT_SECONDS = 30
"""That a server may ask for before it is asked again; the client would wait for hours."""
_SHA256 = re.compile("[0-9a-f]{64}")
_REVISION = re.compile(r"(?!.*\.\.)[\w./-]{0,200}", re.ASCII)
"""A branch, tag or commit, which becomes a path in the cache."""


def no_answer(where: str, problem: str) -> str:
    """Say that a server has not given a file, and whether it was asked at all."""
    return f"{where} {'was not asked' if problem == OFFLINE else 'gave none'} ({problem})"


def find_hub_file(
    asked: str,
    hub_id: str,
    names: Collection[str],
    offline: bool = False,
    fix: str = "name a local folder",
    on_progress: Progress | None = None,
) -> Path:
    """Return the first of ``names`` that a hub repository holds, from the cache or by download.

    Args:
        asked: what the user asked for, for the message.
        hub_id: ``ORG/NAME``, with ``@REVISION`` or without.
        names: in order of preference.
        offline: never ask the network.
        fix: what to do with a file fetched elsewhere, for the message.
        on_progress: told of a download as it comes.

    Raises:
        UsageError: ``hub_id`` is no name of a repository.
        EnvironmentFaultError: none can be had.
    """
    from huggingface_hub import hf_hub_url

    if not _is_hub_id(hub_id):
        found = f"{hub_id[:100]!r} is no name of a hub repository"
        raise UsageError(asked, found, "Write hf-hub:ORG/NAME.")
    cached = cached_on_hub(hub_id, names)
    if cached is not None:
        return cached
    if offline or offline_by_environment():
        raise _no_hub_file(asked, hub_id, names, OFFLINE, fix)
    repo, _, revision = hub_id.partition("@")
    problem = _unreachable(hf_hub_url(repo, next(iter(names)), revision=revision or None))
    if problem:
        raise _no_hub_file(asked, hub_id, names, problem, fix)
    with _tamed_client():
        fetched = _fetch(repo, revision or None, names, _bar_of(on_progress))
    if isinstance(fetched, str):
        raise _no_hub_file(asked, hub_id, names, fetched, fix)
    return fetched


def _is_hub_id(hub_id: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, _, revision = hub_id.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return _REVISION.fullmatch(revision) is not None


def _bar_of(on_progress: Progress | None) -> type[Any]:
    """Return what the client takes for a bar: it draws nothing, and tells how far the file is.

    The client opens a second one where it counts what came over the line apart from what was written. It
    takes bytes back when a server sends the file from its beginning again, and would let it do so for ever.
    """
    furthest = restarts = 0

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *words: Any, **keys: Any) -> None:
            super().__init__(*words, **keys | {"file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest, restarts
            was_shown: bool | None = super().update(n)
            restarts += (n or 0) < 0
            if restarts > _MOST_RESTARTS:
                found = f"the connection broke {restarts} times, the last time after {-int(n or 0):,} bytes"
                raise ConnectionError(f"{found}, and the server does not go on where it broke")
            furthest = max(furthest, int(self.n))
            if on_progress is not None:
                on_progress(furthest, int(self.total or 0))
            return was_shown

    return Bar


def _fetch(repo: str, revision: str | None, names: Collection[str], bar: type[Any]) -> Path | str:
    """Download the first of ``names`` that is there and whole, or return the problem."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            file = hf_hub_download(
                repo, name, revision=revision, etag_timeout=NETWORK_TIMEOUT_SECONDS, tqdm_class=bar
            )
            return _verify(Path(file))
        except LocalEntryNotFoundError as error:  # the library's "no network"; a kind of the next one
            return _root_cause(error)
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client's error classes change with every release
            return f"{_root_cause(error)}{_meaning(error)}"
    return "the repository holds none of these files"


def _verify(file: Path) -> Path | str:
    """Return a downloaded file, or remove it where it is not what the hub said it would be.

    The client compares sizes only. It stores a large file under its sha256, as the hub names it.
    """
    if not file.is_symlink():  # a file system without links, where nothing tells the hash
        return file
    stored = file.parent / file.readlink()  # itself a link, maybe, to a file that is named by another hash
    if not _SHA256.fullmatch(stored.name):
        return file
    with stored.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest == stored.name:
        return file
    for path in (stored.resolve(), stored, file):
        path.unlink(missing_ok=True)
    return f"what came has the sha256 {digest[:16]}..., and should have {stored.name[:16]}...; it was removed"


@contextmanager
def _tamed_client() -> Iterator[None]:
    """Let the client say nothing, and take a file in small parts.

    It writes addresses to stderr with their passwords; its errors say what went wrong as well. Of its parts
    of 10 MB a slow server needs minutes for one, and one that breaks off earlier loses all of it each time.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    verbosity, chunk = logging.get_verbosity(), constants.DOWNLOAD_CHUNK_SIZE
    logging.set_verbosity(logging.CRITICAL)
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        constants.DOWNLOAD_CHUNK_SIZE = chunk


def _unreachable(url: str) -> str:
    """Say why a server gives no answer, ``""`` when it does: the hub's client would try again for minutes."""
    try:
        request = Request(without_user(url), method="HEAD")  # noqa: S310  # the user's own mirror, or the hub
        with urlopen(request, timeout=NETWORK_TIMEOUT_SECONDS):  # noqa: S310
            return ""
    except HTTPError as error:  # an answer; the client says what it means
        wait = error.headers.get("Retry-After", "")
        is_long = wait.isascii() and wait.isdecimal() and int(wait) > _LONGEST_WAIT_SECONDS
        return f"{error}, to be asked again in {int(wait):,} s" if is_long else ""
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        # The client brings certificates of its own, and may trust what the system does not.
        return "" if isinstance(reason, ssl.SSLError) else f"{type(error).__name__}: {reason}"


def without_user(url: str) -> str:
    """Return an address without ``user:password@``, which urllib takes for a part of the host's name."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _meaning(error: Exception) -> str:
    """What an account has to do with it: the hub gives 401 for what is closed, and for what is not there."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "; access must be asked for on its page, by an account that HF_TOKEN then names"
    if isinstance(error, RepositoryNotFoundError):
        return "; there is no such repository, or HF_TOKEN must name an account that may read it"
    return ""


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def cached_on_hub(hub_id: str, names: Collection[str]) -> Path | None:
    """Return the first of ``names`` that the cache holds of a repository, else None."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = hub_id.partition("@")
    for name in names:
        found = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def offline_by_environment() -> bool:
    """Return whether HF_HUB_OFFLINE is set, as the hub's own client reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _no_hub_file(
    asked: str, hub_id: str, names: Collection[str], problem: str, fix: str
) -> EnvironmentFaultError:
    from huggingface_hub import constants

    file = " or ".join(names)
    where = f"{constants.ENDPOINT}/{hub_id.partition('@')[0]}"
    return EnvironmentFaultError(
        asked,
        f"its file {file} is not in the cache ({constants.HF_HUB_CACHE}), and {no_answer(where, problem)}",
        f"Fetch it where there is a network and {fix}, copy that machine's cache here, "
        "or name a mirror in HF_ENDPOINT.",
    )
