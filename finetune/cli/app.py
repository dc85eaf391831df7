"""The command ``finetune``. No module here imports torch at its top, so that ``finetune --help`` is fast."""

from __future__ import annotations

import os

import typer

from finetune import __version__
from finetune.cli import (
    advise,
    backbones,
    cache,
    check,
    compare,
    evaluate,
    explain,
    export,
    extract,
    hosted,
    predict,
    probe,
    pull,
    recipes,
    report,
    retrieve,
)
from finetune.cli.group import ValueShowingGroup
from finetune.cli.judging import audit
from finetune.cli.measuring import forecast
from finetune.cli.output import print_line, replace_closed_streams
from finetune.cli.processes import leave
from finetune.cli.serving import jobs, serve
from finetune.cli.training import extend, run
from finetune.cli.unknown import RecipeCommand

app = typer.Typer(
    name="finetune",
    cls=ValueShowingGroup,
    help="Fine-tune ImageNet backbones on a folder of images, and trust the number that comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", cls=RecipeCommand)(run.run_command)
app.command("extend", cls=RecipeCommand)(extend.extend_command)
app.command("check", cls=RecipeCommand)(check.check_command)
app.command("audit", cls=RecipeCommand)(audit.audit_command)
app.command("advise", cls=RecipeCommand)(advise.advise_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("report")(report.report_command)
app.command("compare")(compare.compare_command)
app.command("predict")(predict.predict_command)
app.command("extract", cls=RecipeCommand)(extract.extract_command)
app.command("probe", cls=RecipeCommand)(probe.probe_command)
app.command("forecast", cls=RecipeCommand)(forecast.forecast_command)
app.command("similar", cls=RecipeCommand)(retrieve.similar_command)
app.command("map", cls=RecipeCommand)(retrieve.map_command)
app.command("export")(export.export_command)
app.command("push")(export.push_command)
app.command("pull")(pull.pull_command)
app.command("serve")(serve.serve_command)
app.add_typer(explain.app, name="explain")
app.add_typer(backbones.app, name="backbones")
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")
app.add_typer(jobs.app, name="jobs")


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Fine-tune ImageNet backbones on a folder of images, and trust the number that comes out."""
    if version:
        print_line(__version__)
        raise typer.Exit


def share_cores() -> None:
    """Let a compute thread that waits for the others give its core away, unless the user has set how.

    GNU's OpenMP, which torch uses on Linux, lets it spin 300,000 times first, about a millisecond. If other
    programs need the core, the threads that it waits for do not get it either: beside two busy processes,
    training was 1.5 times as fast with 5,000 turns (on two cores), and alone as fast as before. Sleeping at
    once (``OMP_WAIT_POLICY=passive``) is too slow for batches of a few images.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def main() -> None:
    """Run the command line."""
    share_cores()
    replace_closed_streams()
    try:
        hosted.call(app)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
