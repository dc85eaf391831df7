"""``finetune cache``: what is kept between runs so that nothing is computed twice, and how to drop it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import print_table, refusals

if TYPE_CHECKING:
    from finetune.runs.cache_dir import CachedFile

app = typer.Typer(help="List or clear the cache of features and decoded images.", no_args_is_help=True)
COLUMNS = ("kind", "of", "images", "size", "last used")


@app.command("list")
def list_kept(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array to stdout.")] = False,
) -> None:
    """List cached features and decoded images, the least recently used first."""
    from finetune.runs.cache_dir import FeatureCacheDir

    with refusals():
        cache_dir = FeatureCacheDir()
        kept = cache_dir.list()
        if as_json:
            typer.echo(json.dumps([_facts(one) for one in kept], indent=1))
            return
        if kept:
            print_table(COLUMNS, [_cells(one) for one in kept])
        total = sum(one.num_bytes for one in kept)
        typer.echo(f"{len(kept)} files, {_size(total)}, in {cache_dir.folder}", err=True)


@app.command("clear")
def clear() -> None:
    """Remove cached features and images that no run is using; the next run computes them again."""
    from finetune.data.scan_cache import clear_scans
    from finetune.runs.cache_dir import FeatureCacheDir

    with refusals():
        cache_dir = FeatureCacheDir()
        number, num_bytes = map(sum, zip(cache_dir.clear(), clear_scans(), strict=True))
        left = len(cache_dir.list())
        in_use = f"; {left} in use by a run, or another user's, left alone" if left else ""
        typer.echo(
            f"{number} files removed from {cache_dir.folder.parent}, {_size(num_bytes)} freed{in_use}",
            err=True,
        )


def _facts(kept: CachedFile) -> dict[str, Any]:
    return {"path": str(kept.path), "bytes": kept.num_bytes, "last_used": kept.used, **kept.facts}


def _cells(kept: CachedFile) -> list[str]:
    facts = kept.facts
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used))
    known = (facts[key] for key in ("backbone", "cut", "augmentation", "view") if key in facts)
    what = " ".join(str(value) for value in known if isinstance(value, int | str)) or "evaluation views"
    number = str(facts.get("num_images", "?"))
    return [str(facts.get("kind", "?")), what, number, _size(kept.num_bytes), used]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
