"""The page: HTML of the server for people, one address for each kind of resource."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from finetune.plots.curves import draw_curves
from finetune.plots.svg import load_style
from finetune.runs.reader import RunReader
from finetune.service.access import COOKIE, is_token
from finetune.service.compare import compare_jobs
from finetune.service.context import Context
from finetune.service.html import render
from finetune.service.store.jobs import UnknownError
from finetune.service.store.states import State
from finetune.strategies import AUTO, STRATEGIES
from finetune.targets import METRIC_NAMES, PLAIN_METRICS, SCORES

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
_LOG_BYTES = 20_000
_SHOWN_FINDINGS = 30
_CURVES = ("loss", "score")
_SHOWN_METRICS = (*SCORES, "f1_macro", "mae")


@router.get("/")
def home(request: Request) -> Response:
    """Show data sets, jobs and models."""
    context = Context.of(request)
    return render(
        "home",
        datasets=context.datasets.list_all(20),
        jobs=context.jobs.list_jobs(limit=50),
        models=context.models.list_all(),
    )


@router.get("/datasets/{dataset}")
def dataset(request: Request, dataset: str) -> Response:
    """Show what the check of a data set found, and a form that starts a job."""
    context = Context.of(request)
    found = context.datasets.get(dataset)
    folder = context.folder.job(found.check.id).run
    check = RunReader(folder, tolerant=True).check
    return render(
        "dataset",
        dataset=found,
        summary=check.get("summary"),
        findings=list(check.get("findings", ()))[:_SHOWN_FINDINGS],
        has_sheet=folder.check_sheet.is_file(),
        strategies=[AUTO, *STRATEGIES],
    )


@router.get("/jobs/{job}")
def job(request: Request, job: str) -> Response:
    """Show a job: its progress, its curves, its report, its log."""
    context = Context.of(request)
    found = context.jobs.get(job)
    folder = context.folder.job(job)
    reader = RunReader(folder.run, tolerant=True)
    return render(
        "job",
        job=found,
        metrics=_show_metrics(reader.metrics) if found.state == State.SUCCEEDED else (),
        curves=_CURVES,
        has_history=folder.run.history.is_file(),
        has_report=folder.run.report.is_file(),
        log=_read_end(folder.log(max(found.attempt, 1))),
    )


def _show_metrics(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return title, value and interval of the most important metrics, whatever the labels are."""
    shown, intervals = [], metrics.get("intervals") or {}
    for name in _SHOWN_METRICS:
        if not isinstance(metrics.get(name), int | float):
            continue
        scale, form = (1.0, "{:.3f}") if name in PLAIN_METRICS else (100.0, "{:.1f} %")
        ends = [form.format(scale * end) for end in intervals.get(name) or ()]
        shown.append((METRIC_NAMES[name], form.format(scale * metrics[name]), " to ".join(ends)))
    if number := metrics.get("num_samples"):
        shown.append(("images", str(number), ""))
    return shown


def _read_end(path: Any) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            content: bytes = file.read(_LOG_BYTES)
    except OSError:
        return ""
    return content.decode(errors="replace")


@router.get("/jobs/{job}/curves/{name}.svg")
def curves(request: Request, job: str, name: str) -> Response:
    """Draw a value of a job by epoch."""
    context = Context.of(request)
    context.jobs.get(job)
    rows = RunReader(context.folder.job(job).run, tolerant=True).history
    if name not in _CURVES or not rows:
        raise UnknownError(f"job {job[:64]}", "it has no such curves", "Wait for its first epoch.")
    metric = next((score for score in SCORES if f"eval_{score}" in rows[0]), SCORES[0])
    metric, heading = ("loss", "loss") if name == "loss" else (metric, METRIC_NAMES[metric])
    columns = {"validation": f"eval_{metric}"} | ({"training": "train_loss"} if name == "loss" else {})
    scale, form = (1.0, "{:.3g}") if metric in PLAIN_METRICS else (100.0, "{:.4g} %")
    lines = {
        label: [(row["epoch"], row[column] * scale) for row in rows] for label, column in columns.items()
    }
    plot = draw_curves(metric, heading, lines, form.format)
    headers = {"Cache-Control": "no-store", "Content-Security-Policy": "style-src 'unsafe-inline'"}
    return Response(plot.file, media_type="image/svg+xml", headers=headers)


@router.get("/models/{name}")
def model(request: Request, name: str) -> Response:
    """Show a model, and a place to drop a picture."""
    return render("model", model=Context.of(request).models.get(name), base=str(request.base_url))


@router.get("/compare")
def compare(request: Request, job: Annotated[list[str] | None, Query(max_length=32)] = None) -> Response:
    """Compare the metrics of two jobs."""
    return render("compare", **compare_jobs(Context.of(request), job or []))


@router.get("/docs")
def docs(request: Request) -> Response:
    """Show every request of the API; the usual pages load scripts from other servers."""
    return render("docs", paths=request.app.openapi()["paths"])


# --- who is there, and what the page is made of ----------------------------------------------------


@router.post("/login")
def login(request: Request, token: Annotated[str, Form(max_length=500)]) -> Response:
    """Keep the token in a cookie that no script reads and no other site sends."""
    if not is_token(token, Context.of(request).settings.token):
        return render("login", HTTPStatus.UNAUTHORIZED, wrong=True)
    answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
    is_secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=is_secure, max_age=7 * 86400)
    return answer


@router.get("/static/{name}")
def static(name: str) -> Response:
    """Return the style sheet or the script."""
    kinds = {"page.css": "text/css", "page.js": "text/javascript"}
    if name not in kinds:
        raise UnknownError(f"file {name[:64]}", "the page has no such part", "See /.")
    text = resources.files("finetune.service").joinpath("page", name).read_text(encoding="utf-8")
    text = load_style() + text if name == "page.css" else text
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(text, media_type=f"{kinds[name]}; charset=utf-8", headers=headers)
