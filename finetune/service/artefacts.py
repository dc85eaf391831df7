"""The files of a run that clients may fetch, with their SHA-256."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from finetune.errors import UsageError
from finetune.runs.folder import RunFolder
from finetune.service.store.jobs import UnknownError
from finetune.system.regular_files import hash_regular

_LEFT_OUT = frozenset({"checkpoints"})
"""Folders of a run that are there to resume it."""
_TYPES = {".safetensors": "application/octet-stream", ".yaml": "application/yaml", ".log": "text/plain"}


@dataclass(frozen=True)
class Artefact:
    """A file of a run.

    Attributes:
        name: path below the run folder.
        path: the file.
        num_bytes: its size.
        sha256: digest of its content.
    """

    name: str
    path: Path
    num_bytes: int
    sha256: str

    @property
    def media_type(self) -> str:
        """The type of its content."""
        own = _TYPES.get(self.path.suffix)
        return own or mimetypes.guess_type(self.name)[0] or "application/octet-stream"


def list_artefacts(run: RunFolder) -> list[Artefact]:
    """Return the files of a run, without those that are being written."""
    names = (path.relative_to(run.path).as_posix() for path in sorted(run.path.rglob("*")) if path.is_file())
    return [_read(run, name) for name in names if _is_offered(name)]


def find_artefact(run: RunFolder, name: str) -> Artefact:
    """Return one file of a run.

    Raises:
        UnknownError: the run has no such file, or does not offer it.
    """
    parts = name.split("/")
    path = run.path / name
    is_inside = ".." not in parts and not name.startswith("/") and "\0" not in name
    if not is_inside or not _is_offered(name) or path.is_symlink() or not path.is_file():
        raise UnknownError(f"artefact {name[:200]}", "the run has no such file", "See the list of artefacts.")
    try:
        return _read(run, name)
    except OSError as error:
        raise UsageError(f"artefact {name[:200]}", error.strerror or str(error), "Try again.") from None


def _is_offered(name: str) -> bool:
    return not any(part.startswith(".") or part in _LEFT_OUT for part in name.split("/"))


def _read(run: RunFolder, name: str) -> Artefact:
    path = run.path / name
    status = path.stat()
    digest = _hash(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    return Artefact(name, path, status.st_size, digest)


@lru_cache(maxsize=4096)
def _hash(path: str, *_: int) -> str:
    """Return the SHA-256 of a file, computed once for each size, time and inode."""
    return hash_regular(Path(path))
