"""Jobs in the store, on SQLite and on PostgreSQL: one table of states, no job lost, none taken twice."""

from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, update

from finetune.errors import DiskError, EnvironmentFaultError
from finetune.service.store import jobs as jobs_module
from finetune.service.store.jobs import ConflictError, JobStore, TooManyJobsError, UnknownJobError
from finetune.service.store.states import ACTIVE, TERMINAL, TRANSITIONS, WAITING, Kind, State, sources_of
from finetune.service.store.tables import VERSION, jobs, open_store, versions

RECIPE = {"data": {"path": "/data/ants"}, "strategy": {"name": "auto"}}
DONE = {"state": "done", "message": "finished", "exit_code": 0}


def states_of(store: JobStore, job: str) -> list[str]:
    events = store.list_events(job)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.state.value for event in events]


def test_the_table_of_states_is_closed_and_every_state_can_be_reached_and_left() -> None:
    assert TRANSITIONS.keys() == set(State)
    reached = {State.QUEUED}
    for _ in State:
        reached |= {after for before in reached for after in TRANSITIONS[before]}
    assert reached == set(State)
    assert not TRANSITIONS[State.SUCCEEDED]
    assert all(TRANSITIONS[state] for state in set(State) - {State.SUCCEEDED})
    assert set(State) == TERMINAL | WAITING | ACTIVE
    assert sources_of(State.RUNNING) == WAITING


@pytest.mark.sample(1)
def test_a_job_goes_its_way_and_every_step_is_an_event(store: JobStore) -> None:
    job, is_new = store.submit(RECIPE, label="ants")
    assert is_new and job.state == State.QUEUED and job.attempt == 0 and job.outcome is None
    claimed = store.claim("server-1")
    assert claimed is not None and claimed.id == job.id and claimed.attempt == 1
    assert store.claim("server-2") is None
    assert store.finish(claimed, State.SUCCEEDED, DONE)
    ended = store.get(job.id)
    assert ended.state == State.SUCCEEDED and ended.outcome == DONE and ended.recipe == RECIPE
    assert states_of(store, job.id) == ["queued", "running", "succeeded"]
    assert [event.message for event in store.list_events(job.id, after=2)] == ["finished"]
    assert not store.finish(claimed, State.FAILED, DONE)


def test_the_same_request_is_one_job(store: JobStore) -> None:
    first, is_new = store.submit(RECIPE, key="k")
    assert is_new
    assert store.submit(RECIPE, key="k") == (first, False)
    with pytest.raises(ConflictError, match="another request was made with it"):
        store.submit(RECIPE | {"seed": 1}, key="k")
    other, is_new = store.submit(RECIPE, key="k", kind=Kind.CHECK)  # keys of kinds are apart
    assert is_new and other.id != first.id
    assert store.submit(RECIPE)[1] and store.submit(RECIPE)[1]  # without a key every request is new
    assert len(store.list_jobs()) == 3  # a check is no job of a client


def test_enough_waiting_jobs_refuse_a_new_one_but_no_request_that_was_made_before(store: JobStore) -> None:
    first, _ = store.submit(RECIPE, key="k", most_waiting=1)
    with pytest.raises(TooManyJobsError, match="1 jobs wait already"):
        store.submit(RECIPE, key="another", most_waiting=1)
    assert store.submit(RECIPE, key="k", most_waiting=1) == (first, False)


def test_jobs_are_listed_newest_first_page_by_page(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(jobs_module, "_make_id", lambda: f"{next(numbers):024x}")
    made = [store.submit(RECIPE, label=f"l{number % 2}")[0].id for number in range(5)]
    pages = [
        store.list_jobs(limit=2),
        store.list_jobs(limit=2, after=made[3]),
        store.list_jobs(after=made[1]),
    ]
    assert [job.id for page in pages for job in page] == made[::-1]
    assert [job.id for job in store.list_jobs(label="l1")] == [made[3], made[1]]
    store.cancel(made[0])
    assert [job.id for job in store.list_jobs(states=[State.CANCELLED])] == [made[0]]
    assert store.claim("s").id == made[1]  # type: ignore[union-attr]  # the oldest that waits


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_server(store: JobStore) -> None:
    waiting, running = store.submit(RECIPE)[0], store.submit(RECIPE)[0]
    by_id = {job.id: job for job in (store.claim("s"),) if job is not None}
    [taken] = by_id.values()
    other = running.id if taken.id == waiting.id else waiting.id
    assert store.cancel(other).state == State.CANCELLED
    assert store.cancel(taken.id).state == State.CANCELLING
    assert store.cancel(taken.id).state == State.CANCELLING  # twice is once
    assert [job.state for job in store.list_running("s")] == [State.CANCELLING]
    assert store.finish(taken, State.CANCELLED, DONE)
    assert store.cancel(taken.id).state == State.CANCELLED
    assert states_of(store, taken.id) == ["queued", "running", "cancelling", "cancelled"]
    assert store.claim("s") is None


def test_an_ended_job_is_resumed_or_removed_and_no_other(store: JobStore) -> None:
    job = store.submit(RECIPE, key="k")[0].id
    for act, words in ((store.resume, "can be resumed"), (store.remove, "Cancel it first")):
        with pytest.raises(ConflictError) as refused:
            act(job)
        assert words in str(refused.value)
    store.cancel(job)
    assert store.resume(job).state == State.QUEUED
    claimed = store.claim("s")
    assert claimed is not None and store.finish(claimed, State.FAILED, DONE)
    assert store.resume(job).state == State.QUEUED
    again = store.claim("s")
    assert again is not None and again.attempt == 2 and store.finish(again, State.SUCCEEDED, DONE)
    with pytest.raises(ConflictError, match="it is succeeded"):
        store.resume(job)
    store.remove(job)
    for ask in (store.get, store.list_events, store.cancel, store.resume, store.remove):
        with pytest.raises(UnknownJobError):
            ask(job)
    assert store.submit(RECIPE, key="k")[1]  # its key went with it


def test_a_retry_waits(store: JobStore) -> None:
    store.submit(RECIPE)
    claimed = store.claim("s")
    assert claimed is not None and store.finish(claimed, State.RETRYING, DONE, wait=3600)
    assert store.claim("s") is None
    assert store.get(claimed.id).not_before > claimed.changed + 3000


def expire(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(update(jobs).values(lease=1.0))


def test_jobs_of_a_lost_server_go_on_and_it_changes_nothing_when_it_comes_back(
    store: JobStore, engine: Engine
) -> None:
    store.submit(RECIPE)
    stale = store.claim("lost")
    assert stale is not None and list(store.recover()) == []  # its lease runs
    expire(engine)
    store.renew("lost")
    assert list(store.recover()) == []
    expire(engine)
    assert list(store.recover()) == [stale.id] and list(store.recover()) == []
    fresh = store.claim("other")
    assert fresh is not None and fresh.attempt == 2
    store.renew("lost")
    assert store.list_running("lost") == [] and [job.id for job in store.list_running("other")] == [stale.id]
    assert not store.finish(stale, State.SUCCEEDED, DONE)
    assert store.get(stale.id).state == State.RUNNING
    assert store.finish(fresh, State.SUCCEEDED, DONE)
    assert states_of(store, stale.id) == ["queued", "running", "retrying", "running", "succeeded"]


def test_a_job_that_was_to_be_cancelled_is_when_its_server_is_lost(store: JobStore, engine: Engine) -> None:
    job = store.submit(RECIPE)[0].id
    store.claim("lost")
    store.cancel(job)
    expire(engine)
    assert list(store.recover()) == [job] and store.get(job).state == State.CANCELLED


def take_all(address: str, name: str, barrier: Any, taken: Any) -> None:
    store = JobStore(open_store(address))
    barrier.wait()
    while (job := store.claim(name)) is not None:
        taken.put((job.id, name))
        store.finish(job, State.SUCCEEDED, DONE)
    taken.put(None)


@pytest.mark.sample(1)
def test_servers_that_claim_at_once_take_every_job_once(
    store: JobStore, address: str, engine: Engine
) -> None:
    made = {store.submit(RECIPE)[0].id for _ in range(60)}
    engine.dispose()
    context = multiprocessing.get_context("spawn")
    barrier, taken = context.Barrier(4), context.Queue()
    servers = [context.Process(target=take_all, args=(address, f"s{n}", barrier, taken)) for n in range(4)]
    for server in servers:
        server.start()
    found, ended = [], 0
    while ended < len(servers):
        one = taken.get(timeout=120)
        ended, found = (ended + 1, found) if one is None else (ended, [*found, one])
    for server in servers:
        server.join()
    assert sorted(job for job, _ in found) == sorted(made)
    assert {job.state for job in store.list_jobs(limit=100)} == {State.SUCCEEDED}


def submit_once(address: str, barrier: Any, made: Any) -> None:
    store = JobStore(open_store(address))
    barrier.wait()
    made.put(store.submit(RECIPE, key="same"))


@pytest.mark.sample(1)
def test_a_request_that_is_sent_twice_at_once_is_one_job(store: JobStore, address: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, made = context.Barrier(3), context.Queue()
    clients = [context.Process(target=submit_once, args=(address, barrier, made)) for _ in range(3)]
    for client in clients:
        client.start()
    answers = [made.get(timeout=120) for _ in clients]
    for client in clients:
        client.join()
    assert len({job.id for job, _ in answers}) == 1 and sum(is_new for _, is_new in answers) == 1
    assert len(store.list_jobs()) == 1


def test_a_store_of_another_version_is_refused(engine: Engine, address: str) -> None:
    with engine.begin() as connection:
        connection.execute(update(versions).values(version=VERSION + 1))
    with pytest.raises(EnvironmentFaultError, match=f"version {VERSION + 1} of its tables"):
        open_store(address)


def test_databases_that_cannot_be_used_are_refused_without_their_password(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFaultError, match="the database cannot be used") as refused:
        open_store("postgresql://finetune:secretword@127.0.0.1:9/none")
    assert "secretword" not in str(refused.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        open_store(str(tmp_path / "file" / "store"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "store.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(EnvironmentFaultError, match="not a database"):
        open_store(str(tmp_path / "bad"))


def test_an_event_of_an_unknown_job_is_refused_by_the_database(engine: Engine) -> None:
    from sqlalchemy.exc import IntegrityError

    from finetune.service.store.tables import events

    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(
            insert(events).values(job="x", seq=1, time=0, state="queued", attempt=0, message="")
        )
