"""Models: the networks of finished jobs under names of their own, version by version.

A version is a copy of what the run exported and proved, so that it stays when the job is removed.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, RowMapping, func, insert, select
from sqlalchemy.exc import IntegrityError

from finetune.errors import UsageError
from finetune.runs.files import disk_error
from finetune.runs.new_folder import new_folder
from finetune.service.store.folder import StoreFolder
from finetune.service.store.jobs import ConflictError, JobStore, UnknownError
from finetune.service.store.states import State
from finetune.service.store.tables import models, read_clock, reading
from finetune.system.regular_files import hash_regular

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model: its name, its number from 1, the job it came from, and its weights' SHA-256."""

    name: str
    version: int
    job: str
    sha256: str
    created: float

    @classmethod
    def of(cls, row: RowMapping) -> ModelVersion:
        """Return the version of a row."""
        return cls(**{key: row[key] for key in ("name", "version", "job", "sha256", "created")})


class ModelStore:
    """The models of a store.

    Args:
        engine: the database.
        folder: files of the store.
        jobs: its jobs.
    """

    def __init__(self, engine: Engine, folder: StoreFolder, jobs: JobStore) -> None:
        self._engine, self._folder, self._jobs = engine, folder, jobs

    def promote(self, name: str, job: str) -> ModelVersion:
        """Make the model of a finished job the next version of a name, unless the last version is its own.

        Raises:
            UsageError: the name is invalid.
            UnknownError: there is no such job.
            ConflictError: the job has not succeeded.
            DiskError: the model cannot be copied.
        """
        if not _NAME.fullmatch(name):
            fix = "Take small letters, digits, dots, dashes and underscores, 63 at most."
            raise UsageError(f"model {name[:64]}", "it is no name of a model", fix)
        found = self._jobs.get(job)
        source = self._folder.job(job).run.model
        if found.state != State.SUCCEEDED or not source.is_dir():
            raise ConflictError(
                f"job {job}", f"it is {found.state} and has no model", "Wait until it succeeds."
            )
        for _ in range(100):
            latest = self._latest(name)
            if latest is not None and latest.job == job:
                return latest
            version = 1 if latest is None else latest.version + 1
            try:
                return self._add(name, version, job, source)
            except IntegrityError:  # another request took the number
                continue
        raise ConflictError(f"model {name}", "others promote jobs at the same time", "Try again.")

    def _add(self, name: str, version: int, job: str, source: Path) -> ModelVersion:
        target = self._folder.model(name, version)
        copy = target.with_name(f".{secrets.token_hex(8)}")
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with new_folder(copy) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)
            row = {"name": name, "version": version, "job": job, "sha256": hash_regular(copy / WEIGHTS)}
            with self._engine.begin() as connection:
                connection.execute(insert(models).values(created=read_clock(connection), **row))
                shutil.rmtree(target, ignore_errors=True)  # of a server that was killed in this block
                copy.rename(target)
        except OSError as error:
            raise disk_error(target, error) from None
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return self.get(name, version)

    def get(self, name: str, version: int | None = None) -> ModelVersion:
        """Return a version of a model, by default the latest.

        Raises:
            UnknownError: there is none.
        """
        query = select(models).where(models.c.name == name)
        if version is not None:
            query = query.where(models.c.version == version)
        with reading(self._engine) as connection:
            row = (
                connection.execute(query.order_by(models.c.version.desc()).limit(1)).mappings().one_or_none()
            )
        if row is None:
            what = f"model {name[:64]}" + (f", version {version}" if version is not None else "")
            raise UnknownError(what, "there is none of that name", "See /v1/models.")
        return ModelVersion.of(row)

    def _latest(self, name: str) -> ModelVersion | None:
        try:
            return self.get(name)
        except UnknownError:
            return None

    def list_all(self) -> Sequence[ModelVersion]:
        """Return the latest version of every model, by name."""
        last = select(models.c.name, func.max(models.c.version).label("version")).group_by(models.c.name)
        latest = last.subquery()
        same = (models.c.name == latest.c.name) & (models.c.version == latest.c.version)
        query = select(models).join(latest, same).order_by(models.c.name)
        with reading(self._engine) as connection:
            return [ModelVersion.of(row) for row in connection.execute(query).mappings()]
