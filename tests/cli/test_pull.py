"""``finetune pull`` from a local server that acts as the hub, with and without faults.

The hub's client reads its environment once, so every machine here is a process of its own. Loading torch
takes most of its time, so that it is given several commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save

from tests.hub_server import Fault, Server, serve

ROOT = Path(__file__).parents[2]
CANARY = "Zx9CanaryOfTheMine7"
ENDS = "-- end with "

SCRIPT = """
import json, sys, time
from finetune.cli.app import main

if sys.argv[1] == "at once":
    time.sleep = lambda _: None  # the hub's client would retry for half a minute
for words in json.loads(sys.argv[2]):
    sys.argv[:] = ["finetune", *words]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        print("-- end with", code, file=stream, flush=True)
"""


@dataclass
class Said:
    """The output of one command."""

    code: int
    stdout: str
    stderr: str


@dataclass
class Machine:
    """A home folder, and the servers that it is configured for."""

    home: Path
    endpoint: str

    def variables(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {
            "HF_HOME": str(self.home / "hf"),
            "TORCH_HOME": str(self.home / "torch"),
            "HF_ENDPOINT": self.endpoint,
            "FINETUNE_MIRROR": f"{self.endpoint}/mirror",
        }
        return kept | own | more

    def run(self, *commands: str, waits: str = "at once", **more: str) -> list[Said]:
        words = json.dumps([command.split() for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, waits, words],
            env=self.variables(**more),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        outs, errors = (re.split(rf"{ENDS}(\d+)\n", text) for text in (done.stdout, done.stderr))
        return [
            Said(int(code), out, said)
            for out, code, said in zip(outs[::2], outs[1::2], errors[::2], strict=False)
        ]

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "finetune", *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.variables(), cwd=ROOT, **pipes)

    def files(self) -> list[str]:
        """Return the names of all weights files, finished or partial."""
        kinds = (".incomplete", ".part", ".safetensors", ".bin", ".pth", ".tar")
        paths = (path for path in self.home.rglob("*") if path.is_symlink() or path.is_file())
        return [path.name for path in paths if path.parent.name == "blobs" or path.suffix in kinds]


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def machine(server: Server, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", server.url)


@pytest.fixture(scope="module")
def content() -> bytes:
    torch.manual_seed(0)
    return save(timm.create_model("test_resnet").state_dict())


def on_hub(name: str, file: str = "model.safetensors") -> str:
    return f"/timm/{name}.r160_in1k/resolve/main/{file}"


IJEPA = "vit_huge_patch14_gap_224.in1k_ijepa"
"""One of the few networks whose weights have an address without a hash."""


@pytest.mark.slow
def test_pulled_weights_are_found_later(
    server: Server, machine: Machine, content: bytes, image_folder: Path, tmp_path: Path
) -> None:
    server.files = {on_hub("test_resnet"): content, "/mirror/IN1K-vit.h.14-300e.pth.tar": b"anything"}
    pull, again, absent, refused, broken = machine.run(
        f"pull no_such_network test_resnet efficientnet_b0_gn {IJEPA} --json",
        "pull test_resnet",
        "pull test_vit --offline",
        "pull efficientnet_b0_gn",
        "pull squeezenet1_0 test_resnet",
    )
    unknown, resnet, unpublished, from_mirror = json.loads(pull.stdout)
    assert pull.code == 2  # exit code of the first failure
    assert (unknown["name"], unknown["path"]) == ("no_such_network", None)
    assert "pull no_such_network: there is no network of that name" in unknown["error"]
    assert unknown["error"] in pull.stderr
    assert "no weights were published for it" in unpublished["error"]
    assert (resnet["name"], resnet["was_here"], resnet["error"]) == (
        "timm/test_resnet.r160_in1k",
        False,
        None,
    )
    assert Path(resnet["path"]).read_bytes() == content
    assert Path(resnet["path"]).is_relative_to(machine.home)
    assert Path(from_mirror["path"]).read_bytes() == b"anything"

    assert (again.code, again.stderr) == (0, "")
    size = f"{len(content) / 1e6:.1f} MB"
    assert again.stdout == f"timm/test_resnet.r160_in1k  {resnet['path']}  {size}, here already\n"
    assert absent.code == 78
    assert absent.stderr.startswith("error: pull test_vit: its file model.safetensors")
    assert "offline mode is on" in absent.stderr
    assert not any("test_vit" in asked for asked in server.asked)
    assert refused.code == 2
    assert (broken.code, "404" in broken.stderr) == (78, True)
    assert broken.stdout == again.stdout

    server.stop()
    here, offline, listed, trained = machine.run(
        "pull test_resnet",
        "pull test_vit",
        "backbones --search test_ --json",
        f"run -b test_resnet -d {image_folder} -o {tmp_path / 'run'} -s freeze --epochs 1 --workers 0",
        HF_HUB_OFFLINE="1",
    )
    assert (here.code, here.stdout) == (0, again.stdout)
    assert (offline.code, "offline mode is on" in offline.stderr) == (78, True)
    rows = {row["name"]: row["weights"] for row in json.loads(listed.stdout)}
    assert rows["timm/test_resnet.r160_in1k"] == "here"
    assert rows["timm/test_vit.r160_in1k"] == "download"
    assert trained.code == 0, trained.stderr
    assert resnet["path"] in trained.stderr


FAULTS = {
    "test_resnet": (Fault(breaks_after=60_000, breaks=1), ""),
    "test_byobnet": (Fault(breaks_after=60_000, breaks=2, ranges=False), ""),
    "test_convnext": (Fault(breaks_after=60_000, ranges=False), "the server does not go on where it broke"),
    "test_convnext2": (Fault(breaks_after=0), "peer closed connection"),
    "test_convnext3": (Fault(sha256="ab" * 32), "and should have abababababababab"),
    "test_efficientnet": (Fault(stalls_at=60_000), "timed out"),
    "test_efficientnet_gn": (Fault(status=500), "500 Internal Server Error"),
    "test_efficientnet_ln": (
        Fault(status=503, headers={"Retry-After": "86400"}),
        "503: Service Unavailable, to be asked again in 86,400 s",
    ),
    "test_nfnet": (Fault(status=403), "403 Forbidden"),
    "test_vit": (Fault(status=401, headers={"X-Error-Code": "GatedRepo"}), "access must be asked for"),
    "test_vit2": (Fault(status=401), "401 Unauthorized"),
    "test_vit3": (Fault(status=404, headers={"X-Error-Code": "RepoNotFound"}), "no such repository"),
}
"""A fault of each kind with its message; the first two are recovered from."""


@pytest.mark.slow
def test_every_failure_has_its_message_and_leaves_no_file(
    server: Server, machine: Machine, content: bytes
) -> None:
    server.files = {on_hub(name): content for name in FAULTS}
    server.faults = {on_hub(name): fault for name, (fault, _) in FAULTS.items()}
    machine.endpoint = server.url.replace("//", f"//user:{CANARY}@")
    pull, retried = machine.run(
        f"pull {' '.join(FAULTS)} squeezenet1_0 --json",
        "pull test_convnext3",
        HF_HUB_DOWNLOAD_TIMEOUT="1",
    )
    assert pull.code == 78
    *rows, mirrored = json.loads(pull.stdout)
    for (name, (_, problem)), row in zip(FAULTS.items(), rows, strict=True):
        if not problem:
            assert Path(row["path"]).read_bytes() == content, name
            continue
        assert row["path"] is None, name
        message, _, fix = row["error"].partition("\n")
        assert problem in message and "HF_ENDPOINT" in fix
        assert message.startswith(f"pull {name}: its file model.safetensors")
        assert f"***@{server.url.removeprefix('http://')}/timm/{name}" in message
        assert f"error: {row['error']}\n" in pull.stderr
    said = [line for line in pull.stderr.splitlines() if not line.startswith(("loading torch", "fetching "))]
    assert len(said) == 2 * pull.stderr.count("error: ")
    assert "FINETUNE_MIRROR" in mirrored["error"]
    assert CANARY not in pull.stdout + pull.stderr + retried.stderr

    gets = [asked.partition(" ")[2] for asked in server.asked if asked.startswith("GET")]
    (rest,) = [asked for asked in gets if asked.startswith(f"{on_hub('test_resnet')} ")]
    assert int(rest.rpartition("=")[2].rstrip("-")) > 0.4 * 60_000  # resumed, not restarted
    assert sum(on_hub("test_efficientnet") in asked for asked in gets) <= 7  # retries are limited
    assert sum(on_hub("test_convnext3") in asked for asked in gets) == 2  # a wrong file is downloaded again
    whole = ["model.safetensors", hashlib.sha256(content).hexdigest()]
    assert sorted(machine.files()) == sorted(2 * whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hub", "mirror"])
def test_a_pull_can_be_interrupted(server: Server, machine: Machine, content: bytes, kind: str) -> None:
    """Ctrl-C and SIGTERM give one message and their exit code, and leave no partial file."""
    path, name, number = {
        "hub": (on_hub("test_resnet"), "test_resnet", signal.SIGTERM),
        "mirror": ("/mirror/IN1K-vit.h.14-300e.pth.tar", IJEPA, signal.SIGINT),
    }[kind]
    server.files[path] = content
    server.faults[path] = Fault(stalls_at=60_000)
    process = machine.start("pull", name)
    deadline = time.monotonic() + 150
    while not any(file.endswith((".incomplete", ".part")) for file in machine.files()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    told = [line for line in said.splitlines() if not line.startswith(("loading torch", "fetching "))]
    assert told == ["error: interrupted", "Give the same command again.", f"  finetune pull {name}"]
    assert machine.files() == []
