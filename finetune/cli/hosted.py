"""The command line on a managed platform: its settings become flags, and results go where it expects them.

::

    finetune train             as SageMaker calls it; hyperparameters and channels are in files
      -> finetune run --backbone=... --data=... --output=...
    at the end                 model and metrics are copied, or the reason of a failure is written

The first process of a job does this once. The processes that it starts get an ordinary command line.
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

from finetune.cli.group import complete_message
from finetune.cli.output import handled_errors, say
from finetune.errors import ExitCode, UsageError, sanitize
from finetune.launch.platforms import Platform, find_platform, is_main_process
from finetune.runs.files import disk_error, write_chunks
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader

TRANSLATED = "FINETUNE_PLATFORM"
"""Environment variable, set if a parent process has translated the command line already."""
_CHUNK = 1 << 20
"""Bytes that are copied at a time."""
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "null": False}
_LEFT_OUT = ("checkpoints", "model")
"""Folders of a run that are not copied with its metrics."""


def call(app: typer.Typer) -> None:
    """Run the command line; on a platform, translate its settings first and deliver the results."""
    platform = None
    if not os.environ.get(TRANSLATED) and sys.argv[1:2] in (["run"], ["train"]):
        try:
            with handled_errors("--json" in sys.argv):
                platform = find_platform()
        except typer.Exit as end:
            sys.exit(end.exit_code)
    if platform is None:
        app()
    else:
        os.environ[TRANSLATED] = platform.name
        sys.exit(_serve(platform, app))


def _serve(platform: Platform, app: typer.Typer) -> int:
    """Run a job of a platform, and return its exit code."""
    began = time.time()
    platform.clear_failure()
    command: Any = get_command(app)
    run = command.commands["run"]
    try:
        with handled_errors("--json" in sys.argv):
            platform, arguments = translate(platform, sys.argv[2:], run)
            platform.check_writable()
    except typer.Exit as end:
        return end.exit_code
    if is_main_process():
        say(f"{platform.name}: finetune run {shlex.join(arguments)}")
        if platform.warning:
            say(f"warning: {platform.warning}")
    sys.argv[1:] = ["run", *arguments]
    code = _run(app)
    if not is_main_process():
        return code
    folder = RunFolder(Path(_parse(run, arguments)["output"] or platform.output))  # none after a usage error
    code = _deliver(platform, folder, code)
    if code == ExitCode.DONE:
        platform.clear_failure()
    elif code != ExitCode.INTERRUPTED:
        _write_failure(platform, folder, code, began, _usage_error(run, arguments))
    return code


def _run(app: typer.Typer) -> int:
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return int(ExitCode.DONE)


# --- settings of the platform as arguments -------------------------------------------------------


def translate(platform: Platform, given: Sequence[str], run: Any) -> tuple[Platform, list[str]]:
    """Return the platform with its output resolved, and the arguments of ``finetune run``.

    Args:
        platform: platform that started the job.
        given: arguments of the user, which override the platform's settings.
        run: Click command of ``finetune run``.

    Raises:
        UsageError: a setting is invalid, or the processes of several machines are not connected.
    """
    arguments = [*_flags(platform.hyperparameters, run), *given]
    parsed = _parse(run, arguments)
    _check_machines(platform, bool(parsed["output"]))
    if not parsed["output"]:
        platform = platform.resolve_output()
        arguments += ["--output", str(platform.output)]
    has_data = parsed["data"] or any(text.startswith("data.path=") for text in parsed["assignments"])
    if not has_data and (data := platform.find_data()):
        arguments += ["--data", str(data)]
    return platform, arguments


def _flags(hyperparameters: Mapping[str, str], run: Any) -> Iterator[str]:
    """Yield a flag for each hyperparameter with the name of one, and ``--set`` for the others."""
    options = {name: option for option in run.params for name in option.opts if name.startswith("--")}
    for key, value in sorted(hyperparameters.items()):
        name = f"--{key.replace('_', '-')}"
        option = options.get(name)
        if option is None:
            yield from ("--set", f"{key}={value}")
        elif not option.is_flag:
            yield from [f"{name}={value}"] if value != "null" else []
        elif value.lower() not in _BOOLEANS:
            raise UsageError(f"hyperparameter {key}={value}", "it is a switch", "Use true or false.")
        elif _BOOLEANS[value.lower()]:
            yield name


def _parse(run: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the parsed arguments; the command itself reports mistakes among them."""
    parameters: dict[str, Any] = run.make_context("run", list(arguments), resilient_parsing=True).params
    return parameters


def _check_machines(platform: Platform, has_output: bool) -> None:
    """Refuse to train a separate model on each of several machines."""
    count = len(platform.machines)
    if count <= 1:
        return
    asked = f"{platform.name}: {count} machines"
    if "RANK" not in os.environ:
        found = "no launcher has connected their processes, and each would train a model of its own"
        fix = "Use one machine with more GPUs (--gpus), or start torchrun on each (docs/platforms.md)."
        raise UsageError(asked, found, fix)
    if not has_output:
        found = "the run folder must be on a disk that all of them share"
        raise UsageError(asked, found, "Name such a folder with --output.")


# --- results for the platform --------------------------------------------------------------------


def _deliver(platform: Platform, folder: RunFolder, code: int) -> int:
    """Copy model and metrics to the platform's folders; return the exit code, which a failed copy changes."""
    try:
        with handled_errors():
            _copy_results(platform, folder)
            if code == ExitCode.DONE and platform.model is not None:
                _copy_model(folder, platform.model)
    except typer.Exit as end:
        return code or end.exit_code
    return code


def _copy_results(platform: Platform, folder: RunFolder) -> None:
    path = folder.path.absolute()
    if platform.results is not None and not path.is_relative_to(platform.results.absolute()):
        copy_files(path, platform.results, _LEFT_OUT)
    if platform.tensorboard is not None:
        copy_files(folder.tracking / "tensorboard", platform.tensorboard)


def _copy_model(folder: RunFolder, target: Path) -> None:
    if folder.model.is_dir():
        copy_files(folder.model, target)
        say(f"model copied to {target}")
    else:  # each run of a series has one
        say(f"warning: {folder.path} holds no single model, so none is copied to {target}")


def copy_files(source: Path, target: Path, left_out: Sequence[str] = ()) -> None:
    """Copy all files below a folder, except for hidden ones.

    Args:
        source: folder to copy; nothing is copied if it does not exist.
        target: folder to copy to; it and its parents are created.
        left_out: names of folders that are not copied, at any depth.

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
        write_chunks(target / inner, _read_chunks(path))


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _write_failure(platform: Platform, folder: RunFolder, code: int, began: float, usage_error: str) -> None:
    """Write the reason of a failure for the platform, unless the process that failed has written it."""
    if platform.failure is None:
        return
    written = _modified(platform.failure)
    outcome = RunReader(folder, tolerant=True).outcome
    if outcome.get("exit_code") == code and _modified(folder.outcome) >= max(began - 1, written):
        platform.write_failure(str(outcome.get("message")), str(outcome.get("hint")))
    elif not written:
        message = usage_error or f"finetune run ended with exit code {code}"
        platform.write_failure(message, "See the log; docs/errors.md lists the exit codes.")


def _modified(path: Path) -> float:
    """Return the modification time of a file in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _usage_error(run: Any, arguments: Sequence[str]) -> str:
    """Return the error message of the command line's parser; empty if there is none."""
    try:
        run.make_context("run", list(arguments))
    except Exception as error:  # Typer may bundle its own Click, so the class is unknown
        complete_message(error)
        format_message = getattr(error, "format_message", None)
        return sanitize(f"finetune run: {format_message()}") if format_message else ""
    return ""
