"""Data sets: uploaded archives, known by the SHA-256 of their content, and checked before they are used."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, RowMapping, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from finetune.errors import DataError
from finetune.runs.files import disk_error
from finetune.service.store.folder import StoreFolder
from finetune.service.store.jobs import Job, JobStore, UnknownError
from finetune.service.store.states import Kind, State
from finetune.service.store.tables import datasets, read_clock, reading
from finetune.system.regular_files import hash_regular, open_regular

_MAGIC = ((b"PK\x03\x04", 0, "images.zip"), (b"\x1f\x8b", 0, "images.tar.gz"), (b"ustar", 257, "images.tar"))
_HEAD_BYTES = 512


@dataclass(frozen=True)
class StoredDataset:
    """An uploaded data set; its content never changes.

    Attributes:
        id: SHA-256 of the archive.
        name: for people.
        file: name of the archive in its folder.
        num_bytes: size of the archive.
        created: when it was uploaded.
        check: the job that checks it.
    """

    id: str
    name: str
    file: str
    num_bytes: int
    created: float
    check: Job

    @property
    def state(self) -> str:
        """``checking``, ``ready``, or ``refused`` if no run would accept it."""
        if self.check.state == State.SUCCEEDED:
            return "ready"
        return "refused" if self.check.state.is_terminal else "checking"


class DatasetStore:
    """The data sets of a store.

    Args:
        engine: the database.
        folder: files of the store.
        jobs: its jobs, one of which checks each data set.
    """

    def __init__(self, engine: Engine, folder: StoreFolder, jobs: JobStore) -> None:
        self._engine, self._folder, self._jobs = engine, folder, jobs

    def add(self, archive: Path, name: str = "") -> tuple[StoredDataset, bool]:
        """Take an uploaded archive into the store, and queue its check.

        Args:
            archive: it is moved; the same content as one that is there is removed.
            name: for people.

        Returns:
            The data set, and whether it is new.

        Raises:
            DataError: it is no zip or tar archive.
            DiskError: the store cannot be written.
        """
        file, digest = _find_kind(archive), hash_regular(archive)
        target = self._folder.dataset(digest) / file
        num_bytes = archive.stat().st_size
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            archive.replace(target)
        except OSError as error:
            raise disk_error(target, error) from None
        recipe = {"data": {"path": str(target)}}
        check, _ = self._jobs.submit(recipe, kind=Kind.CHECK, key=f"dataset {digest}")
        row = {"id": digest, "name": name[:200], "file": file, "num_bytes": num_bytes, "check": check.id}
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(datasets).values(created=read_clock(connection), **row))
        except IntegrityError:  # it is there already
            return self.get(digest), False
        return self.get(digest), True

    def get(self, dataset: str) -> StoredDataset:
        """Return a data set.

        Raises:
            UnknownError: there is none of that id.
        """
        with reading(self._engine) as connection:
            query = select(datasets).where(datasets.c.id == dataset)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            found = "there is no data set of that id"
            raise UnknownError(f"data set {dataset[:64]}", found, "Upload it first (POST /v1/datasets).")
        return self._of(row)

    def list_all(self, limit: int = 100) -> Sequence[StoredDataset]:
        """Return the data sets, the newest first."""
        with reading(self._engine) as connection:
            query = select(datasets).order_by(datasets.c.created.desc()).limit(limit)
            rows = list(connection.execute(query).mappings())
        return [self._of(row) for row in rows]

    def find(self, dataset: str) -> Path:
        """Return the archive of a data set that a run accepts.

        Raises:
            UnknownError: there is none of that id.
            DataError: its check found what a run refuses.
        """
        found = self.get(dataset)
        if found.state == "refused":
            outcome: Mapping[str, Any] = found.check.outcome or {}
            message = str(outcome.get("message") or "its check did not end")
            fix = f"{outcome.get('hint') or 'Upload it again.'} See /v1/datasets/{dataset}/check."
            raise DataError(f"data set {dataset[:64]}", message, fix)
        return self.archive(found)

    def archive(self, dataset: StoredDataset) -> Path:
        """Return the path of the archive."""
        return self._folder.dataset(dataset.id) / dataset.file

    def rename(self, dataset: str, name: str) -> None:
        """Give a data set another name."""
        with self._engine.begin() as connection:
            connection.execute(update(datasets).where(datasets.c.id == dataset).values(name=name[:200]))

    def remove(self, dataset: str) -> None:
        """Remove a data set and its check; runs that used it stay.

        Raises:
            UnknownError: there is none of that id.
            ConflictError: it is being checked.
        """
        found = self.get(dataset)
        self._jobs.remove(found.check.id)
        with self._engine.begin() as connection:
            connection.execute(delete(datasets).where(datasets.c.id == dataset))
        for path in (self._folder.dataset(dataset), self._folder.job(found.check.id).path):
            shutil.rmtree(path, ignore_errors=True)

    def _of(self, row: RowMapping) -> StoredDataset:
        names = ("id", "name", "file", "num_bytes", "created")
        return StoredDataset(check=self._jobs.get(row["check"]), **{name: row[name] for name in names})


def _find_kind(archive: Path) -> str:
    """Return the name of an archive, whose suffix says how it is read."""
    with open_regular(archive) as file:
        head = file.read(_HEAD_BYTES)
    for magic, place, name in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return name
    found = "it is empty" if not head else "it is neither a zip nor a tar archive"
    raise DataError("the upload", found, "Pack the folder of class folders as zip, tar or tar.gz.")
