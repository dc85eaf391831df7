"""Who may make a request: tokens, names of the host, pages of other sites, and how many requests.

It is one layer below all routes, so that no route can forget it.
"""

from __future__ import annotations

import hmac
import time
from collections import defaultdict, deque
from hashlib import sha256
from http import HTTPStatus
from threading import Lock
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.service.html import render
from finetune.service.problems import describe_problem
from finetune.service.settings import ServiceSettings

OPEN = frozenset(
    {"/v1/healthz", "/v1/readyz", "/v2/health/live", "/v2/health/ready"}
    | {"/login", "/static/page.css", "/static/page.js"}
)
"""Paths without a token: they say only that the server lives, or take the token."""
COOKIE = "finetune_token"
"""Cookie of the page that holds the token."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_MOST_CLIENTS = 10_000


class Access:
    """Checks a request before any route sees it.

    Args:
        app: the routes.
        settings: token, host and limits.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self._app, self._settings = app, settings
        self._recent: defaultdict[str, deque[float]] = defaultdict(deque)
        self._lock = Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; pass on any other."""
        if scope["type"] != "http":  # the start and the end of the server
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._find_refusal(request)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, found, fix = refusal
        response = describe_problem(
            request, status, f"{request.method} {request.url.path}", found, fix, "usage"
        )
        if status == HTTPStatus.UNAUTHORIZED:
            if "text/html" in request.headers.get("accept", ""):
                response = render("login", status, wrong=False)
            response.headers["WWW-Authenticate"] = "Bearer"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            response.headers["Retry-After"] = "60"
        await response(scope, receive, send)

    def _find_refusal(self, request: Request) -> tuple[HTTPStatus, str, str] | None:
        if not self._is_known_host(request):
            fix = "Take the address that the server was started with."
            return HTTPStatus.MISDIRECTED_REQUEST, "this server has another name", fix
        if not self._takes_another(request):  # before its token is known, so that nobody can guess on
            limit = self._settings.limits.requests_per_minute
            return HTTPStatus.TOO_MANY_REQUESTS, f"more than {limit} requests in a minute", "Wait a minute."
        if not self._has_token(request):
            fix = "Send the header `Authorization: Bearer TOKEN`."
            return HTTPStatus.UNAUTHORIZED, "the token is missing or wrong", fix
        if request.method not in _SAFE and self._is_of_another_site(request):
            return HTTPStatus.FORBIDDEN, "a page of another site made this request", "Use the service's page."
        return None

    def _is_known_host(self, request: Request) -> bool:
        """Whether the request names this machine: else a page could reach it by a name of its own."""
        if not self._settings.is_local or self._settings.token:
            return True
        return urlsplit(f"//{request.headers.get('host', '')}").hostname in _LOCAL_NAMES

    def _has_token(self, request: Request) -> bool:
        expected = self._settings.token
        if not expected or request.url.path in OPEN:
            return True
        return is_token(_read_token(request), expected)

    def _is_of_another_site(self, request: Request) -> bool:
        origin = request.headers.get("origin")
        if origin is None:
            return request.headers.get("sec-fetch-site") in {"cross-site", "same-site"}
        return urlsplit(origin).netloc != request.headers.get("host", "")

    def _takes_another(self, request: Request) -> bool:
        """Count a request of an address; return whether it had fewer than the limit in the last minute."""
        client = request.client.host if request.client else "local"
        now = time.monotonic()
        with self._lock:
            if len(self._recent) > _MOST_CLIENTS:
                self._recent.clear()
            recent = self._recent[client]
            while recent and now - recent[0] > 60:
                recent.popleft()
            if len(recent) >= self._settings.limits.requests_per_minute:
                return False
            recent.append(now)
            return True


def _read_token(request: Request) -> str:
    """Return the token of a request, from its header or from the cookie of the page; "" for none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")


def is_token(given: str, expected: str) -> bool:
    """Whether two tokens are the same, in a time that tells nothing of them."""
    return hmac.compare_digest(_digest(given), _digest(expected))


def _digest(text: str) -> bytes:
    """Return a digest of fixed length: comparing texts of different lengths takes different times."""
    return sha256(text.encode()).digest()
