"""``finetune cache``: list and clear the cached features and decoded images."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import handled_errors, print_json, print_table, say
from finetune.errors import sanitize

if TYPE_CHECKING:
    from finetune.runs.cache_dir import CachedFile

app = typer.Typer(help="List or clear the cache of features and decoded images.", no_args_is_help=True)
COLUMNS = ("kind", "of", "images", "size", "last used")


@app.command("list")
def list_files(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array to stdout.")] = False,
) -> None:
    """List cached features and decoded images, the least recently used first."""
    from finetune.runs.cache_dir import FeatureCacheDir

    with handled_errors():
        cache_dir = FeatureCacheDir()
        files = cache_dir.list()
        if as_json:
            print_json([_facts(file) for file in files], indent=1)
            return
        if files:
            print_table(COLUMNS, [_cells(file) for file in files])
        total = sum(file.num_bytes for file in files)
        say(f"{len(files)} {'file' if len(files) == 1 else 'files'}, {_size(total)}, in {cache_dir.folder}")


@app.command("clear")
def clear() -> None:
    """Remove cached features and images that no run uses; the next run computes them again."""
    from finetune.data.scan_cache import clear_scans
    from finetune.runs.cache_dir import FeatureCacheDir

    with handled_errors():
        cache_dir = FeatureCacheDir()
        number, num_bytes = map(sum, zip(cache_dir.clear(), clear_scans(), strict=True))
        left = len(cache_dir.list())
        in_use = f"; {left} in use by a run or owned by another user, kept" if left else ""
        say(
            f"{number} {'file' if number == 1 else 'files'} removed from {cache_dir.folder.parent}, "
            f"{_size(num_bytes)} freed{in_use}"
        )


def _facts(file: CachedFile) -> dict[str, Any]:
    return {"path": str(file.path), "bytes": file.num_bytes, "last_used": file.used, **file.facts}


def _cells(file: CachedFile) -> list[str]:
    facts = file.facts
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
    known = (facts[key] for key in ("backbone", "cut", "augmentation", "view") if key in facts)
    what = " ".join(str(value) for value in known if isinstance(value, int | str)) or "evaluation views"
    texts = str(facts.get("kind", "?")), what, str(facts.get("num_images", "?"))
    return [*map(sanitize, texts), _size(file.num_bytes), used]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
