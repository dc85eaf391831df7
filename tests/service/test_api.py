"""``/v1`` on a real server: jobs from submission to their files, and every refusal as a problem."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.service.access import OPEN
from finetune.service.routes import datasets as data
from finetune.service.routes import health, inference, models, page
from finetune.service.routes import jobs as routes
from finetune.service.settings import Limits, ServiceSettings
from finetune.service.work import dispatcher
from tests.service.servers import RECIPE, Scripts, Served, serving

TOKEN = "0123456789abcdef0123456789abcdef"
WAIT = "trap 'exit 75' TERM; while :; do sleep 0.05; done"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "TICK", 0.02)
    monkeypatch.setattr(routes, "POLL", 0.02)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "data").mkdir()
    settings = ServiceSettings(tmp_path / "store", data_roots=(tmp_path / "data",))
    with serving(settings, Scripts({"wait": WAIT, "fail": "echo no; exit 65"})) as server:
        yield server


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert (
        found["status"] == status and found["title"] and found["detail"] and found["fix"] and found["class"]
    )
    return found


def test_a_job_from_submission_to_its_files(served: Served) -> None:
    answer = served.client.post("/v1/jobs", json=RECIPE, params={"label": "digits"})
    assert answer.status_code == 201 and answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    job = answer.json()["id"]
    done = served.wait(job, "succeeded")
    assert done["metrics"] == {"accuracy": 0.9} and done["outcome"]["message"] == "finished"
    assert done["progress"]["done"] == 3 and done["recipe"]["data"]["path"] == "sample:digits"
    events = served.client.get(f"/v1/jobs/{job}/events").json()["events"]
    assert [(one["seq"], one["state"]) for one in events] == [(1, "queued"), (2, "running"), (3, "succeeded")]
    assert served.client.get(f"/v1/jobs/{job}/logs").text == "hello 1\n"
    files = {one["name"]: one for one in served.client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"]}
    assert set(files) == {"progress.json", "metrics.json", "outcome.json", "model/model.safetensors"}
    file = served.client.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors")
    assert file.content == b"weights\n"
    assert file.headers["content-security-policy"] == "sandbox allow-scripts"
    digest = hashlib.sha256(file.content).hexdigest()
    assert file.headers["etag"] == f'"{digest}"' and files["model/model.safetensors"]["sha256"] == digest
    listed = served.client.get("/v1/jobs").json()
    assert [one["id"] for one in listed["jobs"]] == [job] and listed["next"] is None
    assert served.client.delete(f"/v1/jobs/{job}").status_code == 204
    problem(served.client.get(f"/v1/jobs/{job}"), 404)


def test_files_come_in_ranges_and_only_if_they_have_changed(served: Served) -> None:
    job = served.submit()
    served.wait(job, "succeeded")
    address = f"/v1/jobs/{job}/artifacts/model/model.safetensors"
    tag = served.client.get(address).headers["etag"]
    part = served.client.get(address, headers={"Range": "bytes=2-4", "If-Range": tag})
    assert part.status_code == 206 and part.content == b"igh"
    other = served.client.get(address, headers={"Range": "bytes=2-4", "If-Range": '"another"'})
    assert other.status_code == 200 and other.content == b"weights\n"
    assert served.client.get(address, headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name",
    ["../../store.sqlite", "..%2f..%2fstore.sqlite", "checkpoints/x", "/etc/passwd", "none", ".x", "model"],
)
def test_no_other_file_is_given_out(served: Served, name: str) -> None:
    job = served.submit()
    served.wait(job, "succeeded")
    answer = served.client.get(f"/v1/jobs/{job}/artifacts/{name}")
    assert answer.status_code == 404, answer.text


def test_the_same_key_is_the_same_job(served: Served) -> None:
    key = {"Idempotency-Key": "k1"}
    first = served.client.post("/v1/jobs", json=RECIPE, headers=key)
    second = served.client.post("/v1/jobs", json=RECIPE, headers=key)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = served.client.post("/v1/jobs", json=RECIPE | {"seed": 3}, headers=key)
    assert "another request" in problem(other, 422)["detail"]
    served.wait(first.json()["id"], "succeeded")
    assert served.scripts.started == [first.json()["id"]]


def test_cancel_and_resume(served: Served) -> None:
    job = served.submit("wait")
    served.wait(job, "running")
    problem(served.client.post(f"/v1/jobs/{job}/resume"), 409)
    problem(served.client.delete(f"/v1/jobs/{job}"), 409)
    assert served.client.post(f"/v1/jobs/{job}/cancel").status_code == 202
    served.wait(job, "cancelled")
    assert served.client.post(f"/v1/jobs/{job}/cancel").status_code == 200  # twice is once
    assert served.client.post(f"/v1/jobs/{job}/resume").json()["state"] in ("queued", "running")
    assert served.wait(job, "running")["attempt"] == 2
    served.client.post(f"/v1/jobs/{job}/cancel")
    served.wait(job, "cancelled")


def test_a_failed_job_says_why(served: Served) -> None:
    job = served.submit("fail")
    failed = served.wait(job, "failed")
    assert failed["outcome"]["exit_code"] == 65 and failed["metrics"] is None
    assert served.client.get(f"/v1/jobs/{job}/logs", params={"attempt": 1}).text == "no\n"


def read_stream(served: Served, job: str, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    accept = {"Accept": "text/event-stream"} | (headers or {})
    found: list[dict[str, Any]] = []
    with served.client.stream("GET", f"/v1/jobs/{job}/events", headers=accept) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for block in "".join(answer.iter_text()).strip().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines())
            found.append({"kind": lines["event"], "id": lines.get("id"), **json.loads(lines["data"])})
    return found


def test_events_are_streamed_until_the_end_and_from_where_a_client_was(served: Served) -> None:
    job = served.submit()
    events = [one for one in read_stream(served, job) if one["kind"] == "state"]
    assert [(one["id"], one["state"]) for one in events] == [
        ("1", "queued"),
        ("2", "running"),
        ("3", "succeeded"),
    ]
    rest = [one for one in read_stream(served, job, {"Last-Event-ID": "2"}) if one["kind"] == "state"]
    assert [one["state"] for one in rest] == ["succeeded"]
    problem(served.client.get("/v1/jobs/x/events", headers={"Accept": "text/event-stream"}), 404)


def test_progress_is_streamed_between_events(served: Served) -> None:
    served.scripts.scripts["slow"] = (
        'printf \'{"phase": "training", "done": 1}\' > $OUT/progress.json; sleep 0.5; exit 0'
    )
    found = read_stream(served, served.submit("slow"))
    assert {"kind": "progress", "id": None, "phase": "training", "done": 1} in found


def test_a_log_is_followed_to_its_end(served: Served) -> None:
    served.scripts.scripts["talk"] = "for i in 1 2 3; do echo line $i; sleep 0.1; done"
    job = served.submit("talk")
    with served.client.stream("GET", f"/v1/jobs/{job}/logs", params={"follow": True, "attempt": 1}) as answer:
        assert "".join(answer.iter_text()) == "line 1\nline 2\nline 3\n"


# --- what is refused -----------------------------------------------------------------------------


def test_all_mistakes_of_a_recipe_come_in_one_answer(served: Served) -> None:
    body = {"data": {"path": "sample:digits"}, "training": {"epochs": 0, "lrr": 1}, "strategi": {}}
    said = problem(served.client.post("/v1/jobs", json=body), 422)
    assert "3 mistakes" in said["detail"] and "lrr" in said["detail"] and "strategi" in said["detail"]
    assert said["class"] == "usage"


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 30_000, 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b'"' + b"x" * 70_000 + b'"', 413, "more than 65,536 bytes"),
        (b"[]", 422, "not an object"),
        (b"null", 422, "not an object"),
        (b"{}", 422, "no data was named"),
        (b'{"data": {"path": "dataset:none"}}', 404, "no data set"),
        (b'{"data": {"path": "sample:none"}}', 422, "no sample"),
        (b'{"data": {"path": "/etc"}}', 422, "no path below a folder"),
        (b'{"data": {"path": "../../etc"}}', 422, "no path below a folder"),
        (
            b'{"data": {"path": "sample:digits"}, "backbone": {"weights": "/etc/passwd"}}',
            422,
            "no path below",
        ),
        (
            b'{"data": {"path": "sample:digits"}, "backbone": {"name": "local-dir:/etc"}}',
            422,
            "no path below",
        ),
        (b'{"data": {"path": "sample:digits"}, "backbone": {"name": "job:none"}}', 404, "no job"),
        (b'{"data": {"path": "sample:digits", "follow_links": true}}', 422, "any file of the server"),
        (b'{"data": {"path": "sample:digits", "image_root": "/etc"}}', 422, "no path below"),
    ],
)
def test_bodies_that_are_refused(served: Served, body: bytes, status: int, words: str) -> None:
    answer = served.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert words in problem(answer, status)["detail"]
    assert served.client.get("/v1/jobs").json()["jobs"] == []


def test_data_by_path_only_from_the_roots_and_not_by_a_link(served: Served, tmp_path: Path) -> None:
    (tmp_path / "data" / "ants").mkdir()
    (tmp_path / "data" / "out").symlink_to("/etc")
    good = served.client.post("/v1/jobs", json={"data": {"path": str(tmp_path / "data" / "ants")}})
    assert good.status_code == 201
    for path in (tmp_path / "data" / "out", tmp_path / "data" / "none", tmp_path / "data" / ".." / "store"):
        said = problem(served.client.post("/v1/jobs", json={"data": {"path": str(path)}}), 422)
        assert "no path below a folder that this server gives to jobs" in said["detail"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "path", ["/v1/jobs/x", "/v1/jobs/x/events", "/v1/jobs/x/logs", "/v1/jobs/x/artifacts", "/x"]
)
def test_unknown_ids_and_paths(served: Served, path: str) -> None:
    problem(served.client.get(path), 404)


def test_wrong_parameters_and_methods(served: Served) -> None:
    problem(served.client.get("/v1/jobs", params={"limit": 0}), 422)
    problem(served.client.get("/v1/jobs", params={"state": "x"}), 422)
    problem(served.client.put("/v1/jobs"), 405)


def test_an_unexpected_error_shows_no_traceback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret /root/path")

    monkeypatch.setattr(routes, "describe", fail)
    job = served.client.get("/v1/jobs/x")
    assert job.status_code == 404
    made = served.submit.__self__.client.post("/v1/jobs", json=RECIPE)  # type: ignore[attr-defined]
    assert "secret" not in problem(made, 500)["detail"]


# --- who may ask ---------------------------------------------------------------------------------


def test_every_route_demands_the_token(tmp_path: Path) -> None:
    settings = ServiceSettings(tmp_path / "store", token=TOKEN)
    with serving(settings) as server:
        parts = (health, inference, models, data, page, routes)
        every = [
            (route.path, method) for part in parts for route in part.router.routes for method in route.methods
        ]
        assert len(every) > 40
        every += [("/openapi.json", "GET"), ("/nothing", "GET")]
        for path, method in every:
            address = re.sub(r"{.*?}", "x", path)
            for token in (None, "wrong" * 8, TOKEN[:-1], TOKEN + "x"):
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                answer = httpx.request(method, f"{server.client.base_url}{address}", headers=headers)
                assert (answer.status_code != 401) == (address in OPEN), address
        assert server.client.get("/v1/jobs").status_code == 200
        assert httpx.get(f"{server.client.base_url}/v1/jobs").headers["www-authenticate"] == "Bearer"


def test_pages_of_other_sites_and_other_names_are_refused(served: Served) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        problem(served.client.post("/v1/jobs", json=RECIPE, headers=headers), 403)
    own = str(served.client.base_url).rstrip("/")
    assert served.client.post("/v1/jobs", json=RECIPE, headers={"Origin": own}).status_code == 201
    problem(served.client.get("/v1/jobs", headers={"Host": "evil.example"}), 421)


def test_a_client_that_asks_too_often_waits(tmp_path: Path) -> None:
    limits = Limits(requests_per_minute=5, waiting_jobs=1)
    with serving(ServiceSettings(tmp_path / "store", limits=limits)) as server:
        answers = [server.client.get("/v1/healthz") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert answers[-1].headers["retry-after"] == "60"


def test_tokens_cannot_be_guessed_one_after_the_other(tmp_path: Path) -> None:
    settings = ServiceSettings(tmp_path / "store", token=TOKEN, limits=Limits(requests_per_minute=5))
    with serving(settings) as server, httpx.Client(base_url=server.client.base_url) as guesser:
        guesses = [{"Authorization": f"Bearer guess-{number}"} for number in range(4)]
        assert {guesser.get("/v1/jobs", headers=guess).status_code for guess in guesses} == {401}
        assert guesser.post("/login", data={"token": "guess"}).status_code == 401
        assert guesser.post("/login", data={"token": "guess"}).status_code == 429
        assert guesser.get("/v1/jobs", headers={"Authorization": "Bearer guess-5"}).status_code == 429


def test_no_more_jobs_wait_than_allowed(tmp_path: Path) -> None:
    settings = ServiceSettings(tmp_path / "store", limits=Limits(waiting_jobs=1))
    with serving(settings, Scripts({"wait": WAIT})) as server:
        for _ in range(2):
            server.wait(server.submit("wait"), "running")
        server.submit("wait")
        problem(server.client.post("/v1/jobs", json=RECIPE), 429)
        for job in server.client.get("/v1/jobs").json()["jobs"]:
            server.client.post(f"/v1/jobs/{job['id']}/cancel")


def test_health_and_metrics(served: Served) -> None:
    served.wait(served.submit(), "succeeded")
    assert served.client.get("/v1/healthz").json() == {"status": "ok"}
    assert served.client.get("/v1/readyz").json() == {"status": "ready"}
    lines = served.client.get("/v1/metrics").text.splitlines()
    assert 'finetune_jobs{state="succeeded"} 1' in lines and 'finetune_jobs{state="failed"} 0' in lines


def test_the_api_describes_itself(served: Served) -> None:
    described = served.client.get("/openapi.json").json()
    assert {"/v1/jobs", "/v1/jobs/{job}/events", "/v1/healthz"} <= set(described["paths"])
    assert all(one.get("summary") for path in described["paths"].values() for one in path.values())
