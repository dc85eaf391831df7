"""``report.html`` of a run or an evaluation, made only from its files and the images that they list."""

from __future__ import annotations

import traceback
from pathlib import Path

from finetune.data.channels.bands import find_display_range
from finetune.data.root import find_root
from finetune.data.tables.config import TableConfig
from finetune.errors import DiskError, FinetuneError, UsageError
from finetune.exporters.folder import load_exported, staged
from finetune.report.facts import Facts, load_facts
from finetune.report.images import MOST_MISTAKES, Album, Explainer, ShownMistake, show_mistakes
from finetune.report.render import Page, build_page
from finetune.runs.files import write_text
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from pretrained.catalog import Card, find_card


def write_run_report(folder: RunFolder, display: Display, *, command: str | None = None) -> None:
    """Write ``report.html`` and ``plots/``, replacing older ones.

    Sections without data are left out; a note replaces a missing image. Without a
    model there are no heat maps.

    Args:
        folder: a run or an evaluation.
        display: shows progress.
        command: command line that started the run, shown on the page.

    Raises:
        UsageError: the folder holds neither metrics nor predictions.
        DiskError: something cannot be written.
    """
    facts = load_facts(folder)
    if not facts.metrics and not facts.predictions:
        fix = "Give the folder of a finished run or of an evaluation."
        raise UsageError(f"a report of {folder.path}", "it has neither metrics.json nor predictions.csv", fix)
    with display.busy("making the report"):
        card = _find_card(facts, display)
        value_range = find_display_range(card.preprocessing) if card is not None else None
        album = Album(_find_root(facts), value_range=value_range)
        explainer = _open_explainer(facts, card, display)
    with display.track("making the report", min(len(facts.mistakes), MOST_MISTAKES) + 1) as advance:
        mistakes = show_mistakes(facts, album, explainer, lambda: advance(1, "heat maps"))
        page = build_page(facts, album, mistakes, command)
        advance(1, "")
    _write(folder, page, mistakes)


def add_report(folder: RunFolder, display: Display, command: str | None = None) -> None:
    """Write the report of finished work; errors other than DiskError become warnings.

    Args:
        folder: as for :func:`write_run_report`.
        display: shows progress.
        command: command line that started the run.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        write_run_report(folder, display, command=command)
    except DiskError:
        raise
    except Exception as error:
        display.note(traceback.format_exc())
        display.warn(
            f"the report could not be made ({type(error).__name__}: {error}); "
            "make it again with `finetune report`"
        )


def _find_root(facts: Facts) -> Path | None:
    """Return the folder that image paths are relative to; None if it is unknown or missing."""
    named = facts.metrics.get("data") or (facts.recipe.data.path if facts.recipe else None)
    try:
        is_own = facts.recipe is not None and named == facts.recipe.data.path
        table = TableConfig.of(facts.recipe) if is_own and facts.recipe else TableConfig()
        return find_root(Path(named), table) if isinstance(named, str) else None
    except FinetuneError:
        return None


def _find_card(facts: Facts, display: Display) -> Card | None:
    """Return the card of the folder's or the evaluated model; None without a model."""
    named = facts.metrics.get("model")
    model = facts.folder.model
    if not model.is_dir() and isinstance(named, str):
        model = Path(named)
    if not model.is_dir():
        return None
    try:
        return find_card(str(model))
    except FinetuneError as error:
        display.warn(f"the report has no heat maps: {error.message}")
        return None


def _open_explainer(facts: Facts, card: Card | None, display: Display) -> Explainer | None:
    """Return the explainer of a model; None without mistakes, or for a model that takes arrays."""
    if not facts.mistakes or card is None or card.preprocessing.kind == "array":
        return None
    try:
        return Explainer(load_exported(Path(card.location)), card)
    except FinetuneError as error:
        display.warn(f"the report has no heat maps: {error.message}")
    except (OSError, RuntimeError) as error:  # no weights, or others than the network's
        display.warn(f"the report has no heat maps: {' '.join(str(error).split())[:200]}")
    return None


def _write(folder: RunFolder, page: Page, mistakes: list[ShownMistake]) -> None:
    """Write the plots first, so that the page appears only after its plots."""
    with staged(folder.plots) as plots:
        for plot in page.plots:
            (plots / f"{plot.name}.svg").write_text(plot.file, encoding="utf-8")
        for panel in (panel for mistake in mistakes for panel in mistake.panels):
            if panel.content:
                (plots / panel.name).write_bytes(panel.content)
    write_text(folder.report, page.html)
