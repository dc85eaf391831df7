"""``finetune export`` and ``finetune push`` from the command line, on a run of a tiny network."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from finetune.data.dataset import Dataset
from finetune.data.prepare import check_outside
from finetune.errors import EnvironmentFaultError, ExitCode, UsageError
from finetune.exporters import folder
from finetune.exporters.hub import check_push, push_folder
from finetune.exporters.source import open_model
from tests.conftest import Cli, FinishedRun

TOKEN = "hf_" + "abcdefghij" * 3


@pytest.fixture
def run(finished_run: FinishedRun) -> Path:
    return finished_run("full")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.slow
def test_timm_alone_gives_the_runs_predictions(
    cli: Cli, run: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The reference is plain timm: its transform and network, and softmax."""
    output = tmp_path / "out"
    result = cli("export", run, "--format", "timm", "-o", output, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.pop("output") == str(output)
    assert report == json.loads((output / "export.json").read_text())
    assert (report["loads_with"], report["num_images"], report["num_judged"]) == ("timm", 18, 18)
    assert report["top1_identical"]
    assert report["predictions_csv"]["top1_identical"]
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "export.json",
    }
    network = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    rows = pd.read_csv(run / "predictions.csv")
    images = torch.stack([transform(Image.open(image_folder / path)) for path in rows.path])
    temperature = json.loads((output / "config.json").read_text())["finetune"]["temperature"]
    with torch.no_grad():
        found = (network(images) / temperature).softmax(1).numpy()
    assert np.abs(found - rows.filter(like="prob_").to_numpy()).max() < 1e-4
    assert "| `blue` | 12 | 6 |" in (output / "README.md").read_text()


@pytest.mark.slow
def test_onnx_takes_uint8_and_gives_probabilities(
    cli: Cli, run: Path, image_folder: Path, tmp_path: Path
) -> None:
    import onnxruntime

    output = tmp_path / "new" / "out"
    flags = ("--with-preprocessing", "nhwc", "--with-softmax", "--opset", 19)
    result = cli("export", run, "--format", "onnx", "-o", output, *flags, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["opset"] == 19
    assert report["inputs"] == [{"name": "images", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}]
    assert report["outputs"][0]["name"] == "probabilities"
    names = {path.name for path in output.iterdir()}
    assert names == {"model.onnx", "labels.txt", "preprocessing.json", "export.json"}
    steps = json.loads((output / "preprocessing.json").read_text())["before_the_graph"]
    size = steps[1]["shorter_side"]
    rows = pd.read_csv(run / "predictions.csv")
    session = onnxruntime.InferenceSession(output / "model.onnx")
    for path, sure in list(zip(rows.path, rows.confidence, strict=True))[:3]:
        image = Image.open(image_folder / path)
        width = int(size * image.width / image.height)
        image = image.resize((width, size), Image.Resampling.BILINEAR)
        left, top = round((width - 32) / 2), round((size - 32) / 2)
        pixels = np.asarray(image.crop((left, top, left + 32, top + 32)))
        assert session.run(None, {"images": pixels[None]})[0].max() == pytest.approx(sure, abs=1e-4)


@pytest.mark.slow
def test_without_the_data_random_inputs_are_compared(cli: Cli, copy: Path, tmp_path: Path) -> None:
    recipe = (copy / "recipe.yaml").read_text()
    line = next(line for line in recipe.splitlines() if line.strip().startswith("path:"))
    (copy / "recipe.yaml").write_text(recipe.replace(line, f"  path: {tmp_path / 'gone'}"))
    result = cli("export", copy, "--format", "torch-export", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["compared_on"], report["num_judged"], report["predictions_csv"]) == (
        "random inputs",
        0,
        None,
    )
    assert "warning: the run's data" in result.stderr
    assert "compared on random inputs instead of the run's evaluated images" in result.stderr
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert program(torch.zeros(5, 3, 32, 32)).shape == (5, 3)


@pytest.mark.slow
def test_a_model_folder_alone_is_exported(cli: Cli, run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(run / "model", tmp_path / "model")
    result = cli("export", model, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "the model came without a run: compared on random inputs" in result.stderr
    assert "This model came without metrics." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_run_of_a_model_folder_is_found(cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("export", run / "model", "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["compared_on"] == "judged images"


@pytest.mark.slow
def test_an_artefact_with_other_outputs_is_not_kept(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(path: Path, card: Any, network: Any, readme: str) -> None:
        folder.write_model(path, card, network, readme)
        state = load_file(path / "model.safetensors")
        state["fc.bias"][0] += 1.0
        save_file(state, path / "model.safetensors")

    monkeypatch.setattr("finetune.exporters.export.write_model", spoil)
    result = cli("export", run, "-o", tmp_path / "out")
    assert result.exit_code == ExitCode.INTERNAL
    assert "its probabilities differ from the network's by up to 0." in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_predictions_of_another_model_are_detected(cli: Cli, copy: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(copy / "predictions.csv")
    rows["prob_blue"] = rows["prob_blue"] / 2
    rows.to_csv(copy / "predictions.csv", index=False)
    result = cli("export", copy, "-o", tmp_path / "out")
    assert result.exit_code == ExitCode.INTERNAL
    assert "differ from those of the run's predictions.csv by up to" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_table_of_other_classes_is_not_compared(cli: Cli, copy: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(copy / "predictions.csv")
    rows.rename(columns={"prob_blue": "prob_red", "prob_red": "prob_blue"}).to_csv(
        copy / "predictions.csv", index=False
    )
    result = cli("export", copy, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["num_judged"], report["predictions_csv"]) == (18, None)
    assert "warning: predictions.csv holds no probabilities of the model's 3 classes in" in result.stderr
    rows.rename(columns={"path": "file"}).to_csv(copy / "predictions.csv", index=False)
    result = cli("export", copy, "-o", tmp_path / "two")
    assert (result.exit_code, "there is no column path" in result.stderr) == (ExitCode.DATA, True)
    assert not (tmp_path / "two").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_an_unfinished_run_is_refused(cli: Cli, copy: Path, tmp_path: Path, state: str) -> None:
    """Its model is that of an earlier attempt, or missing."""
    outcome = json.loads((copy / "outcome.json").read_text())
    (copy / "outcome.json").write_text(json.dumps(outcome | {"state": state}))
    for place in (copy, copy / "model"):
        result = cli("export", place, "-o", tmp_path / "out")
        assert result.exit_code == ExitCode.DATA
        assert f"the run is not finished ({state})" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def own_data(copy: Path, image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run's images, for a test that changes them."""
    data = shutil.copytree(image_folder, tmp_path / "pictures")
    repoint(copy, data)
    return data


def repoint(run: Path, data: Path) -> None:
    recipe = (run / "recipe.yaml").read_text()
    line = next(line for line in recipe.splitlines() if line.strip().startswith("path:"))
    (run / "recipe.yaml").write_text(recipe.replace(line, f"  path: {data}"))


@pytest.mark.slow
def test_folders_added_to_the_data_do_not_prevent_the_comparison(
    cli: Cli, copy: Path, own_data: Path, tmp_path: Path
) -> None:
    """An empty class folder would be refused by a run; the evaluated images are unchanged."""
    (own_data / "train" / "yellow").mkdir()
    result = cli("export", copy, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["compared_on"] == "judged images"
    assert "warning" not in result.stderr
    result = cli("export", copy, "-o", own_data / "out")
    assert (result.exit_code, "it lies in the data" in result.stderr) == (ExitCode.USAGE, True)


@pytest.mark.slow
def test_data_in_a_table_or_an_archive_are_found(copy: Path, own_data: Path, tmp_path: Path) -> None:
    (own_data / "images.csv").touch()
    repoint(copy, own_data / "images.csv")
    images = open_model(copy).images
    assert isinstance(images, Dataset)
    assert (images.root, images.is_folder, len(images.samples)) == (own_data, False, 54)
    check_outside(tmp_path / "out", images)
    with pytest.raises(UsageError, match="it lies in the data"):
        check_outside(own_data / "val" / "out", images)
    (own_data / "images.csv").unlink()
    repoint(copy, Path(shutil.make_archive(str(tmp_path / "packed"), "zip", own_data)))
    images = open_model(copy).images
    assert isinstance(images, Dataset)
    assert all(images.file(sample).is_file() for sample in images.samples)
    (tmp_path / "packed.zip").write_bytes(b"nothing")
    assert "not a zip archive" in str(open_model(copy).images)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["x/..", "x/../../link"])
def test_the_working_directory_and_a_link_may_be_the_output(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    for name in ("here", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "here")
    result = cli("export", run, "-o", output)
    assert result.exit_code == 0, result.output
    filled = "empty" if "link" in output else "here"
    assert "export.json" in {path.name for path in (tmp_path / filled).iterdir()}
    assert sorted(len(list((tmp_path / name).iterdir())) for name in ("here", "empty")) == [0, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"here", "empty", "link"}


@pytest.mark.slow
def test_sigterm_leaves_no_files(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        assert any(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)  # a failure must not end the other tests
    monkeypatch.setattr("finetune.exporters.export.predict_fresh", stop)
    try:
        result = cli("export", run, "-o", tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == ExitCode.INTERRUPTED, result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "onxx"), "the format is unknown; did you mean 'onnx'?"),
        (("--format", "timm", "--with-softmax"), "timm's format holds weights"),
        (("--format", "timm", "--with-preprocessing", "nchw"), "timm's format holds weights"),
        (("--format", "torch-export", "--opset", 18), "--format torch-export has no opset"),
        (("--format", "onnx", "--opset", 12), "torch's exporter does not support it"),
        (("--format", "onnx", "--with-preprocessing", "chw"), "the image layout is unknown"),
    ],
)
def test_invalid_options_are_refused(
    cli: Cli, run: Path, tmp_path: Path, words: tuple[Any, ...], said: str
) -> None:
    result = cli("export", run, "-o", tmp_path / "out", *words)
    assert result.exit_code == ExitCode.USAGE
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_damaged_models_are_refused(cli: Cli, copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "model" / "config.json").read_text())
    del config["finetune"]["sha256"]
    (copy / "model" / "config.json").write_text(json.dumps(config | {"num_classes": 4}))
    result = cli("export", copy, "-o", tmp_path / "out")
    assert result.exit_code == ExitCode.USAGE, result.output
    assert "its weights do not fit its architecture: " in result.stderr
    (copy / "model" / "model.safetensors").unlink()
    result = cli("export", copy, "-o", tmp_path / "out")
    assert (result.exit_code, "it contains no model" in result.stderr) == (ExitCode.USAGE, True)


def test_invalid_outputs_are_refused(cli: Cli, run: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for words, said in (
        ((run, "-o", tmp_path / "full"), "the folder is not empty"),
        ((run, "-o", tmp_path / "full" / "x"), "it is a file"),
        ((run, "-o", image_folder / "out"), "it lies in the data"),
        ((tmp_path / "no", "-o", tmp_path / "out"), "there is no such folder"),
        ((tmp_path / "full", "-o", tmp_path / "out"), "it contains no model"),
        (("resnet18", "-o", tmp_path / "out"), "there is no such folder"),
    ):
        result = cli("export", *words)
        assert (result.exit_code, said in result.stderr) == (ExitCode.USAGE, True), result.stderr
    assert not (image_folder / "out").exists()
    assert not (tmp_path / "out").exists()


# --- push: against a hub of our own --------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A server with the parts of the hub's API that create a repository and a commit."""

    seen: list[tuple[str, Any]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        type(self).seen.append((self.path, body))
        if self.status != 200:
            self.answer({"error": "no"}, self.status)
        elif self.path == "/api/repos/create":
            assert self.headers["Authorization"] == f"Bearer {TOKEN}"
            name = json.loads(body)
            repo = f"{name.get('organization') or 'me'}/{name['name']}"
            self.answer({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\ntags: ")
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            url = f"http://{self.headers['Host']}/me/ants/commit/{'c' * 40}"
            self.answer({"success": True, "commitOid": "c" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({}, 404)

    def do_GET(self) -> None:
        self.answer({"id": "me/ants", "sha": "d" * 40, "siblings": []})

    def answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *_: Any) -> None:
        """Write no log."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OwnHub", (Hub,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def push(endpoint: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """It runs in a separate process, since the hub's client reads its environment once."""
    command = [sys.executable, "-m", "finetune", "push", *map(str, words)]
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN} | environment
    return subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_push_uploads_the_verified_folder(run: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, handler = hub
    done = push(endpoint, run, "me/ants", "--private", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {"repo_id": "me/ants", "url": f"{endpoint}/me/ants", "commit": "c" * 40}
    created = json.loads(handler.seen[0][1])
    assert (created["name"], created["organization"]) == ("ants", "me")
    assert created.get("private") or created.get("visibility") == "private"
    committed = next(body for path, body in handler.seen if "/commit/" in path)
    lines = [json.loads(line) for line in committed.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {"README.md", "config.json", "model.safetensors", "export.json"}
    assert TOKEN not in done.stdout + done.stderr


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the client's constants, which it has read from the environment already."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n")
    return tmp_path


@pytest.mark.sample(1)
@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the request is not authenticated"),
        (403, "the token has no write access"),
        (404, "the repository or its owner was not found"),
        (418, r"\(418\)"),
    ],
)
def test_refusals_of_the_hub_are_reported(
    model: Path, hub: tuple[str, type[Hub]], monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    endpoint, handler = hub
    handler.status = status
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(EnvironmentFaultError, match=said) as caught:
        push_folder(model, "me/ants", False)
    assert TOKEN not in str(caught.value)
    assert f"pushing to {endpoint}/me/ants" in caught.value.asked


@pytest.mark.usefixtures("online")
def test_a_missing_network_is_reported(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFaultError, match=r"the hub gave no answer \(.+\)"):
        push_folder(model, "me/ants", False)


def test_a_malformed_token_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_geheimschlüssel")
    monkeypatch.setattr("finetune.exporters.hub.offline_by_environment", lambda: False)
    with pytest.raises(EnvironmentFaultError, match="contains a character that is not ASCII") as caught:
        check_push("me/ants")
    assert "geheim" not in str(caught.value)


def test_offline_mode_and_invalid_names_are_refused_first(cli: Cli, tmp_path: Path) -> None:
    result = cli("push", tmp_path, "me/ants")  # tests run offline
    assert result.exit_code == ExitCode.ENVIRONMENT
    assert "offline mode is on (HF_HUB_OFFLINE)" in result.stderr
    result = cli("push", tmp_path, "a/b/c")
    assert result.exit_code == ExitCode.USAGE
    assert "'a/b/c' is not a valid name of a hub repository" in result.stderr


@pytest.mark.sample(1)
@pytest.mark.parametrize("damage", [{"intervals": 3}, {"most_confused": [5]}, {"classes_not_judged": -5}])
def test_damaged_metrics_leave_the_card_without_metrics(
    cli: Cli, copy: Path, tmp_path: Path, damage: dict[str, object]
) -> None:
    path = copy / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    result = cli("export", copy, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "the model card has no metrics" in " ".join(result.stderr.split())
    assert "Model card" in (tmp_path / "out/README.md").read_text("utf-8")
