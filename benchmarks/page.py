"""Puts tables into the pages of docs: between ``<!-- measured: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Question
from benchmarks.results import Results
from benchmarks.text import table


def fill_page(questions: Sequence[Question], results: Results, path: Path) -> None:
    """Replace the tables of these questions in a page, that of the machine, and the plot beside the page.

    Raises:
        ValueError: the page has no place for a question.
    """
    page = path.read_text("utf-8")
    parts = {question.name: [*write_section(question, results)] for question in questions}
    for name, lines in (parts | {"machine": describe_machines(results.machines)}).items():
        place = re.compile(rf"(?<=<!-- measured: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        if name in parts and not place.search(page):
            raise ValueError(f"{path} has no line <!-- measured: {name} -->")
        content = "\n".join(["", *lines, "", ""])
        page = place.sub(lambda _, content=content: content, page, count=1)  # type: ignore[misc]
    path.write_text(page, encoding="utf-8")
    for question in questions:
        if question.draw:
            question.draw(results, path.with_suffix(".png"))


def write_section(question: Question, results: Results) -> Iterator[str]:
    """Yield the lines of one question, and what failed."""
    yield from question.lines(results)
    failed = [one for one in results.of_cases(f"{question.name}-") if one.failed]
    rows = [(one.case, one.tool, f"{one.repeat}", one.failed) for one in failed]
    if rows:
        cells = [[cell.replace("\n", " ").replace("|", "/") for cell in row] for row in rows]
        yield from ["", *table(("failed", "tool", "turn", "last words"), cells)]


def describe_machines(machines: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the results were measured on, and when; a file holds one machine's only."""
    last = machines[-1]
    revisions = dict.fromkeys(machine["revision"] for machine in machines)
    names = ("python", "torch", "torchvision", "timm", "fastai", "pillow", "numpy")
    rows = [
        ("processor", f"{last['processor']}, {last['cores']} cores, {last['memory_gb']} GB of memory"),
        ("GPU", last["gpu"] or "none"),
        ("system", last["system"]),
        ("versions", ", ".join(f"{name} {last[name]}" for name in names if name in last)),
        ("finetune", f"{last['finetune']}, revision {', '.join(revisions)}"),
        ("every tool", f"{last['threads']} threads, {last['workers']} decoding processes"),
        ("date", " to ".join(dict.fromkeys((machines[0]["when"], last["when"])))),
    ]
    return table(("", ""), rows)
