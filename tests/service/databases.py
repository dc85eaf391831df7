"""Real databases for the tests of the service: SQLite, and a PostgreSQL server where one is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
"""PostgreSQL refuses to run as root."""


def find_postgres() -> Path | None:
    """Return the folder of PostgreSQL's programs, or None."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    own = shutil.which("initdb")
    return found[-1] if found else Path(own).parent if own else None


class Postgres:
    """A server of its own, on a free port of this machine, in a folder.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        programs = find_postgres()
        assert programs is not None
        self._programs, self._folder = programs, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        self._call("initdb", "-D", folder / "data", "-U", "finetune", "--auth=trust", "--no-sync")

    @property
    def address(self) -> str:
        """Address of the database for ``--store``."""
        return f"postgresql://finetune@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1"
        log = self._folder / "log"
        self._call("pg_ctl", "-D", self._folder / "data", "-l", log, "-o", options, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        """End the server; ``immediate`` is what a crash is."""
        self._call("pg_ctl", "-D", self._folder / "data", "-m", mode, "-w", "stop")

    def _call(self, program: str, *words: object) -> None:
        demoted = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        command = ["setpriv", *demoted] if os.geteuid() == 0 else []
        command += [str(self._programs / program), *map(str, words)]
        environment = os.environ | {"LC_ALL": "C.UTF-8", "HOME": str(self._folder)}
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=self._folder)


@contextmanager
def running_postgres(folder: Path) -> Iterator[Postgres]:
    """Yield a running server."""
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
