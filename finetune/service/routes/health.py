"""Whether the server lives, whether it can work, and its metrics for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from finetune.service.context import Context
from finetune.service.store.states import State

router = APIRouter(prefix="/v1", tags=["health"])


@router.get("/healthz", summary="Whether the server answers")
def healthz() -> dict[str, str]:
    """Return 200 as long as the process answers."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether the server can take jobs")
def readyz(request: Request, response: Response) -> dict[str, Any]:
    """Return 200 if the database answers and jobs are being started, else 503."""
    context = Context.of(request)
    context.jobs.list_jobs(limit=1)
    is_ready = request.app.state.dispatcher.is_alive
    response.status_code = 200 if is_ready else 503
    return {"status": "ready" if is_ready else "jobs are not being started"}


@router.get("/metrics", summary="Metrics for Prometheus", response_model=None)
def metrics(request: Request) -> Response:
    """Return the number of jobs in each state, in Prometheus' text format."""
    counts = Context.of(request).jobs.count_by_state()
    lines = ["# HELP finetune_jobs Jobs by state.", "# TYPE finetune_jobs gauge"]
    lines += [f'finetune_jobs{{state="{state}"}} {counts.get(state, 0)}' for state in State]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")
