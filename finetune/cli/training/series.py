"""``finetune run --repeats K`` and ``--folds K``: the same run several times, each with a supervisor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from finetune.cli.output import print_json, relay, say
from finetune.errors import UsageError
from finetune.launch.supervisor import Supervisor

if TYPE_CHECKING:
    from finetune.recipe import Recipe


@dataclass(frozen=True)
class Member:
    """One run of a series.

    Attributes:
        name: name of its folder.
        seed: its seed, if the series varies the seed; else None.
        assignments: recipe keys with their values, in the form of ``--set``.
    """

    name: str
    seed: int | None = None
    assignments: tuple[str, ...] = ()

    def arguments(self, output: Path) -> list[str]:
        """Return the arguments to append to those of the series; the last of a repeated flag counts."""
        arguments = ["--repeats", "1", "--folds", "1", "--json", "--output", str(output / self.name)]
        arguments += ["--seed", str(self.seed)] if self.seed is not None else []
        return arguments + [text for assignment in self.assignments for text in ("--set", assignment)]


@dataclass(frozen=True)
class Series:
    """Runs that differ in one thing.

    Attributes:
        kind: ``repeats`` or ``folds``.
        members: the runs, at least two.
        output: folder that contains their folders.
    """

    kind: str
    members: tuple[Member, ...]
    output: Path


def find_series(repeats: int, folds: int, find_seed: Callable[[], int], output: Path | None) -> Series | None:
    """Return the requested series; None for a single run.

    Args:
        repeats: number of runs with a seed each.
        folds: number of runs with a fold each.
        find_seed: returns the first seed.
        output: folder of the series; None for the default.

    Raises:
        UsageError: both kinds are requested at once.
    """
    if repeats > 1 and folds > 1:
        raise UsageError("--repeats and --folds", "a series has one kind", "Drop one of the two.")
    if repeats <= 1 and folds <= 1:
        return None
    kind = "folds" if folds > 1 else "repeats"
    members = tuple(_seeds(repeats, find_seed()) if kind == "repeats" else _folds(folds))
    from finetune.runs.folder import default_folder

    return Series(kind, members, output or default_folder(kind))


def fix_backbone(series: Series, recipe: Recipe) -> Series:
    """Return the series with one backbone for all runs; if none is named, each would choose its own.

    Raises:
        FinetuneError: no backbone can be chosen.
    """
    if recipe.backbone.name:
        return series
    from finetune.features.network import name_backbone
    from finetune.pipeline.setup import check_asked
    from finetune.system.display import Display

    check_asked(recipe)
    named = name_backbone(recipe, series.output / series.members[0].name, Display())
    assignment = f"backbone.name={named.backbone.name}"
    members = [replace(member, assignments=(*member.assignments, assignment)) for member in series.members]
    return replace(series, members=tuple(members))


def drop_seed(arguments: Sequence[str]) -> list[str]:
    """Return arguments without the seed, since each run of a series has its own."""
    kept: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--seed":
            next(remaining, None)
        elif argument == "--set":
            value = next(remaining, "")
            kept += [] if _sets_seed(value) else [argument, value]
        elif not argument.startswith(("--seed=", "--set=seed=")):
            kept.append(argument)
    return kept


def _sets_seed(assignment: str) -> bool:
    return assignment.partition("=")[0].strip() == "seed" and "=" in assignment


def _seeds(repeats: int, first: int) -> Iterator[Member]:
    return (Member(f"seed-{seed}", seed) for seed in range(first, first + repeats))


def _folds(folds: int) -> Iterator[Member]:
    return (
        Member(f"fold-{fold}", None, (f"data.folds={folds}", f"data.fold={fold}"))
        for fold in range(1, folds + 1)
    )


def run_series(
    series: Series, stall_timeout: float, run_here: Callable[[Member], dict[str, Any]], as_json: bool
) -> None:
    """Run every member; the first one that fails ends the series with its exit code.

    Args:
        series: series to run.
        stall_timeout: seconds without progress after which a run is restarted; 0 runs the members in this
            process, without a supervisor.
        run_here: runs a member in this process, and returns its metrics.
        as_json: whether to print ``series.json``.
    """
    from finetune.pipeline.series import create_series_folder, finish_series
    from finetune.system.display import Display

    create_series_folder(series.output, [member.name for member in series.members])
    runs: dict[str, dict[str, Any]] = {}
    for number, member in enumerate(series.members, 1):
        say(f"{member.name} ({number} of {len(series.members)})", bold=True)
        runs[member.name] = _run_child(series, member, stall_timeout) if stall_timeout else run_here(member)
    result = finish_series(series.output, series.kind, runs, Display())
    if as_json:
        print_json(result)


def _run_child(series: Series, member: Member, stall_timeout: float) -> dict[str, Any]:
    given = drop_seed(sys.argv[1:]) if member.seed is not None else sys.argv[1:]
    code, output = Supervisor([*given, *member.arguments(series.output)], stall_timeout, say).run()
    if code:
        if "--json" in sys.argv:
            relay(output)
        raise typer.Exit(code)
    metrics: dict[str, Any] = json.loads(output)
    return metrics
