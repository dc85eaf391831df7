"""Errors over HTTP: ``application/problem+json`` (RFC 9457), with the class and the remedy of every error."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from finetune.errors import ExitCode, FinetuneError, sanitize
from finetune.service.jobs import ConflictError, UnknownError

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


def describe_problem(status: int, title: str, detail: str, fix: str, name: str) -> JSONResponse:
    """Return an error as a response.

    Args:
        status: of HTTP.
        title: what was asked.
        detail: what was found.
        fix: what to do.
        name: name of the error's class, as in ``outcome.json``.
    """
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
    async def handle_own(_: Request, error: FinetuneError) -> JSONResponse:
        return describe_problem(
            status_of(error), error.asked, error.found, error.fix, error.exit_code.name.lower()
        )

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:20]]
        asked, fix = f"{request.method} {request.url.path}", "Correct the request; /docs describes it."
        return describe_problem(422, asked, "; ".join(faults), fix, "usage")

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {request.url.path}"
        response = describe_problem(error.status_code, asked, str(error.detail), "See /docs.", "usage")
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(DBAPIError)
    async def handle_database(request: Request, _: DBAPIError) -> JSONResponse:
        asked, found = f"{request.method} {request.url.path}", "the database does not answer"
        response = describe_problem(503, asked, found, "Try again in a few seconds.", "environment")
        response.headers["Retry-After"] = "2"
        return response

    @app.exception_handler(Exception)
    async def handle_unexpected(request: Request, error: Exception) -> JSONResponse:
        asked, fix = f"{request.method} {request.url.path}", "This is a bug in finetune: please report it."
        return describe_problem(500, asked, type(error).__name__, fix, "internal")
