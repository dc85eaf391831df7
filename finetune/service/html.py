"""HTML of the server: templates that escape everything, under a policy that allows no script but ours."""

from __future__ import annotations

import time
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune import __version__

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@cache
def _environment() -> Environment:
    pages = Environment(
        loader=PackageLoader("finetune.service", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["size"], pages.filters["number"] = _size, _number
    pages.filters["time"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    return pages


def render(name: str, status: int = HTTPStatus.OK, **facts: Any) -> HTMLResponse:
    """Return a page; everything in it is escaped, and it runs no script but its own."""
    html = _environment().get_template(f"{name}.html").render(version=__version__, **facts)
    headers = {
        "Content-Security-Policy": POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(html, status, headers)
