"""``finetune serve``: jobs over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import handled_errors, say
from finetune.errors import EnvironmentFaultError, UsageError


def serve_command(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    store: Annotated[
        str, typer.Option("--store", help="Folder of jobs, data sets and models.", envvar="FINETUNE_STORE")
    ] = "finetune-store",
    database: Annotated[
        str,
        typer.Option(
            "--database",
            help="postgresql://... for several servers; by default a SQLite file in the store.",
            envvar="FINETUNE_DATABASE_URL",
        ),
    ] = "",
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, help="Jobs at the same time; by default one a GPU.")
    ] = None,
    ray_address: Annotated[
        str,
        typer.Option("--ray", help="Run jobs on a Ray cluster: http://HOST:8265.", metavar="ADDRESS"),
    ] = "",
    gpus_per_job: Annotated[float, typer.Option("--gpus-per-job", min=0, help="On the cluster.")] = 1.0,
    data_root: Annotated[
        list[Path] | None,
        typer.Option("--data-root", help="Folder whose images jobs may name by path; may be repeated."),
    ] = None,
) -> None:
    """Serve jobs over HTTP: submit recipes, watch, fetch the models.

    On another address than this machine's own, clients need the token of FINETUNE_API_TOKEN.
    """
    with handled_errors():
        try:
            from finetune.service.server import serve
            from finetune.service.settings import TOKEN_VARIABLE, ServiceSettings
        except ImportError as error:
            found = f"a package is not installed ({error.name})"
            fix = "Run `pip install 'finetune-vision[serve]'`."
            raise EnvironmentFaultError("finetune serve", found, fix) from None
        roots = tuple(path.absolute() for path in data_root or ())
        for root in roots:
            if not root.is_dir():
                raise UsageError(f"--data-root {root}", "there is no such folder", "Check the path.")
        token = os.environ.get(TOKEN_VARIABLE, "")
        settings = ServiceSettings(
            Path(store).absolute(),
            database,
            host,
            port,
            slots,
            ray_address,
            gpus_per_job,
            token,
            roots,
        )
        serve(settings, say)
