"""``finetune pull``: fetch weights now, to work without a network later."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import hand_over, refusals, say
from finetune.system.signals import StopSignal

if TYPE_CHECKING:
    from finetune.features.network import Pulled


def pull_command(
    names: Annotated[list[str], typer.Argument(help="Backbones (see `finetune backbones`).")],
    offline: Annotated[bool, typer.Option("--offline", help="Only list what is on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result to stdout as JSON.")] = False,
) -> None:
    """Fetch the weights of backbones, check them, and show where they are kept.

    Later runs find them without a network. HF_ENDPOINT and FINETUNE_MIRROR name mirrors. If some downloads
    fail, the others are still fetched, and the exit code is that of the first failure.
    """
    with refusals(as_json), StopSignal():
        from finetune.system.display import Display

        display = Display()
        with display.busy("loading torch"):
            from finetune.features.network import pull

        pulled = pull(names, offline, display)
        if as_json:
            hand_over(json.dumps([_facts(one) for one in pulled]) + "\n")
        for one in pulled:
            _say(one, as_json)
        failures = [one.error for one in pulled if one.error is not None]
        if failures:
            raise typer.Exit(int(failures[0].exit_code))


def _facts(one: Pulled) -> dict[str, Any]:
    path = None if one.path is None else str(one.path)
    return {"name": one.name, "path": path, "was_here": one.was_here, "error": one.error and str(one.error)}


def _say(one: Pulled, as_json: bool) -> None:
    if one.error is not None:
        say(f"error: {one.error}")
    elif one.path is not None and not as_json:
        size = one.path.stat().st_size / 1e6
        typer.echo(f"{one.name}  {one.path}  {size:.1f} MB{', here already' if one.was_here else ''}")
