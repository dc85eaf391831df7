"""``/v1/jobs``: submit, list, look at, cancel, resume and remove jobs; their events, logs and artefacts."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from finetune.recipe.json_schema import build_schema
from finetune.runs.reader import RunReader
from finetune.service.artefacts import find_artefact, list_artefacts
from finetune.service.context import Context
from finetune.service.problems import RefusedError
from finetune.service.store.folder import JobFolder
from finetune.service.store.jobs import ConflictError, Job, JobEvent, TooManyJobsError
from finetune.service.store.states import WAITING, State
from finetune.service.work.dry_run import run_dry

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
POLL = 0.5
"""Seconds between two looks for new events and lines."""
KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy ends the connection."""
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": build_schema()}}}}


def describe(context: Context, job: Job) -> dict[str, Any]:
    """Return a job as clients see it."""
    folder = context.folder.job(job.id)
    reader = RunReader(folder.run, tolerant=True)
    facts = {
        "id": job.id,
        "state": job.state.value,
        "label": job.label,
        "created": job.created,
        "changed": job.changed,
        "attempt": job.attempt,
        "not_before": job.not_before if job.state in WAITING else None,
        "progress": reader.progress or None,
        "outcome": job.outcome,
        "metrics": reader.metrics or None if job.state == State.SUCCEEDED else None,
        "recipe": job.recipe,
    }
    names = ("events", "logs", "artifacts")
    return facts | {"links": {name: f"/v1/jobs/{job.id}/{name}" for name in names}}


@router.post("", status_code=201, openapi_extra=_BODY, summary="Submit a job")
async def submit(
    request: Request,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    label: Annotated[str, Query(max_length=200)] = "",
    dry_run: Annotated[bool, Query(description="Return the plan and estimates, and store nothing.")] = False,
) -> Response:
    """Queue a run. The body is a recipe; the same ``Idempotency-Key`` with the same body is the same job."""
    context = Context.of(request)
    values = await context.read_json(request, context.settings.limits.recipe_bytes)
    recipe = await run_in_threadpool(context.submission.read, values)
    if dry_run:
        return JSONResponse(await run_in_threadpool(run_dry, recipe))
    job, is_new = await run_in_threadpool(_submit, context, recipe, idempotency_key, label)
    status = HTTPStatus.CREATED if is_new else HTTPStatus.OK
    described = await run_in_threadpool(describe, context, job)
    return JSONResponse(described, status, {"Location": f"/v1/jobs/{job.id}"})


def _submit(context: Context, recipe: Mapping[str, Any], key: str | None, label: str) -> tuple[Job, bool]:
    limit = context.settings.limits.waiting_jobs
    try:
        return context.jobs.submit(recipe, key=key, label=label, most_waiting=limit)
    except TooManyJobsError as error:
        raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, error.asked, error.found, error.fix) from None
    except ConflictError as error:  # of the key; other conflicts are of states
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, error.asked, error.found, error.fix) from None


@router.get("", summary="List jobs")
def list_all(
    request: Request,
    state: Annotated[list[State] | None, Query(description="Only jobs in one of these states.")] = None,
    label: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: Annotated[str, Query(max_length=32, description="Id of the last job of the page before.")] = "",
) -> dict[str, Any]:
    """Return jobs, the newest first, without their recipes."""
    context = Context.of(request)
    found = context.jobs.list_jobs(states=state or (), label=label, limit=limit, after=after)
    keys = ("id", "state", "label", "created", "changed", "attempt", "outcome")
    rows = [{key: getattr(job, key) for key in keys} for job in found]
    return {"jobs": rows, "next": found[-1].id if len(found) == limit else None}


@router.get("/{job}", summary="Show a job")
def show(request: Request, job: str) -> dict[str, Any]:
    """Return a job with its progress, its outcome and its metrics."""
    context = Context.of(request)
    return describe(context, context.jobs.get(job))


@router.post("/{job}/cancel", status_code=202, summary="Cancel a job")
def cancel(request: Request, response: Response, job: str) -> dict[str, Any]:
    """Cancel a job; one that has ended stays as it is (200)."""
    context = Context.of(request)
    found = context.jobs.cancel(job)
    if found.state != State.CANCELLING:
        response.status_code = HTTPStatus.OK
    return describe(context, found)


@router.post("/{job}/resume", status_code=202, summary="Resume a job")
def resume(request: Request, job: str) -> dict[str, Any]:
    """Queue a job again that failed or was cancelled; it goes on from its last checkpoint."""
    context = Context.of(request)
    return describe(context, context.jobs.resume(job))


@router.delete("/{job}", status_code=204, summary="Remove a job")
def remove(request: Request, job: str) -> Response:
    """Remove a job that has ended, with its run folder."""
    context = Context.of(request)
    context.jobs.remove(job)
    shutil.rmtree(context.folder.job(job).path, ignore_errors=True)
    return Response(status_code=HTTPStatus.NO_CONTENT)


# --- events --------------------------------------------------------------------------------------


@router.get("/{job}/events", summary="Events of a job", response_model=None)
async def events(
    request: Request,
    job: str,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """Return a page of events; with ``Accept: text/event-stream`` a stream that goes on until the job ends.

    A client that was disconnected sends ``Last-Event-ID`` and misses none.
    """
    context = Context.of(request)
    start = after if last_event_id is None else last_event_id
    if "text/event-stream" in request.headers.get("accept", ""):
        await run_in_threadpool(context.jobs.get, job)  # unknown ones are refused before the stream begins
        stream = _stream_events(context, request, job, start)
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
    found = await run_in_threadpool(context.jobs.list_events, job, start, limit)
    rows = [_describe_event(event) for event in found]
    return JSONResponse({"events": rows, "next": found[-1].seq if len(found) == limit else None})


def _describe_event(event: JobEvent) -> dict[str, Any]:
    keys = ("seq", "time", "state", "attempt", "message")
    return {key: getattr(event, key) for key in keys}


async def _stream_events(context: Context, request: Request, job: str, after: int) -> AsyncIterator[str]:
    """Yield the events of a job as they come, and between them its progress whenever it has changed."""
    seen: Any = None
    silent = 0.0
    while await context.has_listener(request):
        found = await run_in_threadpool(context.jobs.list_events, job, after)
        for event in found:
            after, silent = event.seq, 0.0
            yield f"id: {event.seq}\nevent: state\ndata: {json.dumps(_describe_event(event))}\n\n"
        if found and found[-1].state.is_terminal:
            return
        progress = await run_in_threadpool(_read_progress, context.folder.job(job))
        if progress and progress != seen:
            seen, silent = progress, 0.0
            yield f"event: progress\ndata: {json.dumps(progress)}\n\n"
        if silent >= KEEP_ALIVE:
            silent = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(POLL)
        silent += POLL


def _read_progress(folder: JobFolder) -> Mapping[str, Any]:
    return RunReader(folder.run, tolerant=True).progress


# --- files ---------------------------------------------------------------------------------------


@router.get("/{job}/logs", summary="Log of an attempt", response_model=None)
def logs(
    request: Request,
    job: str,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    follow: Annotated[bool, Query(description="Go on until the attempt ends.")] = False,
) -> Response:
    """Return what an attempt wrote to its terminal, by default the last one; ranges are possible."""
    context = Context.of(request)
    found = context.jobs.get(job)
    path = context.folder.job(job).log(attempt or max(found.attempt, 1))
    if follow:
        number = attempt or max(found.attempt, 1)
        return StreamingResponse(
            _follow(context, request, job, number), media_type="text/plain; charset=utf-8"
        )
    if not path.is_file():
        return Response("", media_type="text/plain; charset=utf-8")
    return FileResponse(path, media_type="text/plain; charset=utf-8")


async def _follow(context: Context, request: Request, job: str, attempt: int) -> AsyncIterator[bytes]:
    """Yield the lines of a log as they are written, until the attempt has ended."""
    path, done = context.folder.job(job).log(attempt), 0
    while await context.has_listener(request):
        found = await run_in_threadpool(context.jobs.get, job)
        is_over = found.state.is_terminal or found.attempt > attempt
        while chunk := await run_in_threadpool(_read_from, path, done):
            done += len(chunk)
            yield chunk
        if is_over:
            return
        await asyncio.sleep(POLL)


def _read_from(path: Any, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            content: bytes = file.read(1 << 16)
            return content
    except FileNotFoundError:
        return b""


@router.get("/{job}/artifacts", summary="Files of a job's run")
def artifacts(request: Request, job: str) -> dict[str, Any]:
    """Return the files of the run: name, size, SHA-256 and type."""
    context = Context.of(request)
    context.jobs.get(job)
    found = list_artefacts(context.folder.job(job).run)
    keys = ("name", "num_bytes", "sha256", "media_type")
    return {"artifacts": [{key: getattr(one, key) for key in keys} for one in found]}


@router.get("/{job}/artifacts/{name:path}", summary="A file of a job's run", response_model=None)
def artifact(
    request: Request, job: str, name: str, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Return a file. Its ``ETag`` is its SHA-256, and ranges are possible."""
    context = Context.of(request)
    context.jobs.get(job)
    found = find_artefact(context.folder.job(job).run, name)
    headers = {"ETag": f'"{found.sha256}"', "X-Content-Type-Options": "nosniff"}
    if if_none_match and headers["ETag"] in if_none_match:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    # A page of a run has a policy of its own; here it also loses the rights of this site.
    headers["Content-Security-Policy"] = "sandbox allow-scripts"
    return FileResponse(found.path, media_type=found.media_type, headers=headers)
