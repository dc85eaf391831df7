"""Uploads that can be interrupted: the length of the file on the disk is how far an upload came.

::

    uploads/<id>.json      what the client said: length, name
    uploads/<id>.part      the bytes so far
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from io import FileIO
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from finetune.runs.files import disk_error, write_text
from finetune.service.problems import RefusedError
from finetune.service.store.jobs import UnknownError
from finetune.system.regular_files import read_regular

_ID = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 10_000
OLD = 7 * 86400.0
"""Seconds after which an upload that has stopped is removed."""


@dataclass(frozen=True)
class Upload:
    """An upload: its id, the bytes it will have, and the name that the client gave it."""

    id: str
    length: int
    name: str = ""


class Uploads:
    """The uploads of a store.

    Args:
        folder: where they lie.
        most_bytes: largest length of one.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self.most_bytes = folder, most_bytes

    def create(self, length: int, name: str = "") -> Upload:
        """Begin an upload.

        Raises:
            RefusedError: it is too long.
            DiskError: there is no room for it, or the store cannot be written.
        """
        self.check_length(length)
        upload = Upload(secrets.token_hex(16), length, name[:200])
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path(upload.id).touch(mode=0o600)
        except OSError as error:
            raise disk_error(self._folder, error) from None
        write_text(self._folder / f"{upload.id}.json", json.dumps(asdict(upload)))
        return upload

    def check_length(self, length: int) -> None:
        """Refuse an upload that is too long.

        Raises:
            RefusedError: it is.
        """
        if length > self.most_bytes:
            found = f"it has {length:,} bytes, and this server takes {self.most_bytes:,}"
            fix = "Make the images smaller, or let the server read them with --data-root."
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the upload", found, fix)

    def remove_old(self, seconds: float = OLD) -> None:
        """Remove the uploads to which nothing was added for a week: their clients have given up."""
        for path in self._folder.glob("*.part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > seconds:
                    path.with_suffix(".json").unlink(missing_ok=True)
                    path.unlink()

    def path(self, upload: str) -> Path:
        """Return the file with the bytes of an upload."""
        return self._folder / f"{upload}.part"

    def get(self, upload: str) -> tuple[Upload, int]:
        """Return an upload, and how many bytes of it are there.

        Raises:
            UnknownError: there is none of that id.
        """
        try:
            if not _ID.fullmatch(upload):
                raise FileNotFoundError
            facts = json.loads(read_regular(self._folder / f"{upload}.json", _MOST_BYTES))
            path = self.path(upload)
            return Upload(**facts), path.stat().st_size if path.exists() else 0
        except (OSError, ValueError, TypeError):
            found = "there is no upload of that id"
            raise UnknownError(f"upload {upload[:64]}", found, "Begin a new one.") from None

    async def append(self, upload: str, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Add bytes to an upload; what has arrived when the client is cut off stays.

        Args:
            upload: its id.
            offset: where the client believes that the upload is.
            chunks: the bytes.

        Returns:
            How many bytes of the upload are there now.

        Raises:
            UnknownError: there is none of that id.
            RefusedError: it is elsewhere, another request writes it, or it would become longer than was said.
            DiskError: the disk is full.
        """
        facts, _ = await run_in_threadpool(self.get, upload)
        # Without a buffer: what it held back would meet the full disk when the file is closed.
        file = await run_in_threadpool(self.path(upload).open, "r+b", 0)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _conflict(upload, "another request writes it") from None
            done = os.fstat(file.fileno()).st_size
            if offset != done:
                raise _conflict(upload, f"{done} bytes are there, and the request begins at {offset}")
            file.seek(done)
            with suppress(ClientDisconnect):
                async for chunk in chunks:
                    await run_in_threadpool(self._write, file, chunk, facts)
            return file.tell()

    def _write(self, file: FileIO, chunk: bytes, upload: Upload) -> None:
        if file.tell() + len(chunk) > upload.length:
            found = f"it was said to have {upload.length:,} bytes, and more arrived"
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"upload {upload.id}", found, "Begin a new one."
            )
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise disk_error(self.path(upload.id), error) from None

    def remove(self, upload: str) -> None:
        """Remove an upload and what has arrived of it.

        Raises:
            UnknownError: there is none of that id.
        """
        self.get(upload)
        for path in (self._folder / f"{upload}.json", self.path(upload)):
            path.unlink(missing_ok=True)


def _conflict(upload: str, found: str) -> RefusedError:
    fix = "Ask where it is (HEAD), and go on from there."
    return RefusedError(HTTPStatus.CONFLICT, f"upload {upload}", found, fix)
