"""``finetune pull``: download weights, to work without a network later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import handled_errors, print_json, print_line, say

if TYPE_CHECKING:
    from finetune.features.network import Pulled


def pull_command(
    names: Annotated[list[str], typer.Argument(help="Backbones (see `finetune backbones`).")],
    offline: Annotated[bool, typer.Option("--offline", help="Only list what is on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result to stdout as JSON.")] = False,
) -> None:
    """Download the weights of backbones, verify them, and show where they are kept.

    Later runs find them without a network. HF_ENDPOINT and FINETUNE_MIRROR name mirrors. If some downloads
    fail, the others continue, and the exit code is that of the first failure.
    """
    with handled_errors(as_json):
        from finetune.system.display import Display

        display = Display()
        with display.busy("loading torch"):
            from finetune.features.network import pull

        pulled = pull(names, offline, display)
        if as_json:
            print_json([_facts(weights) for weights in pulled])
        for weights in pulled:
            _report(weights, as_json)
        failures = [weights.error for weights in pulled if weights.error is not None]
        if failures:
            raise typer.Exit(int(failures[0].exit_code))


def _facts(weights: Pulled) -> dict[str, Any]:
    return {
        "name": weights.name,
        "path": None if weights.path is None else str(weights.path),
        "was_here": weights.was_here,
        "error": weights.error and str(weights.error),
    }


def _report(weights: Pulled, as_json: bool) -> None:
    if weights.error is not None:
        say(f"error: {weights.error}")
    elif weights.path is not None and not as_json:
        size = weights.path.stat().st_size / 1e6
        cached = ", here already" if weights.was_here else ""
        print_line(f"{weights.name}  {weights.path}  {size:.1f} MB{cached}")
