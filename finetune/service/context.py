"""What every route needs, made once for a server."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import Request

from finetune.service.predictions.hosts import ModelHosts
from finetune.service.problems import RefusedError
from finetune.service.settings import ServiceSettings
from finetune.service.store.datasets import DatasetStore
from finetune.service.store.folder import StoreFolder
from finetune.service.store.jobs import JobStore
from finetune.service.store.models import ModelStore
from finetune.service.store.uploads import Uploads
from finetune.service.submission import Submission


@dataclass(frozen=True)
class Context:
    """The parts of a running server."""

    settings: ServiceSettings
    folder: StoreFolder
    jobs: JobStore
    datasets: DatasetStore
    uploads: Uploads
    models: ModelStore
    hosts: ModelHosts
    submission: Submission
    closing: threading.Event = field(default_factory=threading.Event)
    """Set once the server was asked to stop; streams then end, which no client would do for them."""

    @classmethod
    def of(cls, request: Request) -> Context:
        """Return the context of the server that a request reached."""
        context: Context = request.app.state.context
        return context

    async def has_listener(self, request: Request) -> bool:
        """Return whether a stream goes on: its client is there, and the server was not asked to stop."""
        return not self.closing.is_set() and not await request.is_disconnected()

    async def read_json(self, request: Request, most_bytes: int) -> Any:
        """Return the JSON value of a body of at most ``most_bytes``.

        Raises:
            RefusedError: it is larger, or no JSON.
        """
        body = await self.read_body(request, most_bytes)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            found = f"it is no JSON ({' '.join(str(error).split())[:100]})"
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body", found, "Send JSON in UTF-8.") from None

    async def read_body(self, request: Request, most_bytes: int) -> bytes:
        """Return a body of at most ``most_bytes``.

        Raises:
            RefusedError: it is larger.
        """
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most_bytes:
                fix = "Send less in one request; images to train on are uploaded as a data set."
                found = f"it has more than {most_bytes:,} bytes"
                raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body", found, fix)
        return bytes(body)
