"""Weights by name come over a real connection into the libraries' caches, or are refused at once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file

from finetune.errors import EnvironmentFaultError
from finetune.system.signals import StopSignal
from pretrained import hub as module
from pretrained.catalog import Card, find_card
from pretrained.config import MAX_CONFIG_BYTES
from pretrained.weights import find_cached, find_weights
from tests.hub_server import COMMIT, Fault, Server, serve


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


# --- torchvision, through a mirror ---------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Torch's cache, empty, in a process that may use the network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("FINETUNE_MIRROR", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def content() -> bytes:
    torch.manual_seed(0)
    return save(timm.create_model("test_resnet").state_dict())


def card_of(content: bytes, name: str = "tiny") -> Card:
    digest = hashlib.sha256(content).hexdigest()[:8]
    card = find_card("torchvision/squeezenet1_1")
    return replace(card, location=f"https://download.invalid/models/{name}-{digest}.pth")


def test_a_mirror_then_the_cache(
    server: Server, online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(content)
    name = card.location.rpartition("/")[2]
    server.files[f"/mirror/{name}"] = content
    monkeypatch.setenv("FINETUNE_MIRROR", f"{server.url}/mirror/")
    assert find_cached(card) is None
    path = find_weights(card)
    assert path == online / name == find_cached(card)
    assert path.read_bytes() == content
    server.stop()
    assert find_weights(card) == find_weights(card, offline=True) == path
    assert server.asked == [f"GET /mirror/{name}"]


@pytest.mark.parametrize(
    ("sent", "problem"), [(b"another file", "invalid hash value"), (b"", "invalid hash value"), (None, "404")]
)
def test_what_is_not_the_file_leaves_nothing(
    server: Server,
    online: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes | None,
    problem: str,
) -> None:
    card = card_of(content)
    name = card.location.rpartition("/")[2]
    server.files |= {} if sent is None else {f"/{name}": sent}
    monkeypatch.setenv("FINETUNE_MIRROR", server.url)
    with pytest.raises(EnvironmentFaultError) as caught:
        find_weights(card)
    message = str(caught.value)
    assert problem in message
    for part in (name, f"{server.url}/{name}", str(online / name), "FINETUNE_MIRROR", "--weights FILE"):
        assert part in message
    assert caught.value.exit_code == 78
    assert list(online.iterdir()) == []


def test_a_silent_mirror_ends_at_the_timeout(
    silent: str, online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_MIRROR", silent)
    monkeypatch.setattr(module, "NETWORK_TIMEOUT_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(EnvironmentFaultError, match="timed out"):
        find_weights(card_of(content))
    assert time.monotonic() - began < 3
    assert socket.getdefaulttimeout() is None
    assert list(online.iterdir()) == []


def download(card: Card) -> None:
    with StopSignal():
        find_weights(card)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_download_that_was_ended_is_made_again(
    server: Server, online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What was received is not used, and does not stay in the cache."""
    card = card_of(content)
    name = card.location.rpartition("/")[2]
    server.files[f"/{name}"] = content
    server.faults[f"/{name}"] = Fault(pause=0.05, piece=1000)
    monkeypatch.setenv("FINETUNE_MIRROR", server.url)
    process = multiprocessing.get_context("fork").Process(target=download, args=(card,))
    process.start()
    while not [part for part in online.glob("*.part") if part.stat().st_size]:
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, number)
    process.join(20)
    assert len(list(online.iterdir())) == (number == signal.SIGKILL)
    server.faults.clear()
    path = find_weights(card)
    assert path.read_bytes() == content
    assert list(online.iterdir()) == [path]


def test_only_what_killed_downloads_have_left_is_removed(tmp_path: Path, content: bytes) -> None:
    """A process that still downloads the same file has written to its own part since this one began."""
    digest, began = hashlib.sha256(content).hexdigest(), time.time()
    blobs, pointer = tmp_path / "blobs", tmp_path / "snapshots" / COMMIT / "model.safetensors"
    blobs.mkdir()
    pointer.parent.mkdir(parents=True)
    (blobs / digest).write_bytes(content)
    pointer.symlink_to(f"../../blobs/{digest}")
    for name, age in (("killed", 5.0), ("living", -5.0)):
        part = blobs / f"{digest}.{name}.incomplete"
        part.write_bytes(content[:100])
        os.utime(part, (began - age, began - age))
    other = blobs / f"{'0' * 64}.killed.incomplete"  # of another file, which nobody has downloaded since
    other.write_bytes(b"")
    os.utime(other, (0, 0))
    assert module._verify(pointer, began) == pointer
    assert {path.name for path in blobs.iterdir()} == {digest, f"{digest}.living.incomplete", other.name}


@pytest.mark.parametrize("mirror", ["no url at all", "http://127.0.0.1:9", "http://[", "ftp:"])
def test_a_useless_mirror(online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, mirror: str) -> None:
    monkeypatch.setenv("FINETUNE_MIRROR", mirror)
    with pytest.raises(EnvironmentFaultError, match="FINETUNE_MIRROR"):
        find_weights(card_of(content))


def test_a_server_that_speaks_no_http(online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-server\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("FINETUNE_MIRROR", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(EnvironmentFaultError, match=r"the download from .+ failed"):
            find_weights(card_of(content))


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_offline_asks_nobody(
    server: Server, online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    card = card_of(content)
    server.files[f"/{card.location.rpartition('/')[2]}"] = content
    monkeypatch.setenv("FINETUNE_MIRROR", server.url)
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentFaultError, match="offline mode is on"):
        find_weights(card, offline=by == "flag")
    assert server.asked == []


def test_only_a_hash_in_a_name_is_a_hash(
    server: Server, online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I-JEPA's files end in ``-600e.pth.tar``."""
    card = replace(card_of(content), location="https://download.invalid/IN22K-vit.g.16-600e.pth.tar")
    server.files["/IN22K-vit.g.16-600e.pth.tar"] = content
    monkeypatch.setenv("FINETUNE_MIRROR", server.url)
    assert find_weights(card).read_bytes() == content


# --- the hub, in a process of its own: its client reads the environment once ----------------------

SCRIPT = """
import json, sys, time
import torch
torch.set_num_threads(1)
from finetune.errors import FinetuneError
from pretrained import hub
from pretrained.backbone import load_backbone
from pretrained.catalog import find_card

hub.NETWORK_TIMEOUT_SECONDS = 0.5
for name, offline in json.loads(sys.argv[1]):
    began = time.monotonic()
    try:
        card = find_card(name, offline)
        backbone = load_backbone(card, classes=["a", "b"], offline=offline)
        answer = {"match": str(backbone.match), "architecture": card.architecture}
    except FinetuneError as error:
        answer = {"error": str(error), "exit_code": int(error.exit_code)}
    print(json.dumps(answer | {"seconds": time.monotonic() - began}), flush=True)
"""


def ask(home: Path, endpoint: str, *requests: tuple[str, bool], **environment: str) -> list[dict[str, Any]]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(requests)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_hub_then_its_cache_then_offline(server: Server, tmp_path: Path, content: bytes) -> None:
    config = {"architecture": "test_resnet.mine", "num_classes": 1000, "pretrained_cfg": {"tag": "mine"}}
    mine = "/org/name/resolve/main"
    server.files = {
        "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors": content,
        f"{mine}/config.json": json.dumps(config).encode(),
        f"{mine}/model.safetensors": content,
    }
    # The first answers come from the server, the others from the cache or from nowhere.
    first, mine_first, absent, cached, mine_cached, refused = ask(
        tmp_path,
        server.url,
        ("test_resnet", False),
        ("hf-hub:org/name", False),
        ("hf-hub:org/other", False),
        ("test_resnet", True),
        ("hf-hub:org/name", True),
        ("hf-hub:org/third", True),
    )
    assert "2 replaced" in first["match"]
    assert str(tmp_path) in first["match"]
    assert mine_first["architecture"] == "test_resnet"
    assert mine_first["match"].partition(";")[0] == first["match"].partition(";")[0]
    assert "config.json" in absent["error"]
    assert absent["exit_code"] == 78
    assert (cached["match"], mine_cached["match"]) == (first["match"], mine_first["match"])
    assert "offline mode is on" in refused["error"]
    assert not any("third" in asked for asked in server.asked)
    assert not any("/api/" in asked for asked in server.asked)  # nothing but the files: no telemetry
    gets = [
        asked for asked in server.asked if asked.endswith((".json", ".safetensors")) and asked[:3] == "GET"
    ]
    assert sorted(gets) == [f"GET {path}" for path in sorted(server.files)]
    server.stop()
    again, unknown = ask(
        tmp_path, server.url, ("test_resnet", False), ("test_vit", False), HF_HUB_OFFLINE="1"
    )
    assert again["match"] == first["match"]
    assert "offline mode is on" in unknown["error"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_pull_that_was_ended_is_given_again(
    server: Server, tmp_path: Path, content: bytes, number: int
) -> None:
    server.files["/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"] = content
    server.faults |= {path: Fault(pause=0.05, piece=4096) for path in server.files}
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}
    command = [sys.executable, "-m", "finetune", "pull", "test_resnet"]
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    while not [part for part in tmp_path.rglob("*.incomplete") if part.stat().st_size]:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 75), said
    server.faults.clear()
    again = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nobody there", "silent"])
def test_no_network_is_said_at_once(silent: str, tmp_path: Path, kind: str) -> None:
    endpoint = silent if kind == "silent" else "http://127.0.0.1:9"
    by_name, by_id = ask(tmp_path, endpoint, ("test_resnet", False), ("hf-hub:org/name", False))
    for answer, file in ((by_name, "model.safetensors"), (by_id, "config.json")):
        assert answer["exit_code"] == 78
        assert answer["seconds"] < 8
        for part in (file, endpoint, str(tmp_path / "hub"), "HF_ENDPOINT"):
            assert part in answer["error"]
    assert "timm/test_resnet.r160_in1k" in by_name["error"]
    assert "--weights FILE" in by_name["error"]
    assert "--backbone hf-hub:org/name" in by_id["error"]


def test_a_wrong_file_of_the_shared_store_is_removed_and_a_right_one_kept(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client may keep a file once for all repositories, under a hash of another kind."""
    from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

    for name, right in (("right", True), ("wrong", False)):
        repo = tmp_path / f"models--org--{name}"
        digest = hashlib.sha256(content if right else b"what should have come").hexdigest()
        blob, pointer = repo / "blobs" / digest, repo / "snapshots" / COMMIT / "model.safetensors"
        blob.parent.mkdir(parents=True)
        pointer.parent.mkdir(parents=True)
        blob.write_bytes(content)
        other_hash = hashlib.sha256(name.encode()).hexdigest()
        assert publish_blob_to_shared_store(
            blob_path=blob, xet_hash=other_hash, cache_dir=tmp_path, expected_size=len(content)
        )
        pointer.symlink_to(f"../../blobs/{digest}")
        shared = pointer.resolve()
        assert shared.name == other_hash
        if right:
            assert module._verify(pointer, 0.0) == pointer
            assert pointer.read_bytes() == content
        else:
            assert "it was removed" in str(module._verify(pointer, 0.0))
            assert not any(path.exists() or path.is_symlink() for path in (pointer, blob, shared))


def test_a_file_put_where_the_message_says_is_found(online: Path, content: bytes) -> None:
    card = card_of(content)
    with pytest.raises(EnvironmentFaultError) as caught:
        find_weights(card, offline=True)
    place = Path(caught.value.fix.removeprefix("Put the file at ").partition(", or give")[0])
    place.parent.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, place)
    assert find_weights(card, offline=True) == place


# --- files without an end ------------------------------------------------------------------------


@pytest.fixture
def hub_of(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of the hub's client, empty; the server is the hub."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_config_without_an_end_is_not_received(server: Server, hub_of: Path) -> None:
    name = "/org/name/resolve/main/config.json"
    server.files[name], server.faults[name] = b"{" * 2**20, Fault(endless=True, sha256="a" * 40)
    blobs = hub_of / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for part, size in (("begun", 9), ("weights", 2 * MAX_CONFIG_BYTES), ("config", MAX_CONFIG_BYTES + 1)):
        (blobs / f"{part}.incomplete").touch()
        os.truncate(blobs / f"{part}.incomplete", size)
    with pytest.raises(EnvironmentFaultError, match="a file without an end, and no such file has more than"):
        find_card("hf-hub:org/name")
    assert sorted(part.stem for part in blobs.iterdir()) == ["begun", "weights"]


def test_a_config_that_is_too_large_is_not_received(server: Server, hub_of: Path) -> None:
    server.files["/org/name/resolve/main/config.json"] = b"{" * (MAX_CONFIG_BYTES + 1)
    with pytest.raises(EnvironmentFaultError, match="the server sends 16,777,217 bytes"):
        find_card("hf-hub:org/name")
    assert not [path for path in hub_of.rglob("*") if path.name.endswith(("incomplete", "config.json"))]


def test_weights_without_an_end_are_not_received(
    server: Server, online: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(content)
    path = f"/{card.location.rpartition('/')[2]}"
    server.files[path], server.faults[path] = content, Fault(endless=True)
    monkeypatch.setenv("FINETUNE_MIRROR", server.url)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 2**24)
    with pytest.raises(EnvironmentFaultError, match="a file without an end"):
        find_weights(card)
    assert list(online.iterdir()) == []
