"""What the service makes of a network's own speed, whether its memory grows, and how fast a full store is.

``predict``: 1, 8 and 64 clients send a photograph each, again and again, to a real server; the network alone
and decoding alone are measured beside it, as in :mod:`benchmarks.predict`. ``store``: 10,000 jobs are in the
database while single requests are timed.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import httpx
import torch

from benchmarks.commands import find_finetune
from benchmarks.data import NETWORKS, find_folder, list_images, make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.predict import measure_parts, train_model
from benchmarks.results import Figures, Results
from benchmarks.text import span, table
from finetune.evaluation.predictor import load
from finetune.service.store.jobs import JobStore
from finetune.service.store.states import State
from finetune.service.store.tables import open_store

CLIENTS = (1, 8, 64)
STORED = 10_000
COLUMNS = {
    "requests/s": "per_second",
    "p50 ms": "p50_ms",
    "p99 ms": "p99_ms",
    "limit of network and decoding, images/s": "limit_per_second",
    "server MB after 200 requests": "first_mb",
    "server MB at the end": "last_mb",
}


def plan(bench: Bench) -> list[Case]:
    """Return a case for each number of clients, and one of the store."""
    numbers = CLIENTS[:1] if bench.quick else CLIENTS
    return [*(Case(f"service-predict-{number}", size=number) for number in numbers), Case("service-store")]


def measure(turn: Turn) -> Figures:
    """Return requests a second, their times, and the memory of the server."""
    if turn.case.name == "service-store":
        return _measure_store(turn)
    bench = turn.bench
    torch.set_num_threads(bench.threads)
    data = find_folder(NETWORKS["squeezenet"], bench)
    run = make_once(bench.cache / f"predict-model{'-quick' * bench.quick}", lambda to: train_model(data, to))
    images = list_images(data)
    network, decoding = measure_parts(load(run), images, bench.workers, 0.1 if bench.quick else 20.0)
    store = turn.place / "store"
    with serving(store) as server:
        _promote(server, store, run)
        total = 40 if bench.quick else 20_000 // max(1, 64 // turn.case.size)
        # The first requests start the process of the model and the threads, which are no growth.
        _ask(server.url, images, turn.case.size, 10 if bench.quick else 200)
        first, times, seconds = server.memory(), *_ask(server.url, images, turn.case.size, total)
        found = {"per_second": len(times) / seconds, "first_mb": first, "last_mb": server.memory()}
    limit = 1 / (1 / network[0] + 1 / decoding[0])
    return found | _describe(times) | {"limit_per_second": limit}


def _describe(times: list[float]) -> Figures:
    return {"p50_ms": 1000 * median(times), "p99_ms": 1000 * quantiles(times, n=100)[-1]}


class _Server:
    def __init__(self, url: str, process: int) -> None:
        self.url, self._process = url, process

    def memory(self) -> float:
        """Return the memory of the server and its models, in MB."""
        children = Path(f"/proc/{self._process}/task").glob("*/children")
        every = {self._process, *(int(pid) for file in children for pid in file.read_text().split())}
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in every)
        return pages * os.sysconf("SC_PAGESIZE") / 1e6


@contextmanager
def serving(store: Path) -> Iterator[_Server]:
    """Yield a server in a process of its own."""
    command = [find_finetune(), "serve", "--port", "0", "--store", str(store)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stderr)))
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        try:
            yield _Server(found.group(), process.pid)
        finally:
            process.terminate()


def _promote(server: _Server, store: Path, run: Path) -> None:
    """Make a finished run a job of the store, and its model one that is served."""
    jobs = JobStore(open_store(str(store)))
    job, _ = jobs.submit({"data": {"path": "sample:digits"}})
    claimed = jobs.claim("benchmark")
    if claimed is not None:  # or the server has been faster, and its run is replaced
        jobs.finish(claimed, State.SUCCEEDED, {"message": "finished"})
    folder = store / "jobs" / job.id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run").symlink_to(run)
    httpx.put(f"{server.url}/v1/models/squeezenet", json={"job": job.id}, timeout=60).raise_for_status()


def _ask(url: str, images: list[Path], clients: int, total: int) -> tuple[list[float], float]:
    """Let so many clients make so many requests; return the seconds of each, and of all."""
    contents = [path.read_bytes() for path in images[:64]]
    times: list[float] = []
    address = f"{url}/v1/models/squeezenet/predict"

    def work(start: int) -> None:
        with httpx.Client(timeout=120) as client:
            for number in range(start, total, clients):
                began = time.perf_counter()
                client.post(address, files={"i": contents[number % len(contents)]}).raise_for_status()
                times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, time.perf_counter() - began


def _measure_store(turn: Turn) -> Figures:
    """Return the times of single requests on a full store."""
    store = turn.place / "store"
    jobs = JobStore(open_store(str(store)))
    number = 100 if turn.bench.quick else STORED
    made = [jobs.submit({"data": {"path": "sample:digits"}, "seed": seed})[0].id for seed in range(number)]
    for job in made:
        jobs.cancel(job)
    times: list[float] = []
    with serving(store) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for path in ("/v1/jobs", f"/v1/jobs/{made[0]}", f"/v1/jobs?after={made[number // 2]}") * 50:
            began = time.perf_counter()
            client.get(path).raise_for_status()
            times.append(time.perf_counter() - began)
    return {"per_second": len(times) / sum(times)} | _describe(times)


def write(results: Results) -> Iterator[str]:
    """Yield a row for each number of clients, and one for requests to a full store."""
    rows = []
    for case, tool in results.measured("service-predict-") + results.measured("service-store"):
        what, _, number = case.removeprefix("service-").partition("-")
        name = f"predictions, clients: {number}" if what == "predict" else f"list and show, {STORED:,} jobs"
        rows.append([name, *(span(results.figure(case, tool, figure)) for figure in COLUMNS.values())])
    yield from table(["requests", *COLUMNS], rows)


QUESTION = Question("service", plan, measure, write=write)
