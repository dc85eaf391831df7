"""What a server is started with."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UsageError

TOKEN_VARIABLE = "FINETUNE_API_TOKEN"  # noqa: S105 - the name of a variable
DATABASE_VARIABLE = "FINETUNE_DATABASE_URL"
SECRETS = (TOKEN_VARIABLE, DATABASE_VARIABLE)
"""Variables of a server that none of its processes needs."""


@dataclass(frozen=True)
class Limits:
    """What one request, or one client, may cost.

    Attributes:
        recipe_bytes: size of a recipe.
        images_bytes: size of the images of a prediction, in base64.
        upload_bytes: size of an uploaded archive.
        waiting_jobs: jobs that may wait at the same time.
        requests_per_minute: of one client (a token, or an address).
    """

    recipe_bytes: int = 2**16
    images_bytes: int = 2**27
    upload_bytes: int = 50 * 2**30
    waiting_jobs: int = 10_000
    requests_per_minute: int = 6_000


@dataclass(frozen=True)
class ServiceSettings:
    """What a server is started with.

    Attributes:
        store: folder of the store's files, and of its database unless there is another one.
        database: ``postgresql://...``; empty for a SQLite file in the folder.
        host: address that the server listens on.
        port: its port; 0 for a free one.
        slots: jobs that run at the same time; None for one a GPU, and one without.
        ray_address: dashboard of the Ray cluster that runs the jobs; empty runs them on this machine.
        gpus_per_job: GPUs of each job on a cluster.
        token: what a client must send; empty demands none, on a loopback address only.
        data_roots: folders of the server whose images a job may name by path.
        limits: what a request may cost.
    """

    store: Path
    database: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int | None = None
    ray_address: str = ""
    gpus_per_job: float = 1.0
    token: str = ""
    data_roots: tuple[Path, ...] = ()
    limits: Limits = Limits()

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host == "localhost" or _is_loopback(self.host)

    def check(self) -> None:
        """Refuse an open server without a token.

        Raises:
            UsageError: others would reach the server, and it has no token; or the token is too short.
        """
        if not self.is_local and not self.token:
            found = "everybody who reaches this address could run jobs on this machine"
            raise UsageError(f"--host {self.host}", found, f"Set {TOKEN_VARIABLE}, or leave --host out.")
        if self.token and len(self.token) < 16:
            found = f"a token of {len(self.token)} characters can be guessed"
            raise UsageError(TOKEN_VARIABLE, found, "Take 32 random characters: `openssl rand -hex 16`.")


def find_store() -> tuple[Path, str]:
    """Return the folder and the database of the store on this machine, as ``finetune serve`` finds them."""
    folder = Path(os.environ.get("FINETUNE_STORE", "finetune-store"))
    return folder.absolute(), os.environ.get(DATABASE_VARIABLE, "")


def own_environment() -> dict[str, str]:
    """Return the environment of the server without its secrets, for the processes that it starts."""
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
