"""``finetune report``: write the report of a run or an evaluation again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json


def report_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, or of an evaluation.")],
    as_json: JsonOption = False,
) -> None:
    """Write report.html and plots/ of a run again, from the files in its folder."""
    with handled_errors(as_json):
        from finetune.system.display import Display

        display = Display()
        with display.busy("loading torch"):
            from finetune.report.write_report import write_run_report
            from finetune.runs.folder import RunFolder
        folder = RunFolder(run)
        write_run_report(folder, display)
        display.say(f"report {folder.report}")
        if as_json:
            print_json({"report": str(folder.report), "plots": str(folder.plots)})
