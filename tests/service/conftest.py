"""Stores of both kinds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from finetune.service.store.jobs import JobStore
from finetune.service.store.tables import metadata, open_store
from tests.service.databases import Postgres, find_postgres, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if find_postgres() is None:
        pytest.skip("there is no PostgreSQL server on this machine")
    # Not below pytest's own folder, which every session closes to other users, of whom PostgreSQL is one.
    with tempfile.TemporaryDirectory() as folder, running_postgres(Path(folder)) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty store."""
    if request.param == "sqlite":
        yield str(tmp_path / "store")
        return
    server: Postgres = request.getfixturevalue("postgres")
    yield server.address
    engine = create_engine(server.address.replace("postgresql://", "postgresql+psycopg://"))
    metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def engine(address: str) -> Iterator[Engine]:
    engine = open_store(address)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)
