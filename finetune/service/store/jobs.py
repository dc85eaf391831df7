"""Jobs in the store: submitted once, claimed by one server, moved along the table of states.

Every change of a job and its event are one transaction, guarded by the state and the attempt that it expects:
a server that was suspended for longer than its lease finds that its attempt is no longer the job's, and
changes nothing. Events of a job are numbered from 1 without gaps.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from finetune.errors import UsageError
from finetune.service.store.states import ACTIVE, RESUMABLE, WAITING, Kind, State, sources_of
from finetune.service.store.tables import events, jobs, keys, read_clock, reading

LEASE = 30.0
"""Seconds after which a server that has not renewed its lease is taken for lost."""


class ConflictError(UsageError):
    """The job is in a state that does not allow this, or the key belongs to another request."""


class TooManyJobsError(UsageError):
    """As many jobs wait as may wait."""

    def __init__(self, number: int) -> None:
        super().__init__("a new job", f"{number} jobs wait already", "Try again later.")


class UnknownError(UsageError):
    """There is nothing of that id."""


class UnknownJobError(UnknownError):
    """There is no job of that id."""

    def __init__(self, job: str) -> None:
        super().__init__(f"job {job[:64]}", "there is no job of that id", "See `finetune jobs list`.")


@dataclass(frozen=True)
class Job:
    """A job as it is in the store.

    Attributes:
        id: unique; ids sort by time of submission.
        kind: what it does.
        state: where it is.
        recipe: what ``finetune run`` is given.
        label: name that the user gave it; may be empty.
        created: when it was submitted, in seconds since 1970.
        changed: when its state changed last.
        not_before: when its next attempt may begin.
        attempt: number of processes that were started for it.
        outcome: content of the run's ``outcome.json`` after an attempt; None before.
    """

    id: str
    kind: Kind
    state: State
    recipe: Mapping[str, Any]
    label: str
    created: float
    changed: float
    not_before: float
    attempt: int
    outcome: Mapping[str, Any] | None

    @classmethod
    def of(cls, row: RowMapping) -> Job:
        """Return the job of a row."""
        names = ("id", "recipe", "label", "created", "changed", "not_before", "attempt", "outcome")
        return cls(kind=Kind(row["kind"]), state=State(row["state"]), **{name: row[name] for name in names})


@dataclass(frozen=True)
class JobEvent:
    """A change of a job's state: its number, time, the new state, the attempt, and why."""

    seq: int
    time: float
    state: State
    attempt: int
    message: str


class JobStore:
    """The jobs of a store.

    Args:
        engine: from :func:`finetune.service.store.tables.open_store`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # --- what clients do ---------------------------------------------------------------------------

    def submit(
        self,
        recipe: Mapping[str, Any],
        *,
        kind: Kind = Kind.RUN,
        key: str | None = None,
        label: str = "",
        most_waiting: int | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job, unless the same request was made before.

        Args:
            recipe: a valid recipe.
            kind: what the job does.
            key: idempotency key of the request; a second request of its kind gets the first one's job.
            label: name for people.
            most_waiting: number of waiting jobs at which a new one is refused; None for any.

        Returns:
            The job, and whether it is new.

        Raises:
            ConflictError: another request had the key.
            TooManyJobsError: enough jobs wait already.
        """
        body = _digest(kind, recipe, label)
        try:
            with self._engine.begin() as connection:
                if key is not None and (found := self._find_key(connection, kind, key, body)) is not None:
                    return found, False
                if most_waiting is not None:
                    _check_room(connection, most_waiting)
                job = self._insert(connection, kind, recipe, label)
                if key is not None:
                    connection.execute(insert(keys).values(kind=kind, key=key, body=body, job=job))
                return self._get(connection, job), True
        except IntegrityError:  # PostgreSQL: the same request was made at the same moment
            with self._engine.begin() as connection:
                found = self._find_key(connection, kind, str(key), body)
                if found is None:
                    raise
                return found, False

    def get(self, job: str) -> Job:
        """Return a job.

        Raises:
            UnknownJobError: there is none.
        """
        with reading(self._engine) as connection:
            return self._get(connection, job)

    def list_jobs(
        self,
        *,
        kind: Kind = Kind.RUN,
        states: Collection[State] = (),
        label: str = "",
        limit: int = 50,
        after: str = "",
    ) -> Sequence[Job]:
        """Return jobs of a kind, the newest first.

        Args:
            kind: what they do.
            states: only those in one of these; all without.
            label: only those with this label.
            limit: most jobs that are returned.
            after: id of the last job of the page before.
        """
        query = select(jobs).where(jobs.c.kind == kind).order_by(jobs.c.id.desc()).limit(limit)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if label:
            query = query.where(jobs.c.label == label)
        if after:
            query = query.where(jobs.c.id < after)
        with reading(self._engine) as connection:
            return [Job.of(row) for row in connection.execute(query).mappings()]

    def count_by_state(self) -> Mapping[State, int]:
        """Return the number of jobs in each state that has any."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with reading(self._engine) as connection:
            return {State(state): number for state, number in connection.execute(query)}

    def list_events(self, job: str, after: int = 0, limit: int = 100) -> Sequence[JobEvent]:
        """Return the events of a job with a number above ``after``, in order.

        Raises:
            UnknownJobError: there is no such job.
        """
        query = select(events).where(events.c.job == job, events.c.seq > after)
        with reading(self._engine) as connection:
            self._get(connection, job)
            rows = connection.execute(query.order_by(events.c.seq).limit(limit)).mappings()
            return [
                JobEvent(row["seq"], row["time"], State(row["state"]), row["attempt"], row["message"])
                for row in rows
            ]

    def cancel(self, job: str) -> Job:
        """Cancel a job: at once if it has no process, else its server stops it. An ended one stays as it is.

        Raises:
            UnknownJobError: there is no such job.
        """
        with self._engine.begin() as connection:
            for before, after in ((WAITING, State.CANCELLED), ({State.RUNNING}, State.CANCELLING)):
                if self._move(connection, job, after, "cancelled by the user", before=before):
                    break
            return self._get(connection, job)

    def resume(self, job: str) -> Job:
        """Queue a job again that failed or was cancelled; its run goes on from its last checkpoint.

        Raises:
            UnknownJobError: there is no such job.
            ConflictError: it has neither failed nor been cancelled.
        """
        with self._engine.begin() as connection:
            now = read_clock(connection)
            is_done = self._move(connection, job, State.QUEUED, "resumed by the user", not_before=now)
            found = self._get(connection, job)
            if not is_done:
                fix = f"Only jobs that are {' or '.join(sorted(RESUMABLE))} can be resumed."
                raise ConflictError(f"job {job}", f"it is {found.state}", fix)
            return found

    def remove(self, job: str) -> None:
        """Remove a job that has ended, and its events.

        Raises:
            UnknownJobError: there is no such job.
            ConflictError: it has not ended.
        """
        with self._engine.begin() as connection:
            found = self._get(connection, job)
            if not found.state.is_terminal:
                raise ConflictError(f"job {job}", f"it is {found.state}", "Cancel it first.")
            connection.execute(delete(jobs).where(jobs.c.id == job, jobs.c.state == found.state))

    # --- what servers do ---------------------------------------------------------------------------

    def claim(self, server: str) -> Job | None:
        """Take the oldest job that waits, for one attempt of this server; None if there is none.

        Args:
            server: unique name of the server.
        """
        with self._engine.begin() as connection:
            now = read_clock(connection)
            oldest = (
                select(jobs.c.id)
                .where(jobs.c.state.in_(WAITING), jobs.c.not_before <= now)
                .order_by(jobs.c.id)
                .limit(1)
                .with_for_update(skip_locked=True)  # SQLite has one writer at a time
            )
            job = connection.execute(oldest).scalar_one_or_none()
            if job is None:
                return None
            number = jobs.c.attempt + 1
            values: dict[str, Any] = {"server": server, "lease": now + LEASE, "attempt": number}
            if not self._move(connection, job, State.RUNNING, "started", **values):
                return None
            return self._get(connection, job)

    def list_running(self, server: str) -> Sequence[Job]:
        """Return the jobs that a server runs; some of them may have to be stopped."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(jobs).where(*_run_by(server))).mappings()
            return [Job.of(row) for row in rows]

    def renew(self, server: str) -> None:
        """Renew the lease of a server's jobs."""
        with self._engine.begin() as connection:
            lease = read_clock(connection) + LEASE
            connection.execute(update(jobs).where(*_run_by(server)).values(lease=lease))

    def finish(self, job: Job, state: State, outcome: Mapping[str, Any], wait: float = 0.0) -> bool:
        """Record how an attempt ended.

        Args:
            job: as it was claimed.
            state: terminal, or ``retrying``.
            outcome: content of the run's ``outcome.json``.
            wait: seconds before the next attempt.

        Returns:
            False if the attempt is no longer the job's, so that nothing changed.
        """
        message = str(outcome.get("message", ""))
        with self._engine.begin() as connection:
            values: dict[str, Any] = {"outcome": dict(outcome), "server": ""}
            if wait:
                values["not_before"] = read_clock(connection) + wait
            return self._move(connection, job.id, state, message, of_attempt=job.attempt, **values)

    def recover(self) -> Sequence[str]:
        """Queue the jobs of servers that were lost, and cancel those that were to be; return their ids."""
        recovered: list[str] = []
        with self._engine.begin() as connection:
            now = read_clock(connection)
            lost = select(jobs.c.id, jobs.c.attempt).where(jobs.c.state.in_(ACTIVE), jobs.c.lease < now)
            for job, attempt in connection.execute(lost.with_for_update(skip_locked=True)).all():
                for before, after in ((State.RUNNING, State.RETRYING), (State.CANCELLING, State.CANCELLED)):
                    values: dict[str, Any] = {"server": "", "not_before": now}
                    message = "its server was lost"
                    if self._move(
                        connection, job, after, message, before={before}, of_attempt=attempt, **values
                    ):
                        recovered.append(job)
        return recovered

    # --- inside a transaction ----------------------------------------------------------------------

    def _insert(self, connection: Connection, kind: Kind, recipe: Mapping[str, Any], label: str) -> str:
        now, job = read_clock(connection), _make_id()
        values = {"kind": kind, "recipe": dict(recipe), "label": label}
        times = {"created": now, "changed": now, "not_before": now}
        connection.execute(insert(jobs).values(id=job, state=State.QUEUED, seq=1, **values, **times))
        self._add_event(connection, job, 1, now, State.QUEUED, 0, "submitted")
        return job

    def _move(
        self,
        connection: Connection,
        job: str,
        state: State,
        message: str,
        *,
        before: Collection[State] | None = None,
        of_attempt: int | None = None,
        **values: Any,
    ) -> bool:
        """Change the state of a job and add the event; return False if it is in another state or attempt."""
        allowed = sources_of(state) if before is None else sources_of(state) & frozenset(before)
        guard = [jobs.c.id == job, jobs.c.state.in_(allowed)]
        if of_attempt is not None:
            guard.append(jobs.c.attempt == of_attempt)
        now = read_clock(connection)
        changed = {"state": state, "seq": jobs.c.seq + 1, "changed": now, **values}
        done = update(jobs).where(*guard).values(changed).returning(jobs.c.seq, jobs.c.attempt)
        row = connection.execute(done).one_or_none()
        if row is None:
            return False
        self._add_event(connection, job, row.seq, now, state, row.attempt, message)
        return True

    def _add_event(
        self, connection: Connection, job: str, seq: int, now: float, state: State, attempt: int, message: str
    ) -> None:
        values = {"job": job, "seq": seq, "time": now, "state": state, "attempt": attempt}
        connection.execute(insert(events).values(message=message[:2000], **values))

    def _get(self, connection: Connection, job: str) -> Job:
        row = connection.execute(select(jobs).where(jobs.c.id == job)).mappings().one_or_none()
        if row is None:
            raise UnknownJobError(job)
        return Job.of(row)

    def _find_key(self, connection: Connection, kind: Kind, key: str, body: str) -> Job | None:
        query = select(keys).where(keys.c.kind == kind, keys.c.key == key)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        if row["body"] != body:
            found = "another request was made with it"
            raise ConflictError(f"Idempotency-Key {key[:64]}", found, "Use a new key for a new request.")
        return self._get(connection, row["job"])


def _check_room(connection: Connection, most_waiting: int) -> None:
    waiting = select(func.count()).select_from(jobs).where(jobs.c.state.in_(WAITING))
    if connection.execute(waiting).scalar_one() >= most_waiting:
        raise TooManyJobsError(most_waiting)


def _run_by(server: str) -> tuple[ColumnElement[bool], ...]:
    return jobs.c.server == server, jobs.c.state.in_(ACTIVE)


def _make_id() -> str:
    """Return a unique id; ids of later calls are greater, up to a millisecond."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


def _digest(kind: Kind, recipe: Mapping[str, Any], label: str) -> str:
    return hashlib.sha256(json.dumps([kind, recipe, label], sort_keys=True).encode()).hexdigest()
