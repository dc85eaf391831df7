"""Errors over HTTP: ``application/problem+json`` (RFC 9457), with the class and the remedy of every error."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from finetune.errors import ExitCode, FinetuneError, sanitize
from finetune.service.html import render
from finetune.service.store.jobs import ConflictError, UnknownError
from finetune.service.store.tables import is_disk_full

MEDIA_TYPE = "application/problem+json"
_STATUS = {
    ExitCode.USAGE: HTTPStatus.UNPROCESSABLE_ENTITY,
    ExitCode.DATA: HTTPStatus.UNPROCESSABLE_ENTITY,
    ExitCode.DISK: HTTPStatus.INSUFFICIENT_STORAGE,
    ExitCode.INTERRUPTED: HTTPStatus.SERVICE_UNAVAILABLE,
    ExitCode.ENVIRONMENT: HTTPStatus.SERVICE_UNAVAILABLE,
}


class RefusedError(FinetuneError):
    """A request that the service refuses with a status of HTTP.

    Args:
        status: the status.
        asked: the request.
        found: the problem.
        fix: the remedy.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, status: HTTPStatus, asked: str, found: str, fix: str) -> None:
        super().__init__(asked, found, fix)
        self.status = status


def describe_problem(request: Request, status: int, title: str, detail: str, fix: str, name: str) -> Response:
    """Return an error as a response: to a browser as a page, else as JSON.

    Args:
        request: what was asked.
        status: of HTTP.
        title: what was asked.
        detail: what was found.
        fix: what to do.
        name: name of the error's class, as in ``outcome.json``.
    """
    is_api = request.url.path.startswith(("/v1/", "/v2/"))
    if "text/html" in request.headers.get("accept", "") and not is_api:
        return render("problem", status, title=sanitize(title), detail=sanitize(detail), fix=sanitize(fix))
    content: dict[str, Any] = {"type": "about:blank", "title": sanitize(title), "status": status}
    content |= {"detail": sanitize(detail), "fix": sanitize(fix), "class": name}
    return JSONResponse(content, status, media_type=MEDIA_TYPE)


def status_of(error: FinetuneError) -> int:
    """Return the status of HTTP for an error."""
    if isinstance(error, RefusedError):
        return int(error.status)
    if isinstance(error, UnknownError):
        return int(HTTPStatus.NOT_FOUND)
    if isinstance(error, ConflictError):
        return int(HTTPStatus.CONFLICT)
    return int(_STATUS.get(error.exit_code, HTTPStatus.INTERNAL_SERVER_ERROR))


def add_handlers(app: FastAPI) -> None:
    """Let every error of a request become a problem; a traceback never leaves the server."""

    @app.exception_handler(FinetuneError)
    async def handle_own(request: Request, error: FinetuneError) -> Response:
        return describe_problem(
            request, status_of(error), error.asked, error.found, error.fix, error.exit_code.name.lower()
        )

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(request: Request, error: RequestValidationError) -> Response:
        faults = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:20]]
        asked, fix = f"{request.method} {request.url.path}", "Correct the request; /docs describes it."
        return describe_problem(request, 422, asked, "; ".join(faults), fix, "usage")

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> Response:
        asked = f"{request.method} {request.url.path}"
        response = describe_problem(
            request, error.status_code, asked, str(error.detail), "See /docs.", "usage"
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(DBAPIError)
    async def handle_database(request: Request, error: DBAPIError) -> Response:
        asked = f"{request.method} {request.url.path}"
        if is_disk_full(error):
            found = "the disk of the server is full"
            return describe_problem(request, 507, asked, found, "Free some space, and try again.", "disk")
        found = "the database does not answer"
        response = describe_problem(request, 503, asked, found, "Try again in a few seconds.", "environment")
        response.headers["Retry-After"] = "2"
        return response

    @app.exception_handler(Exception)
    async def handle_unexpected(request: Request, error: Exception) -> Response:
        asked, fix = f"{request.method} {request.url.path}", "This is a bug in finetune: please report it."
        return describe_problem(request, 500, asked, type(error).__name__, fix, "internal")
