"""``finetune run``: from a folder of images to a finished run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from finetune.cli.output import handled_errors, print_json, relay, say
from finetune.cli.processes import (
    Engine,
    EngineOption,
    GpusOption,
    ProcessesOption,
    joined_processes,
    start_processes,
)
from finetune.cli.training.series import Member, find_series, fix_backbone, run_series
from finetune.errors import UsageError
from finetune.launch.processes import is_in_job, is_started_here
from finetune.launch.supervisor import Supervisor
from finetune.strategies import AUTO, join_names
from finetune.system.heartbeat import Heartbeat, find_parent
from finetune.system.signals import end_with_parent

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.system.distributed import Distributed


def run_command(
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            "-b",
            help="A timm or torchvision name, or a finished run.",
            show_default="the best whose weights are here",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="A folder with train/ and val/, of class folders, a .zip, a CSV, or sample:digits.",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", "-s", help=f"{join_names(AUTO)}.", show_default="top"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A .safetensors or .pth file to start from, or a folder with one.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A shipped recipe (`finetune recipes`) or a YAML file.", metavar="NAME|FILE"),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other key of the recipe; may be repeated.", metavar="SECTION.KEY=VALUE"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs.", show_default="10")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.", show_default="auto")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="sgd or adamw.", show_default="sgd", metavar="NAME")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of trained parameters.", show_default="0.0001")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Base learning rate, which the head uses.", show_default="auto")
    ] = None,
    img_size: Annotated[
        str | None,
        typer.Option(
            help="In pixels: one side, or HEIGHTxWIDTH.", show_default="the weights' own", metavar="SIZE"
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="How other aspect ratios fit: crop, squash or pad.",
            show_default="the weights' own",
            metavar="NAME",
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="rgb (8 bits), or in full depth: grey, or a number.", show_default="auto", metavar="NAME|N"
        ),
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(
            help="Of training images: none, light, medium or heavy.", show_default="light", metavar="NAME"
        ),
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of each class kept for validation if there is no val/.", show_default="0.2"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What the labels of a CSV are: single, multi (several classes) or number. By default as the "
            "CSV says.",
            metavar="KIND",
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Keep images of one group in one split: a column of the CSV, or a pattern in the path.",
            metavar="COLUMN|REGEX",
        ),
    ] = None,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Continue even if copies of an image are in two splits.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Decoding processes.", show_default="auto")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Search for the best backbone, input size and strategy, and make the model, in this time: "
            "90s, 10m or 1h.",
            metavar="TIME",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed; on a CPU, the same seed gives the same bits.", show_default="0"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run folder.", show_default="runs/<time>-<backbone>-<strategy>"),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of seeds to train with; reports mean and standard deviation.")
    ] = 1,
    folds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of folds for cross-validation; each is the validation split once.",
            show_default="1",
        ),
    ] = 1,
    allow_changed: Annotated[
        bool,
        typer.Option(
            "--allow-changed", help="Resume a run even if its recipe, images or weights have changed."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be trained and cached, and the memory, disk and time needed.",
        ),
    ] = False,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    engine: EngineOption = Engine.TORCH,
    stall_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            envvar="FINETUNE_STALL_TIMEOUT",
            help="Seconds without progress after which the run is restarted; 0 starts no supervisor.",
        ),
    ] = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metrics to stdout as one JSON object.")
    ] = False,
) -> None:
    """Fine-tune a backbone on a folder of images.

    Progress goes to stderr. The run folder holds the model, the metrics, every prediction and the recipe
    that repeats the run. The same command with the same --output resumes an interrupted run.
    """
    flags = {
        "backbone": backbone,
        "weights": weights,
        "offline": offline or None,
        "data": data,
        "val_fraction": val_fraction,
        "target": target,
        "group_by": group_by,
        "allow_leaks": allow_leaks or None,
        "workers": workers,
        "img_size": img_size,
        "resize": resize,
        "channels": channels,
        "augmentation": augmentation,
        "strategy": strategy,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "lr": lr,
        "budget": budget,
        "seed": seed,
        "device": "cuda" if gpus else device,
    }
    with handled_errors(as_json):
        settings_given = assignments or []
        if budget and (dry_run or repeats > 1 or folds > 1):
            flag = "--dry-run" if dry_run else "--repeats" if repeats > 1 else "--folds"
            raise UsageError(f"--budget {flag}", "a budget is for a single run", "Drop one of the two.")
        if dry_run:
            others = {
                "--repeats": repeats > 1,
                "--folds": folds > 1,
                "--gpus": gpus,
                "--processes": processes,
            }
            _dry_run(_read(recipe, flags, settings_given), output, others, as_json)
            return
        if is_in_job() and (repeats > 1 or folds > 1):
            found = "a launcher has started the processes of a single run"
            raise UsageError("--repeats or --folds", found, "Start without the launcher, with --gpus N.")
        if (gpus or processes) and (repeats > 1 or folds > 1) and not stall_timeout:
            found = "without a supervisor, the runs of a series have one process each"
            raise UsageError("--stall-timeout 0", found, "Leave it out.")
        if series := find_series(repeats, folds, lambda: _read(recipe, flags, settings_given).seed, output):

            def run_here(member: Member) -> dict[str, Any]:
                settings = _read(recipe, flags, [*settings_given, *member.assignments])
                if member.seed is not None:
                    settings = settings.model_copy(update={"seed": member.seed})
                return _run(settings, series.output / member.name, Heartbeat(None), allow_changed)

            fixed = fix_backbone(series, _read(recipe, flags, settings_given))
            run_series(fixed, stall_timeout, run_here, as_json)
            return
        parent = find_parent()
        if parent is None and stall_timeout > 0 and not is_in_job() and not is_started_here():
            _supervise(stall_timeout)
        if parent is not None:
            end_with_parent(parent[1])
        settings = _read(recipe, flags, settings_given)
        start_processes(processes, gpus, device or "auto", engine)
        with joined_processes(settings.device, stall_timeout, as_json) as distributed:
            heartbeat = Heartbeat(parent[0] if parent is not None and distributed.is_main else None)
            metrics = _run(settings, output, heartbeat, allow_changed, distributed)
            if as_json and distributed.is_main:
                print_json(metrics)


def _dry_run(recipe: Recipe, output: Path | None, others: dict[str, Any], as_json: bool) -> None:
    if flag := next((flag for flag, is_given in others.items() if is_given), None):
        raise UsageError(f"--dry-run {flag}", "it shows one run in one process", "Drop one of the two.")
    from finetune import api

    facts = api.dry_run(recipe=recipe, output=output)
    if as_json:
        print_json(facts)


def _supervise(stall_timeout: float) -> NoReturn:
    """Run the command in a supervised child process, and exit with its exit code."""
    code, output = Supervisor(sys.argv[1:], stall_timeout, say).run()
    relay(output)
    raise typer.Exit(code)


def _read(recipe: str | None, flags: dict[str, Any], assignments: list[str]) -> Recipe:
    from finetune.recipe import parse_assignments
    from finetune.recipe.flags import build_recipe

    return build_recipe(recipe, flags, parse_assignments(assignments))


def _run(
    recipe: Recipe,
    output: Path | None,
    heartbeat: Heartbeat,
    allow_changed: bool,
    distributed: Distributed | None = None,
) -> dict[str, Any]:
    from finetune import api
    from finetune.system.display import Display, SilentDisplay

    display = Display(heartbeat=heartbeat) if distributed is None or distributed.is_main else SilentDisplay()
    finished = api.run(
        recipe=recipe, output=output, allow_changed=allow_changed, display=display, distributed=distributed
    )
    return {"run": str(finished.folder.path), **finished.metrics}
