"""The command line of a managed platform: its settings become flags, and results go where it looks for them.

::

    finetune train             what SageMaker says; hyperparameters and channels lie in files
      -> finetune run --backbone=... --data=... --output=...
    the end                    model and metrics are copied, or the reason of a failure is written

The first process of a job does this once. Those that it starts get plain words.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from finetune.cli.output import refusals, say
from finetune.errors import ExitCode, UsageError, sanitize
from finetune.launch.platforms import Platform, find_platform, is_main_process
from finetune.runs.files import disk_error, write_chunks
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader

TOLD = "FINETUNE_PLATFORM"
"""Environment variable: a process above has done all this already."""
_PIECE = 1 << 20
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "null": False}
_LEFT_OUT = ("checkpoints", "model")
"""Of a run folder, where its metrics are copied."""


def call(app: typer.Typer) -> None:
    """Run the command line, as the platform wants it that started this process, if one did."""
    platform = None
    if not os.environ.get(TOLD) and sys.argv[1:2] in (["run"], ["train"]):
        try:
            with refusals("--json" in sys.argv):
                platform = find_platform()
        except typer.Exit as end:
            sys.exit(end.exit_code)
    if platform is None:
        app()
    else:
        os.environ[TOLD] = platform.name
        sys.exit(_serve(platform, app))


def _serve(platform: Platform, app: typer.Typer) -> int:
    """Run a job of a platform, and return its exit code."""
    began = time.time()
    platform.clear_failure()
    command: Any = get_command(app)
    run = command.commands["run"]
    try:
        with refusals("--json" in sys.argv):
            platform, words = translate(platform, sys.argv[2:], run)
            platform.check_writable()
    except typer.Exit as end:
        return end.exit_code
    if is_main_process():
        say(sanitize(f"{platform.name}: finetune run {shlex.join(words)}"))
        if platform.warning:
            say(f"warning: {platform.warning}")
    sys.argv[1:] = ["run", *words]
    code = _run(app)
    if not is_main_process():
        return code
    folder = RunFolder(Path(_parse(run, words)["output"] or platform.output))  # none before a mistake
    code = _deliver(platform, folder, code)
    if code == ExitCode.DONE:
        platform.clear_failure()
    elif code != ExitCode.INTERRUPTED:
        _explain(platform, folder, code, began, _complaint(run, words))
    return code


def _run(app: typer.Typer) -> int:
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return int(ExitCode.DONE)


# --- before --------------------------------------------------------------------------------------


def translate(platform: Platform, given: Sequence[str], run: Any) -> tuple[Platform, list[str]]:
    """Return the words of ``finetune run`` that a platform means, and what it wants of that run.

    Args:
        platform: that started the job.
        given: the user's own words, which count more than the platform's.
        run: the command, as Click has it.

    Raises:
        UsageError: settings that cannot be meant, or machines that do not know of each other.
    """
    words = [*_flags(platform.hyperparameters, run), *given]
    asked = _parse(run, words)
    _check_machines(platform, bool(asked["output"]))
    if not asked["output"]:
        platform = platform.resolve_output()
        words += ["--output", str(platform.output)]
    has_data = asked["data"] or any(word.startswith("data.path=") for word in asked["assignments"])
    if not has_data and (data := platform.find_data()):
        words += ["--data", str(data)]
    return platform, words


def _flags(hyperparameters: Mapping[str, str], run: Any) -> Iterator[str]:
    """Yield a flag for each setting that is called like one; the others are keys of the recipe."""
    options = {name: option for option in run.params for name in option.opts if name.startswith("--")}
    for key, value in sorted(hyperparameters.items()):
        name = f"--{key.replace('_', '-')}"
        option = options.get(name)
        if option is None:
            yield from ("--set", f"{key}={value}")
        elif not option.is_flag:
            yield from [f"{name}={value}"] if value != "null" else []
        elif value.lower() not in _TRUTH:
            raise UsageError(
                f"hyperparameter {key}={value}", "it is switched on or off", "Take true or false."
            )
        elif _TRUTH[value.lower()]:
            yield name


def _parse(run: Any, words: Sequence[str]) -> dict[str, Any]:
    """Return what the words ask for; mistakes among them are for the command itself to tell."""
    parameters: dict[str, Any] = run.make_context("run", list(words), resilient_parsing=True).params
    return parameters


def _check_machines(platform: Platform, has_output: bool) -> None:
    """Refuse to train a model on each machine where one is meant."""
    count = len(platform.machines)
    if count <= 1:
        return
    asked = f"{platform.name}: {count} machines"
    if "RANK" not in os.environ:
        found = "nothing has told their processes of each other, and each would train a model of its own"
        fix = "Take one machine with more GPUs (--gpus), or start torchrun on each (docs/platforms.md)."
        raise UsageError(asked, found, fix)
    if not has_output:
        found = "the run folder has to lie where all of them see it"
        raise UsageError(asked, found, "Name such a place with --output.")


# --- after ---------------------------------------------------------------------------------------


def _deliver(platform: Platform, folder: RunFolder, code: int) -> int:
    """Copy what the platform looks for; return the exit code, which a model that is not there changes."""
    try:
        with refusals():
            _copy_results(platform, folder)
            if code == ExitCode.DONE and platform.model is not None:
                _copy_model(folder, platform.model)
    except typer.Exit as end:
        return code or end.exit_code
    return code


def _copy_results(platform: Platform, folder: RunFolder) -> None:
    place = folder.path.absolute()
    if platform.results is not None and not place.is_relative_to(platform.results.absolute()):
        copy_files(place, platform.results, _LEFT_OUT)
    if platform.tensorboard is not None:
        copy_files(folder.tracking / "tensorboard", platform.tensorboard)


def _copy_model(folder: RunFolder, target: Path) -> None:
    if folder.model.is_dir():
        copy_files(folder.model, target)
        say(f"model copied to {target}")
    else:  # each run of a series has one
        say(f"warning: {folder.path} holds no single model, so none is copied to {target}")


def copy_files(source: Path, target: Path, left_out: Sequence[str] = ()) -> None:
    """Copy all files below a folder but hidden ones; there may be no such folder.

    Args:
        source: may be missing.
        target: is created, with all folders above it.
        left_out: names of folders that stay behind, wherever they are.

    Raises:
        DiskError: the target cannot be written.
    """
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") or part in left_out for part in inner.parts):
            continue
        try:
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(target, error) from None
        write_chunks(target / inner, _pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _explain(platform: Platform, folder: RunFolder, code: int, began: float, complaint: str) -> None:
    """Write the reason of a failure, unless the process that failed has written it."""
    if platform.failure is None:
        return
    written = _changed(platform.failure)
    outcome = RunReader(folder, tolerant=True).outcome
    if outcome.get("exit_code") == code and _changed(folder.outcome) >= max(began - 1, written):
        platform.write_failure(str(outcome.get("message")), str(outcome.get("hint")))
    elif not written:
        said = complaint or f"finetune run ended with exit code {code}"
        platform.write_failure(said, "The log says more; docs/errors.md says what each exit code means.")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _complaint(run: Any, words: Sequence[str]) -> str:
    """Return what the parser of the command line objects to."""
    try:
        run.make_context("run", list(words))
    except Exception as error:  # Typer brings a Click of its own
        tell = getattr(error, "format_message", None)
        return sanitize(f"finetune run: {tell()}") if tell else ""
    return ""
