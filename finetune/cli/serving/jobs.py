"""``finetune jobs``: submit and watch jobs of a server, or of a store of this machine."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json, print_line, print_table, print_text, say
from finetune.cli.unknown import RecipeCommand
from finetune.errors import EnvironmentFaultError, ExitCode, UsageError, sanitize_line, suggest
from finetune.service.store.states import State
from finetune.targets import METRIC_NAMES, SCORES

if TYPE_CHECKING:
    from finetune.service.client import Client

app = typer.Typer(
    help="Submit and watch jobs: of the server in FINETUNE_API_URL, or of the store on this machine.",
    no_args_is_help=True,
)
COLUMNS = ("id", "state", "label", "submitted", "attempt")
_CODES = {State.SUCCEEDED: ExitCode.DONE, State.CANCELLED: ExitCode.INTERRUPTED}
IdArgument = Annotated[str, typer.Argument(help="Id of the job.", metavar="ID")]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")]


@app.command("submit", cls=RecipeCommand)
def submit_command(
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="A folder or an archive, which is uploaded; dataset:ID; sample:digits."
        ),
    ] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", "-b", help="A name, or job:ID.")] = None,
    strategy: Annotated[str | None, typer.Option("--strategy", "-s", help="As `finetune run`.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Number of epochs.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A shipped recipe or a YAML file.", metavar="NAME|FILE")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other key of the recipe; may be repeated.", metavar="SECTION.KEY=VALUE"
        ),
    ] = None,
    label: Annotated[str, typer.Option("--label", help="Name of the job, for people.")] = "",
    key: Annotated[
        str | None, typer.Option("--key", help="The same key is the same job, however often it is submitted.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show its events, and end when it ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a run as a job; images are uploaded unless the server has them."""
    with handled_errors(as_json):
        client = _open()
        from finetune.recipe import parse_assignments
        from finetune.recipe.flags import build_recipe
        from finetune.system.display import Display

        display = Display()
        flags = {"backbone": backbone, "strategy": strategy, "epochs": epochs, "data": data}
        values = build_recipe(recipe, flags, parse_assignments(assignments or [])).to_dict()
        if path := values["data"]["path"]:
            with display.fetch(f"sending {path}") as on_progress:
                values["data"]["path"] = client.send_images(path, on_progress)
            if values["data"]["path"].startswith("dataset:"):
                with display.busy("waiting for the check of the images"):
                    client.wait_until_checked(values["data"]["path"])
        job = client.submit(values, key or secrets.token_hex(16), label)
        if as_json and not wait:
            print_json(job)
            return
        print_line(job["id"])
        if wait:
            raise typer.Exit(_follow(client, job["id"]))


@app.command("list")
def list_command(
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only in this state; may be repeated.")
    ] = None,
    label: Annotated[str, typer.Option("--label", help="Only with this label.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=500, help="Most jobs that are shown.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    with handled_errors(as_json):
        for name in state or ():
            if name not in [*State]:
                fix = f"Take {', '.join(State)}."
                raise UsageError(f"--state {name}", f"there is no such state{suggest(name, [*State])}", fix)
        words = {"limit": limit, "label": label} | ({"state": state} if state else {})
        found = _open().read("/v1/jobs", params=words)
        if as_json:
            print_json(found)
            return
        rows = [
            [job["id"], job["state"], sanitize_line(job["label"]), _time(job["created"]), str(job["attempt"])]
            for job in found["jobs"]
        ]
        if rows:
            print_table(COLUMNS, rows)
        else:
            say("there are no jobs")


@app.command("show")
def show_command(job: IdArgument, as_json: JsonOption = False) -> None:
    """Show a job: its state, its progress, and how it ended."""
    with handled_errors(as_json):
        client = _open()
        facts = client.read(client.path_of(job))
        if as_json:
            print_json(facts)
            return
        for name in ("id", "state", "label", "attempt"):
            print_line(f"{name:<10}{sanitize_line(str(facts[name]))}")
        for name, value in _describe(facts):
            print_line(f"{name:<9} {sanitize_line(value)}")


def _describe(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is known of a job's progress, outcome and metrics, as lines."""
    progress, outcome, metrics = facts["progress"] or {}, facts["outcome"] or {}, facts["metrics"] or {}
    found = []
    if progress and facts["state"] == State.RUNNING:
        done, total = progress.get("done"), progress.get("total")
        found.append(("phase", f"{progress.get('phase')}" + (f", {done:,} of {total:,}" if total else "")))
    if outcome:
        found.append(("outcome", str(outcome.get("message"))))
        found += [("hint", str(outcome["hint"]))] if outcome.get("hint") else []
    found += [(METRIC_NAMES[name], f"{metrics[name]:.4f}") for name in SCORES if name in metrics]
    return found


@app.command("logs")
def logs_command(job: IdArgument, follow: FollowOption = False) -> None:
    """Print what the last attempt at a job wrote."""
    with handled_errors():
        client = _open()
        if not follow:
            print_text(client.call("GET", f"{client.path_of(job)}/logs").content.decode(errors="replace"))
            return
        for chunk in client.follow_log(job):
            print_text(chunk.decode(errors="replace"))


@app.command("events")
def events_command(job: IdArgument, follow: FollowOption = False, as_json: JsonOption = False) -> None:
    """Print the changes of a job's state."""
    with handled_errors(as_json):
        client = _open()
        if follow:
            raise typer.Exit(_follow(client, job))
        found = client.read(f"{client.path_of(job)}/events", params={"limit": 1000})
        if as_json:
            print_json(found)
            return
        for event in found["events"]:
            _print_event(event)


@app.command("cancel")
def cancel_command(job: IdArgument, as_json: JsonOption = False) -> None:
    """Stop a job; it keeps its checkpoints and can be resumed."""
    _act(job, "cancel", as_json)


@app.command("resume")
def resume_command(job: IdArgument, as_json: JsonOption = False) -> None:
    """Queue a job again that failed or was cancelled."""
    _act(job, "resume", as_json)


@app.command("pull")
def pull_command(
    job: IdArgument, output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run.")]
) -> None:
    """Fetch the run of a job: its model, its report, its tables."""
    with handled_errors():
        client = _open()
        from finetune.system.display import Display

        with Display().count(f"fetching {output}") as on_progress:
            number = client.pull(job, output, on_progress)
        print_line(f"{output}: {number} files")


@app.command("rm")
def remove_command(job: IdArgument) -> None:
    """Remove a job that has ended, with its run."""
    with handled_errors():
        client = _open()
        client.call("DELETE", client.path_of(job))


def _act(job: str, verb: str, as_json: bool) -> None:
    with handled_errors(as_json):
        client = _open()
        facts = client.call("POST", f"{client.path_of(job)}/{verb}").json()
        if as_json:
            print_json(facts)
        else:
            print_line(f"{facts['id']} {facts['state']}")


def _open() -> Client:
    try:
        from finetune.service.client import Client
        from finetune.service.settings import find_store
    except ImportError as error:
        found = f"a package is not installed ({error.name})"
        raise EnvironmentFaultError(
            "finetune jobs", found, "Run `pip install 'finetune-vision[serve]'`."
        ) from None
    return Client(*find_store())


def _follow(client: Client, job: str) -> int:
    """Print the events of a job until it ends; return the exit code that stands for its end."""
    last: dict[str, Any] = {}
    for last in client.follow_events(job):
        _print_event(last)
    if last["state"] in _CODES:
        return int(_CODES[last["state"]])
    outcome = client.read(client.path_of(job))["outcome"] or {}
    return int(outcome.get("exit_code") or ExitCode.INTERNAL)


def _print_event(event: dict[str, Any]) -> None:
    print_line(f"{_time(event['time'])}  {event['state']:<10}  {sanitize_line(event['message'])}")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
