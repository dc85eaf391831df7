"""The tables of the service's store, in SQLite or PostgreSQL.

SQLite is the default: one file in the store's folder, for the servers of one machine. PostgreSQL is for
servers on several machines, which also share a folder for the runs.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import ConnectionPoolEntry

from finetune.errors import DiskError, EnvironmentFaultError

VERSION = 1
"""Version of the tables; a server of another version refuses the store."""
_POSTGRES_DISK_FULL = "53100"
BUSY_SECONDS = 30.0
"""Longest wait for another writer of a SQLite file."""

metadata = MetaData()

versions = Table("versions", metadata, Column("version", Integer, primary_key=True))

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),  # its order is that of submission
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("recipe", JSON, nullable=False),
    Column("label", String(200), nullable=False, default=""),
    Column("created", Float, nullable=False),
    Column("changed", Float, nullable=False),
    Column("not_before", Float, nullable=False, default=0.0),  # of the next attempt
    Column("attempt", Integer, nullable=False, default=0),
    Column("server", String(64), nullable=False, default=""),  # that runs the attempt
    Column("lease", Float, nullable=False, default=0.0),  # until when that server has said that it lives
    Column("seq", Integer, nullable=False, default=0),  # of the last event
    Column("outcome", JSON),
    Index("jobs_by_state", "state", "not_before"),
)

events = Table(
    "events",
    metadata,
    Column("job", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True),  # from 1, without gaps
    Column("time", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("message", String, nullable=False, default=""),
)

keys = Table(
    "idempotency_keys",
    metadata,
    Column("kind", String(16), primary_key=True),  # of the job
    Column("key", String(200), primary_key=True),
    Column("body", String(64), nullable=False),  # SHA-256 of the request
    Column("job", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
)

datasets = Table(
    "datasets",
    metadata,
    Column("id", String(64), primary_key=True),  # SHA-256 of the archive
    Column("name", String(200), nullable=False, default=""),
    Column("file", String(100), nullable=False),  # its suffix says what kind of archive it is
    Column("num_bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    Column("check", String(32), nullable=False),  # the job that checks it
)

models = Table(
    "models",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),  # from 1
    Column("job", String(32), nullable=False),
    Column("sha256", String(64), nullable=False),  # of its weights
    Column("created", Float, nullable=False),
)


def open_store(address: str) -> Engine:
    """Open a store; its tables are made on the first call.

    Args:
        address: folder of a SQLite file, or ``postgresql://...``.

    Raises:
        EnvironmentFaultError: the database is not reached, or belongs to another version of finetune.
        DiskError: the folder cannot be written.
    """
    engine = _open_postgres(address) if _is_url(address) else _open_sqlite(Path(address))
    try:
        _make_tables(engine)
    except DBAPIError as error:
        if is_disk_full(error):
            raise DiskError("--store", "the disk is full", "Free some space.") from None
        fix = "Start the database, or correct its address."
        raise EnvironmentFaultError(
            "--store", f"the database cannot be used ({_reason(error)})", fix
        ) from None
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that sees one state of the store; it neither waits for writers nor blocks them."""
    with engine.execution_options(reading=True).begin() as connection:
        yield connection


def read_clock(connection: Connection) -> float:
    """Return the time in seconds since 1970, by the one clock that all servers of a store share."""
    if connection.dialect.name == "postgresql":
        seconds: float = connection.execute(
            select(func.extract("epoch", func.clock_timestamp()))
        ).scalar_one()
        return float(seconds)
    return time.time()


def _is_url(address: str) -> bool:
    return address.startswith(("postgresql://", "postgres://"))


def _open_postgres(address: str) -> Engine:
    rest = address.partition("://")[2]
    return create_engine(f"postgresql+psycopg://{rest}", pool_pre_ping=True, pool_size=10, max_overflow=20)


def _open_sqlite(folder: Path) -> Engine:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"--store {folder}", error.strerror or str(error), "Name another folder.") from None
    engine = create_engine(f"sqlite:///{folder / 'store.sqlite'}", connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


def _set_up_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, and not the driver
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    """Begin a transaction; one that writes takes the lock at once, since a reader cannot become a writer."""
    is_reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")


def _make_tables(engine: Engine) -> None:
    metadata.create_all(engine)
    try:
        with engine.begin() as connection:
            found = connection.execute(select(versions.c.version)).scalar_one_or_none()
            if found is None:
                connection.execute(insert(versions).values(version=VERSION))
                found = VERSION
    except IntegrityError:  # another server began at the same moment
        found = VERSION
    if found != VERSION:
        known = f"the store has version {found} of its tables, and this finetune version {VERSION}"
        raise EnvironmentFaultError("--store", known, "Use the finetune that made it, or another store.")


def is_disk_full(error: DBAPIError) -> bool:
    """Whether the database could not write, since its disk is full."""
    is_sqlite_full = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return is_sqlite_full or getattr(error.orig, "sqlstate", None) == _POSTGRES_DISK_FULL


def _reason(error: DBAPIError) -> str:
    """Return the first line of a driver's message; never the statement or the address with its password."""
    return (str(error.orig).strip().splitlines() or [type(error.orig).__name__])[0][:200]
