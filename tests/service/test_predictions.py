"""Predictions of a real model in a process of its own, over our API and over the Open Inference Protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.service.predictions.hosts import ModelHosts
from finetune.service.predictions.serving import ModelHost, ModelProcess, Picture
from finetune.service.settings import ServiceSettings
from finetune.service.work import dispatcher
from tests.cli.test_labels import draw_tables
from tests.conftest import FinishedRun
from tests.service.servers import Scripts, Served, serving
from tests.service.test_api import problem


@pytest.fixture(scope="module")
def model(finished_run: FinishedRun) -> Path:
    return finished_run("freeze") / "model"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, made = tmp_path_factory.mktemp("images"), []
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        made.append(folder / f"{number}.png")
        Image.fromarray(noise).save(made[-1])
    return made


@pytest.fixture(scope="module")
def served(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    before, dispatcher.TICK = dispatcher.TICK, 0.02
    scripts = Scripts({"run": f"cp -r {finished_run('freeze')}/. $OUT"})
    with serving(ServiceSettings(tmp_path_factory.mktemp("served") / "store"), scripts) as server:
        job = server.submit("run")
        server.wait(job, "succeeded")
        assert server.client.put("/v1/models/colours", json={"job": job}).json()["version"] == 1
        yield server
    dispatcher.TICK = before


def expected(model: Path, images: list[Path]) -> list[Any]:
    return finetune.load(model).predict(images)


@pytest.mark.slow
def test_files_and_base64_get_the_probabilities_of_the_library(
    served: Served, model: Path, images: list[Path]
) -> None:
    files = [("image", (path.name, path.read_bytes())) for path in images]
    texts = [base64.b64encode(path.read_bytes()).decode() for path in images]
    answers = [
        served.client.post("/v1/models/colours/predict", files=files, params={"top": 2}),
        served.client.post("/v1/models/colours/predict", json={"images": texts}, params={"top": 2}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"]["version"] == 1
        for found, wanted in zip(answer.json()["predictions"], expected(model, images), strict=True):
            assert found["label"] == wanted.label and not found["rejected"]
            assert found["confidence"] == pytest.approx(wanted.confidence, abs=1e-5)
            assert [one["label"] for one in found["top"]] == [label for label, _ in wanted.top(2)]


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_said_and_the_others_are_answered(
    served: Served, images: list[Path]
) -> None:
    files = [("image", ("a", images[0].read_bytes())), ("image", ("b", b"hello")), ("image", ("c", b""))]
    first, second, third = served.client.post("/v1/models/colours/predict", files=files).json()["predictions"]
    assert first["label"] and "not an image" in second["fault"] and "empty file" in third["fault"]
    rejected = served.client.post("/v1/models/colours/predict", files=files[:1], params={"reject_below": 1})
    assert rejected.json()["predictions"][0]["rejected"]


def test_a_heat_map_is_drawn_or_left_out_with_the_reason(served: Served, images: list[Path]) -> None:
    files = [("image", ("a", images[0].read_bytes())), ("image", ("b", b"hello"))]
    answer = served.client.post(
        "/v1/models/colours/predict", files=files, params={"heat_map": True}, timeout=120
    )
    found, fault = answer.json()["predictions"]
    if found["heat_map"] is None:
        assert found["heat_map_missing"]
    else:
        assert Image.open(io.BytesIO(base64.b64decode(found["heat_map"]))).format == "JPEG"
    assert "heat_map" not in fault and fault["fault"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{}", 422, "it has 0 images"),
        (b'{"images": []}', 422, "it has 0 images"),
        (b'{"images": ["?"]}', 422, "no base64"),
        (b'{"images": [1]}', 422, "no base64"),
        (b"[]", 422, "it has 0 images"),
        (b"x", 400, "no JSON"),
        (json.dumps({"images": [""] * 65}).encode(), 422, "it has 65 images"),
    ],
)
def test_predictions_that_are_refused(served: Served, body: bytes, status: int, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = served.client.post("/v1/models/colours/predict", content=body, headers=headers)
    assert words in problem(answer, status)["detail"]


def test_models_that_are_refused(served: Served) -> None:
    problem(served.client.get("/v1/models/none"), 404)
    problem(served.client.post("/v1/models/none/predict", json={"images": ["aGk="]}), 404)
    problem(served.client.put("/v1/models/colours", json={}), 422)
    problem(served.client.put("/v1/models/colours", json={"job": "none"}), 404)
    for name in ("Ä", "A", "..", "x" * 64, "a b"):
        problem(served.client.put(f"/v1/models/{name}", json={"job": "x"}), 422 if name != ".." else 404)
    served.scripts.scripts["fail"] = "exit 65"
    failed = served.submit("fail")
    served.wait(failed, "failed")
    problem(served.client.put("/v1/models/colours", json={"job": failed}), 409)


@pytest.mark.slow
def test_a_new_version_takes_over_without_a_lost_request(served: Served, images: list[Path]) -> None:
    content, stop, versions, failures = images[0].read_bytes(), threading.Event(), set[int](), list[str]()

    def ask() -> None:
        with httpx.Client(base_url=served.client.base_url, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/v1/models/colours/predict", files={"image": ("x", content)})
                if answer.status_code == 200 and "label" in answer.json()["predictions"][0]:
                    versions.add(answer.json()["model"]["version"])
                else:
                    failures.append(answer.text)

    before = served.client.get("/v1/models/colours").json()["version"]
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        job = served.submit("run")
        served.wait(job, "succeeded")
        assert served.client.put("/v1/models/colours", json={"job": job}).json()["version"] == before + 1
        assert served.client.put("/v1/models/colours", json={"job": job}).json()["version"] == before + 1
        deadline = time.monotonic() + 60
        while before + 1 not in versions:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stop.set()
        for one in asking:
            one.result()
    assert not failures and before + 1 in versions
    assert served.client.delete(f"/v1/jobs/{job}").status_code == 204  # the model stays
    assert served.client.post("/v1/models/colours/predict", files={"i": ("x", content)}).status_code == 200


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again(model: Path, images: list[Path], tmp_path: Path) -> None:
    host = ModelHost(model, tmp_path / "log", wait=0.2)
    picture = Picture(images[0].read_bytes())
    try:
        [first] = [one.result(60) for one in host.submit([picture])]
        os.kill(host._process._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        again = [one.result(120) for one in host.submit([picture, picture])]
        assert again[0] == again[1] and again[0]["probabilities"] == pytest.approx(first["probabilities"])
    finally:
        host.close()


@pytest.mark.slow
def test_a_host_that_was_closed_meanwhile_loses_no_request(
    model: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed, good = ModelHost(model, tmp_path / "log"), ModelHost(model, tmp_path / "log")
    closed.close()
    hosts, found = ModelHosts(None, None), [closed, good]  # type: ignore[arg-type]
    monkeypatch.setattr(hosts, "find", lambda _: (None, found.pop(0)))
    try:
        _, host, [answer] = hosts.submit("x", [Picture(images[0].read_bytes())])
        assert host is good and "probabilities" in answer.result(60)
    finally:
        good.close()


@pytest.mark.slow
def test_an_image_that_ends_the_process_costs_its_own_request_only(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ModelProcess.compute

    def crash(self: ModelProcess, pictures: list[Picture]) -> Any:
        if any(one.content == b"bomb" for one in pictures):
            self._process.kill()
        return compute(self, pictures)

    monkeypatch.setattr(ModelProcess, "compute", crash)
    host = ModelHost(model, tmp_path / "log", wait=0.5)
    try:
        waiting = host.submit(
            [Picture(images[0].read_bytes()), Picture(b"bomb"), Picture(images[1].read_bytes())]
        )
        first, bomb, last = [one.result(180) for one in waiting]
        assert (
            "probabilities" in first and "probabilities" in last and "ended over this image" in bomb["fault"]
        )
    finally:
        host.close()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    from finetune.errors import EnvironmentFaultError

    (tmp_path / "model").mkdir()
    with pytest.raises(EnvironmentFaultError, match=r"no config\.json"):
        ModelHost(tmp_path / "model", tmp_path / "log")


# --- the Open Inference Protocol -------------------------------------------------------------------


@pytest.mark.slow
def test_a_public_client_speaks_to_it(served: Served, model: Path, images: list[Path]) -> None:
    http = pytest.importorskip("tritonclient.http")
    address = str(served.client.base_url).removeprefix("http://").rstrip("/")
    client = http.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("colours")
    assert client.get_server_metadata()["name"] == "finetune"
    described = client.get_model_metadata("colours")
    assert {one["name"] for one in described["outputs"]} == {"probabilities", "labels"}
    pixels = np.stack([np.asarray(Image.open(path)) for path in images])
    files = np.array([path.read_bytes() for path in images], dtype=object)
    wanted = expected(model, images)
    for values, kind in ((pixels, "UINT8"), (files, "BYTES")):
        for is_binary in (True, False) if kind == "UINT8" else (True,):
            tensor = http.InferInput("images", list(values.shape), kind)
            tensor.set_data_from_numpy(values, binary_data=is_binary)
            outputs = [
                http.InferRequestedOutput(name, binary_data=is_binary) for name in ("probabilities", "labels")
            ]
            answer = client.infer("colours", [tensor], outputs=outputs, request_id="7")
            found = answer.as_numpy("probabilities")
            assert found.dtype == np.float32
            assert np.allclose(found, [one.values for one in wanted], atol=1e-5)
            labels = [
                text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("labels")
            ]
            assert labels == [one.label for one in wanted]
            assert answer.get_response()["id"] == "7"


def infer(served: Served, **tensor: Any) -> httpx.Response:
    given = {"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12} | tensor
    return served.client.post("/v2/models/colours/infer", json={"inputs": [given]})


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"name": "x"}, "must be called images"),
        ({"shape": [1, 2, 2, 4]}, "another type or shape"),
        ({"shape": [0, 2, 2, 3]}, "no list of lengths"),
        ({"shape": "x"}, "no list of lengths"),
        ({"shape": [65, 2, 2, 3]}, "65 images"),
        ({"shape": [1, 2, 3, 3]}, "12 values came, and not 18"),
        ({"data": [0.5] * 12}, "no whole numbers"),
        ({"data": [256] * 12}, "no whole numbers"),
        ({"data": None}, "no whole numbers"),
        ({"datatype": "FP32"}, "another type or shape"),
        ({"datatype": "BYTES", "shape": [1], "data": ["?"]}, "no base64"),
        ({"datatype": "BYTES", "shape": [2], "data": ["aGk="]}, "1 texts came, and not 2"),
        ({"datatype": "BYTES", "shape": [1], "data": ["aGk="]}, "image 0 cannot be read"),
        ({"parameters": {"binary_data_size": 12}}, "0 bytes follow, and not 12"),
    ],
)
def test_tensors_that_are_refused(served: Served, tensor: dict[str, Any], words: str) -> None:
    assert words in problem(infer(served, **tensor), 400)["detail"]


def test_bodies_of_inference_that_are_refused(served: Served) -> None:
    for content in (b"x", b"[]", b"{}", b'{"inputs": 3}'):
        problem(served.client.post("/v2/models/colours/infer", content=content), 400)
    good = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12}]}
    answer = served.client.post("/v2/models/colours/infer", json=good | {"outputs": [{"name": "x"}]})
    assert "no output x" in problem(answer, 400)["detail"]
    assert served.client.post("/v2/models/colours/infer", json=good).status_code == 200


def test_an_image_of_exif_is_turned_as_in_training(served: Served, model: Path, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    answer = served.client.post("/v1/models/colours/predict", files={"i": ("x", buffer.getvalue())}).json()
    [wanted] = expected(model, [tmp_path / "x.png"])
    assert answer["predictions"][0]["confidence"] == pytest.approx(wanted.confidence, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi", "number"])
def test_models_of_other_labels_are_served(kind: str, tiny: Path, tmp_path: Path) -> None:
    table = draw_tables(tmp_path / "tables") / f"{kind}.csv"
    finetune.run(
        backbone=str(tiny),
        data=str(table),
        strategy="full",
        epochs=2,
        workers=0,
        output=str(tmp_path / "run"),
    )
    scripts = Scripts({"run": f"cp -r {tmp_path / 'run'}/. $OUT"})
    images = [table.parent / f"{number}.png" for number in range(3)]
    with serving(ServiceSettings(tmp_path / "store"), scripts) as server:
        job = server.submit("run")
        server.wait(job, "succeeded")
        assert server.client.put("/v1/models/it", json={"job": job}).json()["version"] == 1
        files = [("image", (path.name, path.read_bytes())) for path in images]
        answer = server.client.post(
            "/v1/models/it/predict", files=files, params={"heat_map": True}, timeout=120
        )
        assert answer.status_code == 200, answer.text
        body = {"inputs": [_encode_files(images)]}
        inferred = server.client.post("/v2/models/it/infer", json=body)
        assert inferred.status_code == 200, inferred.text
    outputs = {one["name"]: one["data"] for one in inferred.json()["outputs"]}
    for found, wanted, label in zip(
        answer.json()["predictions"], expected(tmp_path / "run", images), outputs["labels"], strict=True
    ):
        assert "heat_map" in found
        if kind == "number":
            assert found["value"] == pytest.approx(wanted.values[0], abs=1e-3) and "top" not in found
            assert float(label) == pytest.approx(wanted.values[0], abs=1e-3)
        else:
            assert found["label"] == wanted.label == label and found["confidence"] is None
            assert {one["label"]: one["probability"] for one in found["top"]} == pytest.approx(
                wanted.probabilities, abs=1e-4
            )


def _encode_files(images: list[Path]) -> dict[str, Any]:
    contents = [base64.b64encode(path.read_bytes()).decode() for path in images]
    return {"name": "images", "datatype": "BYTES", "shape": [len(images)], "data": contents}
