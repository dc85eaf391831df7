"""A real server on a free port, whose jobs are scripts of the shell instead of trainings."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import uvicorn

from finetune.service.app import create_app
from finetune.service.settings import ServiceSettings
from finetune.service.store.folder import JobFolder
from finetune.service.store.jobs import Job
from finetune.service.store.states import Kind
from finetune.service.work.executor import Executor, LocalExecution

DONE = """
echo "hello $ATTEMPT"
printf '{"phase": "training", "done": 3, "total": 9}' > $OUT/progress.json
printf '{"accuracy": 0.9}' > $OUT/metrics.json
mkdir -p $OUT/model $OUT/checkpoints; echo weights > $OUT/model/model.safetensors; echo x > $OUT/checkpoints/x
printf '{"state": "done", "message": "finished", "exit_code": 0}' > $OUT/outcome.json
"""

CHECKED = 'printf \'{"errors": 0, "warnings": 1, "findings": []}\' > $OUT/check.json'


class Scripts:
    """Runs a script for each job, by its label; :data:`DONE` for a label without one.

    Args:
        scripts: by label; ``$OUT`` is the run folder and ``$ATTEMPT`` the number of the attempt.
    """

    slots = 2

    def __init__(self, scripts: Mapping[str, str] | None = None) -> None:
        self.scripts = dict(scripts or {})
        self.started: list[str] = []

    def start(self, job: Job, folder: JobFolder) -> LocalExecution:
        self.started.append(job.id)
        folder.run.path.mkdir(parents=True, exist_ok=True)
        environment = {"OUT": str(folder.run.path), "ATTEMPT": str(job.attempt), "PATH": "/usr/bin:/bin"}
        with folder.log(job.attempt).open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", self._script(job)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalExecution(process, None)

    def _script(self, job: Job) -> str:
        if job.kind == Kind.CHECK:
            return self.scripts.get("check", CHECKED)
        return self.scripts.get(job.label, DONE)


class Served:
    """A running server.

    Attributes:
        client: speaks to it.
        scripts: what its jobs do.
        said: the lines that it has shown.
    """

    def __init__(self, client: httpx.Client, scripts: Scripts, said: list[str]) -> None:
        self.client, self.scripts, self.said = client, scripts, said

    def submit(self, label: str = "", **more: Any) -> str:
        answer = self.client.post("/v1/jobs", json=RECIPE, params={"label": label}, **more)
        assert answer.status_code in (200, 201), answer.text
        job: str = answer.json()["id"]
        return job

    def wait(self, job: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.client.get(f"/v1/jobs/{job}").json()
            if found["state"] in states:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.02)


RECIPE = {"data": {"path": "sample:digits"}}


@contextmanager
def serving(settings: ServiceSettings, executor: Executor | None = None) -> Iterator[Served]:
    """Yield a server that really listens."""
    scripts, said = executor if isinstance(executor, Scripts) else Scripts(), list[str]()
    app = create_app(replace(settings, port=0), executor or scripts, said.append)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            yield Served(client, scripts, said)
    finally:
        server.should_exit = True
        thread.join()
