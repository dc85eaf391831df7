"""``finetune jobs`` against a real server, and on a store without one: the same answers and exit codes."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.errors import DataError
from finetune.service import client as module
from finetune.service.client import Client, ServerError, pack
from finetune.service.settings import TOKEN_VARIABLE, Limits, ServiceSettings
from finetune.service.work import dispatcher
from finetune.service.work.executor import LocalExecutor
from tests.cli.test_labels import draw_tables
from tests.conftest import Cli, draw_folder
from tests.service.servers import Scripts, Served, serving
from tests.service.test_api import TOKEN, WAIT


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatcher, "TICK", 0.02)
    monkeypatch.setattr(module, "POLL", 0.02)
    monkeypatch.setenv("FINETUNE_STORE", str(tmp_path / "own"))
    for name in ("FINETUNE_API_URL", "FINETUNE_DATABASE_URL", TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    scripts = Scripts({"wait": WAIT, "fail": "echo no; exit 65"})
    with serving(ServiceSettings(tmp_path / "store", token=TOKEN), scripts) as server:
        monkeypatch.setenv("FINETUNE_API_URL", str(server.client.base_url))
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        yield server


def submit(cli: Cli, *words: object) -> str:
    result = cli("jobs", "submit", "-d", "sample:digits", *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()[0]


def test_a_job_is_submitted_watched_and_fetched(cli: Cli, served: Served, tmp_path: Path) -> None:
    result = cli("jobs", "submit", "-d", "sample:digits", "--label", "x", "--set", "seed=3", "--wait")
    assert result.exit_code == 0, result.stderr
    job, *events = result.stdout.splitlines()
    assert [line.split()[2] for line in events] == ["queued", "running", "succeeded"]
    assert cli("jobs", "events", job).stdout.splitlines() == events
    shown = json.loads(cli("jobs", "show", job, "--json").stdout)
    assert shown["state"] == "succeeded" and shown["recipe"]["seed"] == 3
    lines = cli("jobs", "show", job).stdout
    assert "accuracy  0.9000" in lines and "outcome   finished" in lines
    assert cli("jobs", "logs", job).stdout == cli("jobs", "logs", job, "-f").stdout == "hello 1\n"
    assert job in cli("jobs", "list", "--label", "x").stdout
    assert cli("jobs", "pull", job, "-o", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_text() == "weights\n"
    assert cli("jobs", "rm", job).exit_code == 0
    assert cli("jobs", "show", job).exit_code == 2


@pytest.mark.slow
def test_exit_codes_say_how_a_job_ended(cli: Cli, served: Served) -> None:
    failed = cli("jobs", "submit", "-d", "sample:digits", "--label", "fail", "--wait")
    assert failed.exit_code == 65
    job = submit(cli, "--label", "wait")
    served.wait(job, "running")
    assert cli("jobs", "cancel", job).stdout.split() == [job, "cancelling"]
    assert cli("jobs", "events", job, "-f").exit_code == 75
    assert cli("jobs", "resume", job).exit_code == 0
    served.wait(job, "running")
    refused = cli("jobs", "rm", job)
    assert refused.exit_code == 2 and "Cancel it first" in refused.stderr
    cli("jobs", "cancel", job)
    served.wait(job, "cancelled")


def test_the_same_key_is_the_same_job(cli: Cli, served: Served) -> None:
    assert submit(cli, "--key", "k") == submit(cli, "--key", "k")
    other = cli("jobs", "submit", "-d", "sample:digits", "--key", "k", "--set", "seed=1")
    assert other.exit_code == 2 and "another request was made with it" in other.stderr


def test_images_are_sent_once(cli: Cli, served: Served, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", {"red": 3, "blue": 3})
    (tmp_path / "images" / "red" / "away.jpg").symlink_to("/etc/hostname")
    (tmp_path / "images" / ".hidden.jpg").write_bytes(b"x")
    for _ in range(2):
        assert cli("jobs", "submit", "-d", tmp_path / "images").exit_code == 0
    [dataset] = served.client.get("/v1/datasets").json()["datasets"]
    assert dataset["name"] == "images"
    [path] = (tmp_path / "store" / "datasets").glob("*/images.zip")
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [f"{c}/{n:03}.jpg" for c in ("blue", "red") for n in range(3)]


def test_a_table_is_sent_with_its_images_and_nothing_else(cli: Cli, served: Served, tmp_path: Path) -> None:
    home = tmp_path / "home"
    draw_folder(home / "images", {"red": 2})
    (home / "private.txt").write_text("secret")
    (home / "other.csv").write_text("path,value\n")
    listed = sorted(path.relative_to(home).as_posix() for path in home.rglob("*.jpg"))[:-1]
    (home / "labels.csv").write_text("path,labels\n" + "".join(f"{path},a|b\n" for path in listed))
    result = cli("jobs", "submit", "-d", home / "labels.csv")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(cli("jobs", "show", result.stdout.splitlines()[0], "--json").stdout)
    with zipfile.ZipFile(shown["recipe"]["data"]["path"]) as archive:
        assert sorted(archive.namelist()) == [*listed, "labels.csv"]
    (home / "lost.csv").write_text("path,labels\nnone.jpg,a\n")
    result = cli("jobs", "submit", "-d", home / "lost.csv")
    assert result.exit_code == 65 and "none of the images that it lists is found" in result.stderr


@pytest.mark.parametrize(("score", "shown"), [("map", "mean average precision"), ("r2", "R squared")])
def test_the_score_of_other_labels_is_shown(
    cli: Cli, served: Served, tmp_path: Path, score: str, shown: str
) -> None:
    metrics = {score: 0.7654, "intervals": {score: [0.71, 0.82]}, "num_samples": 34, "mae": 1.5}
    history = f"epoch,lr,train_loss,eval_loss,eval_{score}\n1,0.1,1.5,1.2,0.5\n2,0.1,1.2,1.1,0.6\n"
    served.scripts.scripts["other"] = (
        f"printf '{history}' > $OUT/history.csv; printf '{json.dumps(metrics)}' > $OUT/metrics.json; "
        'printf \'{"state": "done", "message": "finished", "exit_code": 0}\' > $OUT/outcome.json'
    )
    job = submit(cli, "--label", "other", "--wait")
    assert f"{shown} 0.7654" in cli("jobs", "show", job).stdout
    page = served.client.get(f"/jobs/{job}", headers={"Accept": "text/html"})
    assert page.status_code == 200 and ">34<" in page.text
    for said in (f"<dt>{shown}</dt><dd>0.765<span>0.710 to 0.820</span>", "<dd>1.500</dd>"):
        assert said in page.text
    for name, title in (("score", shown), ("loss", "Loss")):
        plot = served.client.get(f"/jobs/{job}/curves/{name}.svg")
        assert plot.status_code == 200 and title in plot.text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "score"), [("multi", "map"), ("number", "r2")])
def test_a_job_on_a_table_learns_its_labels(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, score: str
) -> None:
    """Of the real commands, for the check and for the run."""
    table = draw_tables(tmp_path / "tables") / f"{kind}.csv"
    settings = ServiceSettings(tmp_path / "store", data_roots=(tiny.parent,))
    with serving(settings, LocalExecutor()) as server:
        monkeypatch.setenv("FINETUNE_API_URL", str(server.client.base_url))
        words = ("-b", tiny, "-s", "freeze", "--set", "strategy.features=all")
        result = cli("jobs", "submit", "-d", table, *words, "--wait")
        assert result.exit_code == 0, result.stderr
        shown = json.loads(cli("jobs", "show", result.stdout.splitlines()[0], "--json").stdout)
    assert shown["metrics"]["target"] == kind and shown["metrics"][score] > 0.5


def test_refused_images_end_with_the_reason(cli: Cli, served: Served, tmp_path: Path) -> None:
    from tests.service.test_datasets import REFUSED

    served.scripts.scripts["check"] = REFUSED
    draw_folder(tmp_path / "images", {"red": 1})
    result = cli("jobs", "submit", "-d", tmp_path / "images")
    assert result.exit_code == 65 and "only one class" in result.stderr and "Add another." in result.stderr
    assert cli("jobs", "submit", "-d", tmp_path / "none").exit_code == 65


@pytest.mark.slow
def test_a_network_that_fails_now_and_then_costs_nothing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_folder(tmp_path / "images", {"red": 6, "blue": 6})
    monkeypatch.setattr(module, "_PART", 3000)
    request, number = httpx.Client.request, [0]

    def fail(self: httpx.Client, *words: object, **more: object) -> httpx.Response:
        if self is served.client:
            return request(self, *words, **more)  # type: ignore[arg-type]
        number[0] += 1
        if number[0] % 3 == 0:
            raise httpx.ConnectError("the network is gone")
        answer = request(self, *words, **more)  # type: ignore[arg-type]
        if number[0] % 5 == 0:
            raise httpx.ReadError("the answer is lost")
        return answer

    monkeypatch.setattr(httpx.Client, "request", fail)
    client = Client(tmp_path / "unused")
    data = client.send_images(str(tmp_path / "images"), lambda *_: None)
    first = client.submit({"data": {"path": data}}, "key")
    second = client.submit({"data": {"path": data}}, "key")
    assert first["id"] == second["id"] and number[0] > 15
    assert len(served.client.get("/v1/datasets").json()["datasets"]) == 1
    assert len(served.client.get("/v1/jobs").json()["jobs"]) == 1


def test_a_file_that_arrives_damaged_is_not_kept(
    cli: Cli, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(cli)
    served.wait(job, "succeeded")
    read = Client.read

    def lie(self: Client, path: str, **more: object) -> dict[str, object]:
        found = read(self, path, **more)
        for one in found.get("artifacts", ()):
            one["sha256"] = "0" * 64
        return found

    monkeypatch.setattr(Client, "read", lie)
    result = cli("jobs", "pull", job, "-o", tmp_path / "run")
    assert result.exit_code == 65 and "it arrived damaged" in result.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.sample(1)
@pytest.mark.parametrize("failures", [2, 1000])
def test_files_are_asked_for_again(
    cli: Cli, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    job = submit(cli)
    served.wait(job, "succeeded")
    stream, number = httpx.Client.stream, itertools.count()

    def fail(self: httpx.Client, *words: Any) -> Any:
        if next(number) < failures:
            raise httpx.ReadError("the network is gone")
        return stream(self, *words)

    monkeypatch.setattr(httpx.Client, "stream", fail)
    monkeypatch.setattr(module, "_pause", lambda _: 0.0)
    result = cli("jobs", "pull", job, "-o", tmp_path / "run")
    assert result.exit_code == (0 if failures == 2 else 78), result.stderr
    assert failures == 2 or ("the network is gone" in result.stderr and not any(tmp_path.glob("run/*")))


def test_without_a_server_the_store_itself_answers(cli: Cli, tmp_path: Path) -> None:
    job = submit(cli, "--label", "later")
    assert json.loads(cli("jobs", "show", job, "--json").stdout)["state"] == "queued"
    assert cli("jobs", "logs", job).stdout == ""
    assert [line.split()[2] for line in cli("jobs", "events", job).stdout.splitlines()] == ["queued"]
    with serving(ServiceSettings(tmp_path / "own")) as served:  # which then starts it
        served.wait(job, "succeeded")
    assert job in cli("jobs", "list", "--state", "succeeded").stdout
    assert cli("jobs", "rm", job).exit_code == 0
    assert "there are no jobs" in cli("jobs", "list").stderr


def test_a_server_that_is_not_reached_and_a_wrong_token(
    cli: Cli, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong" * 8)
    wrong = cli("jobs", "list")
    assert wrong.exit_code == 2 and "the token is missing or wrong" in wrong.stderr
    monkeypatch.setattr(module, "TRIES", 1)
    monkeypatch.setenv("FINETUNE_API_URL", "http://127.0.0.1:9")
    away = cli("jobs", "list")
    assert away.exit_code == 78 and "it is not reached" in away.stderr


def test_mistakes_of_a_recipe_are_those_of_run(cli: Cli, served: Served) -> None:
    for words in (("--set", "training.lrr=1"), ("--epochs", 0), ("-s", "nothing")):
        here, there = (
            cli("run", "-d", "sample:digits", *words),
            cli("jobs", "submit", "-d", "sample:digits", *words),
        )
        assert here.exit_code == there.exit_code == 2
        assert here.stderr.splitlines()[-2:] == there.stderr.splitlines()[-2:]


def test_the_same_folder_is_packed_to_the_same_bytes(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", {"red": 2, "blue": 2})
    for name in ("a.zip", "b.zip"):
        pack(tmp_path / "images", tmp_path / name)
        (tmp_path / "images" / "red" / "000.jpg").touch()
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_an_open_server_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = cli("serve", "--host", "0.0.0.0", "--store", tmp_path / "s")
    assert result.exit_code == 2 and f"Set {TOKEN_VARIABLE}" in result.stderr
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    result = cli("serve", "--store", tmp_path / "s")
    assert result.exit_code == 2 and "can be guessed" in result.stderr
    assert cli("serve", "--data-root", tmp_path / "none").exit_code == 2
    assert Limits().waiting_jobs > 0 and not (tmp_path / "s").exists()


@pytest.mark.parametrize(("status", "requests"), [(507, 1), (409, module.TRIES + 1)])
def test_an_upload_that_does_not_go_on_ends(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, requests: int
) -> None:
    archive, made = tmp_path / "x.zip", 0
    archive.write_bytes(b"PK\x03\x04")
    real = httpx.Client.request

    def request(self: httpx.Client, method: str, url: str, **more: object) -> httpx.Response:
        nonlocal made
        if method != "PATCH":
            return real(self, method, url, **more)  # type: ignore[arg-type]
        made += 1
        return httpx.Response(status, json={"title": "x", "detail": "no", "fix": "y", "class": "disk"})

    monkeypatch.setattr(httpx.Client, "request", request)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(ServerError):
        Client(tmp_path / "own").send_images(str(archive), lambda *_: None)
    assert made == requests


def test_a_server_names_no_file_outside_of_the_folder(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = Client(tmp_path / "own")
    files = {"artifacts": [{"name": "../out.txt", "sha256": "0"}]}
    monkeypatch.setattr(client, "read", lambda _: files)
    with pytest.raises(DataError, match="outside"):
        client.pull("x", tmp_path / "run", lambda *_: None)
    assert not (tmp_path / "out.txt").exists()
