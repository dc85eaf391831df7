"""Find files of the Hugging Face hub in the cache, or download them. Errors tell how to get the file."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import ssl
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from finetune.errors import EnvironmentFaultError, UsageError

Progress = Callable[[int, int], None]
"""Called with the bytes downloaded so far and in total (0 if unknown)."""
NETWORK_TIMEOUT_SECONDS = 10.0
OFFLINE = "offline mode is on"
_CHUNK = 2**15
"""In bytes. Small chunks lose little on a broken connection, and show progress on a slow one."""
MAX_FILE_BYTES = 2**36
"""64 GiB, four times the largest image classifier."""
_MAX_RESTARTS = 3
_MAX_WAIT_SECONDS = 30
"""Largest accepted Retry-After of a server; the client would wait for hours."""
_SHA256 = re.compile("[0-9a-f]{64}")
_REVISION = re.compile(r"(?!.*\.\.)[\w./-]{0,200}", re.ASCII)
"""A branch, tag or commit. It becomes a path in the cache."""


def describe_failure(where: str, problem: str) -> str:
    """Return the part of an error message that tells whether a server was asked, and its problem."""
    if problem == OFFLINE:
        return f"{where} was not contacted ({problem})"
    return f"the download from {where} failed ({problem})"


def find_hub_file(
    asked: str,
    hub_id: str,
    names: Collection[str],
    offline: bool = False,
    fix: str = "name a local folder",
    on_progress: Progress | None = None,
    *,
    most_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Return the first of ``names`` in a hub repository, from the cache or by download.

    Args:
        asked: the user's request, for the error message.
        hub_id: ``ORG/NAME``, with or without ``@REVISION``.
        names: file names in order of preference.
        offline: never access the internet.
        fix: how to use a file from another machine, for the error message.
        on_progress: called during a download.
        most_bytes: largest size of the file. A server may send one that has no end.

    Raises:
        UsageError: ``hub_id`` is not the name of a repository.
        EnvironmentFaultError: none of the files can be downloaded.
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
    with _configured_client():
        fetched = _fetch(repo, revision or None, names, _progress_bar(on_progress, most_bytes))
    if isinstance(fetched, str):
        _remove_endless(repo, most_bytes)
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


def check_size(done: int, total: int, most_bytes: int) -> None:
    """Check that a download does not become larger than any file of its kind.

    Raises:
        ConnectionError: it is larger, or the server says that it will be.
    """
    if max(done, total) > most_bytes:
        size = f"{total:,} bytes" if total > most_bytes else "a file without an end"
        raise ConnectionError(f"the server sends {size}, and no such file has more than {most_bytes:,}")


def _remove_endless(repo: str, most_bytes: int) -> None:
    """Remove what came of a file that has no end; some releases of the client keep it to resume.

    It has at most one chunk too many. A larger file is a partial one of the same repository's weights.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    for part in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if most_bytes < part.stat().st_size <= most_bytes + _CHUNK:
                part.unlink()


def _progress_bar(on_progress: Progress | None, most_bytes: int) -> type[Any]:
    """Return a progress bar class for the client that reports progress and draws nothing.

    The client may open a second bar, for bytes received as opposed to bytes written. It subtracts bytes when
    a server restarts a file from the beginning, without a limit: here the number of restarts is limited, and
    so is the size of the file.
    """
    furthest = restarts = 0

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *words: Any, **keys: Any) -> None:
            super().__init__(*words, **keys | {"file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest, restarts
            was_shown: bool | None = super().update(n)
            restarts += (n or 0) < 0
            if restarts > _MAX_RESTARTS:
                found = f"the connection broke {restarts} times, the last time after {-int(n or 0):,} bytes"
                raise ConnectionError(f"{found}, and the server does not go on where it broke")
            furthest = max(furthest, int(self.n))
            check_size(furthest, int(self.total or 0), most_bytes)
            if on_progress is not None:
                on_progress(furthest, int(self.total or 0))
            return was_shown

    return Bar


def _fetch(repo: str, revision: str | None, names: Collection[str], bar: type[Any]) -> Path | str:
    """Download the first of ``names`` that exists, and verify it; return a problem as text."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    began = time.time()
    for name in names:
        try:
            file = hf_hub_download(
                repo, name, revision=revision, etag_timeout=NETWORK_TIMEOUT_SECONDS, tqdm_class=bar
            )
            return _verify(Path(file), began)
        except LocalEntryNotFoundError as error:  # no connection; a subclass of the next one
            return _root_cause(error)
        except EntryNotFoundError:
            continue
        except Exception as error:  # the error classes of the client differ between releases
            return f"{_root_cause(error)}{_access_hint(error)}"
    return "the repository holds none of these files"


def _verify(file: Path, began: float) -> Path | str:
    """Return a downloaded file; remove it and return a problem if its sha256 is not the hub's.

    The client compares sizes only. It stores a large file under the sha256 that the hub states, and leaves
    what it had received when it was killed.
    """
    if not file.is_symlink():  # a file system without links: the hash is unknown
        return file
    stored = file.parent / file.readlink()  # may itself be a link to a file with another hash in its name
    remove_leftovers(stored.parent, f"{glob.escape(stored.name)}.*incomplete", began)
    if not _SHA256.fullmatch(stored.name):
        return file
    with stored.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest == stored.name:
        return file
    for path in (stored.resolve(), stored, file):
        path.unlink(missing_ok=True)
    return f"what came has the sha256 {digest[:16]}..., and should have {stored.name[:16]}...; it was removed"


def remove_leftovers(folder: Path, pattern: str, began: float) -> None:
    """Remove partial files of killed downloads, after the same file has been downloaded.

    Args:
        folder: where they are.
        pattern: of their names.
        began: time when the download began; a process that lives has written to its own one since then.
    """
    for part in folder.glob(pattern):
        with suppress(OSError):
            if part.stat().st_mtime < began:
                part.unlink()


@contextmanager
def _configured_client() -> Iterator[None]:
    """Silence the client's log, and let it download in small chunks.

    The log contains URLs with passwords, and the errors have the same information. With the client's chunks
    of 10 MB a slow server shows no progress for minutes, and a broken connection loses a whole chunk.
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
    """Return why a server does not answer, ``""`` if it does; the hub's client would retry for minutes."""
    try:
        request = Request(without_user(url), method="HEAD")  # noqa: S310  # the user's own mirror, or the hub
        with urlopen(request, timeout=NETWORK_TIMEOUT_SECONDS):  # noqa: S310
            return ""
    except HTTPError as error:  # the server answers; the client reports what it means
        wait = error.headers.get("Retry-After", "")
        is_long = wait.isascii() and wait.isdecimal() and int(wait) > _MAX_WAIT_SECONDS
        return f"{error}, to be asked again in {int(wait):,} s" if is_long else ""
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        # The client has its own certificates, and may trust servers that the system does not.
        return "" if isinstance(reason, ssl.SSLError) else f"{type(error).__name__}: {reason}"


def without_user(url: str) -> str:
    """Return a URL without ``user:password@``, which urllib would read as part of the host name."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _access_hint(error: Exception) -> str:
    """Return a hint about access rights: the hub answers 401 for private and for missing repositories."""
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
    """Return the first of ``names`` of a repository that is in the cache, else None."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = hub_id.partition("@")
    for name in names:
        found = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def offline_by_environment() -> bool:
    """Return whether HF_HUB_OFFLINE is set, with the same values as in the hub's client."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _no_hub_file(
    asked: str, hub_id: str, names: Collection[str], problem: str, fix: str
) -> EnvironmentFaultError:
    from huggingface_hub import constants

    file = " or ".join(names)
    failure = describe_failure(f"{constants.ENDPOINT}/{hub_id.partition('@')[0]}", problem)
    return EnvironmentFaultError(
        asked,
        f"its file {file} is not in the cache ({constants.HF_HUB_CACHE}), and {failure}",
        f"Fetch it where there is a network and {fix}, copy that machine's cache here, "
        "or name a mirror in HF_ENDPOINT.",
    )
