"""Render the sections as one self-contained HTML file.

Names of classes and files are untrusted: the template engine escapes everything, and the page's
Content-Security-Policy allows no script and style but its own two, identified by their sha256.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune import __version__
from finetune.plots.svg import Plot, load_style
from finetune.report import sections, tables
from finetune.report.facts import Facts
from finetune.report.further import find_audit, find_budget, find_forecast
from finetune.report.images import Album, ShownMistake
from finetune.report.next_steps import suggest_steps

MOST_FINDINGS = 30
"""Largest number of issues on the page; check.json lists all."""
MOST_PATHS = 4
"""Largest number of paths shown for each issue; check.json lists all."""


@dataclass
class Page:
    """A page and its plots."""

    html: str
    plots: list[Plot] = field(default_factory=list)


def build_page(
    facts: Facts, album: Album, mistakes: Sequence[ShownMistake], command: str | None = None
) -> Page:
    """Return the report of a run or an evaluation.

    Args:
        facts: content of the run's files.
        album: loads the sample images.
        mistakes: the worst mistakes, with their images.
        command: command line that started the run; None if unknown.
    """
    forecast = find_forecast(facts.folder)
    drawn = {
        "metrics": _listed(sections.plot_metrics(facts)),
        "history": sections.plot_history(facts),
        "confusion": _listed(sections.plot_confusion(facts)),
        "answers": _listed(sections.plot_answers(facts)),
        "calibration": sections.plot_calibration(facts),
        "seconds": _listed(sections.plot_seconds(facts)),
        "forecast": _listed(forecast.plot if forecast else None),
    }
    style, script = load_style() + _load_part("page.css"), _load_part("sort.js")
    html = (
        _environment()
        .get_template("report.html")
        .render(
            facts=facts,
            plots=drawn,
            samples=sections.show_samples(facts, album),
            mistakes=mistakes,
            budget=find_budget(facts.folder),
            forecast=forecast,
            audit=find_audit(facts.folder, album),
            left_out=album.left_out,
            steps=suggest_steps(facts),
            has_heat=any(panel.content for mistake in mistakes for panel in mistake.panels),
            most_paths=MOST_PATHS,
            most_findings=MOST_FINDINGS,
            commands=sections.list_commands(facts, command),
            policy=_policy(style, script),
            style=Markup(style),  # noqa: S704 - our own files, no name from outside
            script=Markup(script),  # noqa: S704
            version=__version__,
            title=_title(facts),
            sections=sections,
            tables=tables,
        )
    )
    return Page(html, [plot for plots in drawn.values() for plot in plots])


@cache
def _load_part(name: str) -> str:
    """Return a static file of the page: the style sheet or the script."""
    return resources.files("finetune.report").joinpath("page", name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("finetune.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_code"] = mark_code
    return environment


def mark_code(text: str) -> Markup:
    """Return escaped text in which text between backticks is marked as code."""
    parts = enumerate(text.split("`"))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in parts
    )


def _listed(plot: Plot | None) -> list[Plot]:
    return [] if plot is None else [plot]


def _policy(style: str, script: str) -> str:
    rules = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{_digest(style)}'",
        "script-src": f"'sha256-{_digest(script)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _models(facts: Facts) -> list[str]:
    """Return the names of the models that were evaluated; several are an ensemble."""
    found = facts.metrics.get("models")
    return [PurePath(str(name)).name for name in found] if isinstance(found, list) else []


def _title(facts: Facts) -> dict[str, Any]:
    data = facts.metrics.get("data") or (facts.recipe.data.path if facts.recipe else None)
    return {
        "run": facts.folder.path.absolute().name,
        "backbone": str(facts.metrics.get("backbone") or "") or ", ".join(_models(facts)),
        "strategy": str(facts.metrics.get("strategy") or ""),
        "data": PurePath(str(data)).name if data else "",
    }
