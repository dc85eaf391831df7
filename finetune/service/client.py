"""The client of ``finetune jobs``: speaks to a server, or to a store of this machine without one.

Without a server the same application answers inside this process, so that both ways give the same answers;
the jobs that it queues start when a server is started on the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import httpx

from finetune.data.samples import is_sample
from finetune.data.tables.format import is_table
from finetune.errors import DataError, EnvironmentFaultError, ExitCode, FinetuneError
from finetune.runs.files import disk_error
from finetune.service.settings import TOKEN_VARIABLE, ServiceSettings
from finetune.service.store.states import TERMINAL
from finetune.system.regular_files import hash_regular
from finetune.system.temporary import temporary_folder

URL_VARIABLE = "FINETUNE_API_URL"
POLL = 1.0
"""Seconds between two looks for new lines."""
TRIES = 6
"""Times that a request is made before a server counts as not reached."""
_PART = 2**23
_TIMEOUT = 60.0
_TUS = {"Content-Type": "application/offset+octet-stream"}
OnProgress = Callable[[int, int], None]


class ServerError(FinetuneError):
    """An error that a server answered, with the exit code of its class."""

    def __init__(self, problem: Mapping[str, Any], status: int) -> None:
        fix = str(problem.get("fix") or "Look at the server's log.")
        super().__init__(str(problem.get("title") or "the server"), str(problem.get("detail") or status), fix)
        name = str(problem.get("class", "internal")).upper()
        self.exit_code = ExitCode[name] if name in ExitCode.__members__ else ExitCode.INTERNAL
        self.status = status


class Client:
    """Makes requests; a request that may be made twice is made again if the server does not answer.

    Args:
        store: folder of the store that is used without a server.
        database: its database, unless it is a file in the folder.
    """

    def __init__(self, store: Path, database: str = "") -> None:
        url, token = os.environ.get(URL_VARIABLE, ""), os.environ.get(TOKEN_VARIABLE, "")
        self.is_remote = bool(url)
        self._name = url or f"the store {store}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if url:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT)
        else:
            transport = _LocalTransport(ServiceSettings(store, database))
            self._http = httpx.Client(base_url="http://localhost", transport=transport)

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Return the answer of a request.

        Raises:
            ServerError: the server refuses it, or fails.
            EnvironmentFaultError: the server is not reached.
        """
        for number in range(TRIES):
            try:
                answer = self._http.request(method, path, **more)
            except httpx.TransportError as error:
                if number + 1 == TRIES:
                    raise self._not_reached(error) from None
            else:
                if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE or number + 1 == TRIES:
                    return _checked(answer)
            time.sleep(_pause(number))
        raise AssertionError

    def _not_reached(self, error: httpx.HTTPError) -> EnvironmentFaultError:
        fix = f"Start it (`finetune serve`), or correct {URL_VARIABLE}."
        found = f"it is not reached ({' '.join(str(error).split())[:200] or type(error).__name__})"
        return EnvironmentFaultError(self._name, found, fix)

    def read(self, path: str, **more: Any) -> dict[str, Any]:
        """Return the JSON object at a path; see :meth:`call`."""
        return cast(dict[str, Any], self.call("GET", path, **more).json())

    @staticmethod
    def path_of(job: str) -> str:
        """Return the path of a job, whatever its id holds."""
        return f"/v1/jobs/{quote(job, safe='')}"

    def submit(self, recipe: Mapping[str, Any], key: str, label: str = "") -> dict[str, Any]:
        """Submit a job; the same key is the same job."""
        headers, words = {"Idempotency-Key": key}, {"label": label}
        answer = self.call("POST", "/v1/jobs", json=recipe, headers=headers, params=words)
        return cast(dict[str, Any], answer.json())

    def follow_events(self, job: str) -> Iterator[dict[str, Any]]:
        """Yield the events of a job until it has ended."""
        after = 0
        while True:
            page = self.read(f"{self.path_of(job)}/events", params={"after": after})["events"]
            for event in page:
                after = event["seq"]
                yield event
            if page and page[-1]["state"] in TERMINAL:
                return
            time.sleep(POLL)

    def follow_log(self, job: str) -> Iterator[bytes]:
        """Yield the log of the last attempt as it is written, until the job has ended."""
        done, attempt = 0, 0
        while True:
            facts = self.read(self.path_of(job))
            if facts["attempt"] != attempt:
                done, attempt = 0, facts["attempt"]
            log = self.call("GET", f"{self.path_of(job)}/logs", params={"attempt": max(attempt, 1)}).content
            if len(log) > done:
                yield log[done:]
                done = len(log)
            if facts["state"] in TERMINAL:
                return
            time.sleep(POLL)

    def pull(self, job: str, output: Path, on_progress: OnProgress) -> int:
        """Fetch the files of a job's run that are not here yet, and check their digests.

        Returns:
            The number of files of the run.

        Raises:
            DataError: a file that arrived has another digest than the server said.
            DiskError: a file cannot be written.
        """
        files = self.read(f"{self.path_of(job)}/artifacts")["artifacts"]
        for number, file in enumerate(files):
            on_progress(number, len(files))
            target = output / file["name"]
            if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(output)):
                fix = "Ask whoever runs the server."
                raise DataError(f"the file {file['name'][:200]}", "it would lie outside of the folder", fix)
            if not (target.is_file() and hash_regular(target) == file["sha256"]):
                self._fetch(f"{self.path_of(job)}/artifacts/{quote(file['name'])}", target, file["sha256"])
        on_progress(len(files), len(files))
        return len(files)

    def _fetch(self, path: str, target: Path, sha256: str) -> None:
        for number in range(TRIES):
            try:
                return self._fetch_once(path, target, sha256)
            except httpx.TransportError as error:
                if number + 1 == TRIES:
                    raise self._not_reached(error) from None
            time.sleep(_pause(number))
        raise AssertionError

    def _fetch_once(self, path: str, target: Path, sha256: str) -> None:
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._http.stream("GET", path) as answer:
                if answer.is_error:
                    answer.read()
                    _checked(answer)
                with part.open("wb") as file:
                    for chunk in answer.iter_bytes(2**20):
                        file.write(chunk)
            if hash_regular(part) != sha256:
                part.unlink()
                raise DataError(str(target), "it arrived damaged", "Give the same command again.")
            part.replace(target)
        except OSError as error:
            raise disk_error(target, error) from None

    # --- images ------------------------------------------------------------------------------------

    def send_images(self, data: str, on_progress: OnProgress) -> str:
        """Return ``dataset:ID`` for a folder, table or archive, which is uploaded unless the server has it.

        Raises:
            DataError: there is no such folder or archive, or none of a table's images is found.
        """
        if data.startswith("dataset:") or is_sample(data):
            return data
        path = Path(data)
        is_listed = path.is_file() and is_table(path.name)
        if path.is_file() and not is_listed:
            return self._send(path, path.name, on_progress)
        if not path.is_dir() and not is_listed:
            raise DataError(f"--data {data}", "there is no such folder or archive", "Check the path.")
        with temporary_folder("finetune-upload-") as folder:
            packed = Path(folder) / "images.zip"
            (pack_table if is_listed else pack)(path, packed)
            return self._send(packed, path.name, on_progress)

    def _send(self, archive: Path, name: str, on_progress: OnProgress) -> str:
        digest, length = hash_regular(archive), archive.stat().st_size
        if not self._has_dataset(digest):
            begun = self.call("POST", "/v1/uploads", headers={"Upload-Length": str(length)})
            self._send_parts(archive, begun.headers["location"], length, on_progress)
            upload = begun.headers["location"].rpartition("/")[2]
            try:
                self.call("POST", "/v1/datasets", params={"upload": upload, "name": name})
            except ServerError:  # the answer of a first request may have been lost
                if not self._has_dataset(digest):
                    raise
        return f"dataset:{digest}"

    def _has_dataset(self, digest: str) -> bool:
        try:
            self.read(f"/v1/datasets/{digest}")
        except ServerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return True

    def _send_parts(self, archive: Path, address: str, length: int, on_progress: OnProgress) -> None:
        with archive.open("rb") as file:
            done = failures = 0
            while done < length:
                on_progress(done, length)
                file.seek(done)
                headers = _TUS | {"Upload-Offset": str(done)}
                before = done
                try:
                    answer = self._http.request("PATCH", address, content=file.read(_PART), headers=headers)
                    done = int(_checked(answer).headers["upload-offset"])
                except httpx.TransportError as error:
                    if failures == TRIES:
                        raise self._not_reached(error) from None
                    done = self._ask_offset(address)
                except ServerError as error:
                    if failures == TRIES or error.status != HTTPStatus.CONFLICT:
                        raise
                    done = self._ask_offset(address)
                failures = 0 if done > before else failures + 1
                time.sleep(min(0.2 * failures, 5.0))
        on_progress(length, length)

    def _ask_offset(self, address: str) -> int:
        """Return how far an upload is: of a part whose answer was lost, some may have arrived."""
        return int(self.call("HEAD", address).headers["upload-offset"])

    def wait_until_checked(self, data: str) -> None:
        """Wait until an uploaded data set was checked.

        Raises:
            DataError: a run would refuse it.
        """
        while True:
            facts = self.read(f"/v1/datasets/{data.removeprefix('dataset:')}")
            if facts["state"] == "ready":
                return
            if facts["state"] == "refused" or not self.is_remote:
                break
            time.sleep(POLL)
        if facts["state"] == "refused":
            outcome = facts["outcome"] or {}
            raise DataError(data[:40], str(outcome.get("message")), str(outcome.get("hint") or "Correct it."))


def pack(folder: Path, target: Path) -> None:
    """Pack a folder as a zip archive, the same bytes for the same files.

    Hidden files are left out, and links that lead out of the folder are not followed.
    """
    found = (path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)))
    _write_archive(folder, sorted(found), target)


def pack_table(table: Path, target: Path) -> None:
    """Pack a table with the images that it lists, and no other file of its folder.

    Raises:
        DataError: none of the images is found, or the table cannot be read.
    """
    from finetune.data.inputs import find_inputs  # loads NumPy, which no other command of jobs needs

    files = {image.file for image in find_inputs(str(table), None).open() if not image.fault}
    home = table.parent.absolute()
    listed = sorted(file for file in files if file.is_relative_to(home) and file.is_file())
    if not listed:
        found = "none of the images that it lists is found beside it"
        raise DataError(f"--data {table}", found, "Write paths relative to the folder of the table.")
    _write_archive(home, [home / table.name, *listed], target)


def _is_hidden(inner: Path) -> bool:
    return any(part.startswith(".") for part in inner.parts)


def _write_archive(folder: Path, files: Iterable[Path], target: Path) -> None:
    root = os.path.realpath(folder)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            if not path.is_file() or not Path(os.path.realpath(path)).is_relative_to(root):
                continue
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # with a fixed date
            with archive.open(info, "w", force_zip64=True) as entry, path.open("rb") as file:
                shutil.copyfileobj(file, entry, 2**20)


def _pause(number: int) -> float:
    """Return the seconds before a request is made again that has failed ``number + 1`` times."""
    return float(min(0.2 * 2**number, 5.0))


class _LocalTransport(httpx.BaseTransport):
    """Answers requests with an application in this process; it starts no jobs."""

    def __init__(self, settings: ServiceSettings) -> None:
        from finetune.service.app import create_app
        from finetune.service.work.executor import LocalExecutor

        app = create_app(settings, LocalExecutor(), lambda _: None)
        self._inner = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Return the answer of the application."""

        async def answer() -> httpx.Response:
            content = request.read()
            copy = httpx.Request(request.method, request.url, headers=request.headers, content=content)
            response = await self._inner.handle_async_request(copy)
            body = b"".join([chunk async for chunk in response.aiter_raw()])
            return httpx.Response(response.status_code, headers=response.headers, content=body)

        return asyncio.run(answer())


def _checked(answer: httpx.Response) -> httpx.Response:
    if not answer.is_error:
        return answer
    try:
        problem = json.loads(answer.content)
    except ValueError:
        problem = {"detail": f"it answered {answer.status_code}"}
    raise ServerError(problem if isinstance(problem, dict) else {}, answer.status_code)
