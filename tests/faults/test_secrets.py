"""A canary in every place that holds secrets: it may be used, and is found nowhere afterwards."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune.errors import InternalError, sanitize

CANARY = "Zx9CanaryOfTheMine7"
USERINFO = f"user:{CANARY}@"
FORMS = (
    CANARY,
    base64.b64encode(f"user:{CANARY}".encode()).decode(),
    base64.b64encode(CANARY.encode()).decode().rstrip("="),
)
"""The canary as it is, in a header of HTTP, and encoded alone."""

SCRIPT = """
import json, sys, time
import finetune.pipeline.run as job
from finetune.cli.app import main

address, token, commands = sys.argv[1:]
time.sleep = lambda _: None  # the hub's client tries again for half a minute

def fail(*_, **__):
    raise RuntimeError(f"no answer of {address} with Authorization: Bearer {token}")

codes = []
for broken, *words in json.loads(commands):
    kept = getattr(job, broken, None)
    if broken:
        setattr(job, broken, fail)
    sys.argv[:] = ["finetune", "run", *words]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code or 0)
    if broken:
        setattr(job, broken, kept)
print(json.dumps(codes))
"""
"""Commands one after another in one process; the first word of each names what fails unforeseen in it."""


@dataclass
class Mirror:
    """A hub that lets nobody in, and what it was shown."""

    url: str = ""
    shown: list[str] = field(default_factory=list)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.shown.append(self.headers.get("Authorization", ""))
            self.send_response(401 if "closed" in self.path else 500 if "broken" in self.path else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://{USERINFO}127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


@dataclass
class Traces:
    """Everything that commands left: what they printed, and every file."""

    codes: list[int]
    printed: str
    files: dict[str, bytes]

    def holding_the_canary(self) -> list[str]:
        """Return the places that hold it, however it is written."""
        places = {"printed": self.printed.encode(), **self.files}
        return [name for name, content in places.items() if any(form.encode() in content for form in FORMS)]


def leave(folder: Path, endpoint: str, *commands: list[str], **more: str) -> Traces:
    """Run commands with a canary in every variable that holds secrets."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {
        "HF_HOME": str(folder / "hub"),
        "TORCH_HOME": str(folder / "torch"),
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": f"hf_{CANARY}",
        "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}",
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "FINETUNE_MIRROR": endpoint,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, endpoint, CANARY, json.dumps(commands)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Traces(json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr, files)


def words(image_folder: Path, backbone: object, *more: object) -> list[str]:
    sizes = ["--epochs", "1", "--workers", "0", "--json"]
    return ["--backbone", str(backbone), "--data", str(image_folder), *sizes, *map(str, more)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host/x?y=1", "http://***@host/x?y=1"),
        ("of S3://key@host: no", "of S3://***@host: no"),
        ("/data/http:/user:p@ss@host/x", "/data/http:/***@host/x"),
        ("https://host/x?X-Amz-Signature=0a1b&part=2", "https://host/x?X-Amz-Signature=***&part=2"),
        ("https://host/x?part=2&access_token=0a1b", "https://host/x?part=2&access_token=***"),
        (f"with hf_{'a1' * 17}", "with ***"),
        (f"Authorization: Bearer {'a.b' * 10}", "Authorization: Bearer ***"),
        ("a\tb\x1b[31m\r\x85\u202e\u2028\udcff\0", r"a\tb\x1b[31m\r\x85\u202e\u2028\udcff\x00"),
        ("two\nlines, a@b.c, me@host:/path, caf\u00e9 \U0001f41d", None),
        ("http://host:80/a, local-dir:/home/me@work, weights/token=1", None),
    ],
)
def test_what_may_be_shown(text: str, shown: str | None) -> None:
    expected = text if shown is None else shown
    assert sanitize(text) == sanitize(expected) == expected
    assert str(InternalError(text, text, text)) == f"{expected}: {expected}\n{expected}"


def test_values_of_variables_that_are_called_like_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"HF_TOKEN": "abcdefgh", "MY_API_KEY": "abcdefgh-longer", "SHORT_TOKEN": "yes"}
    for name, value in {**values, "PLAIN": "visible value"}.items():
        monkeypatch.setenv(name, value)
    assert sanitize("abcdefgh, abcdefgh-longer, yes, visible value") == "***, ***, yes, visible value"
    monkeypatch.setenv("ALL_PROXY", "http://me:0123456789@h")
    assert sanitize("nonnumeric port: '0123456789@h'") == "nonnumeric port: '***@h'"


def test_the_search_finds_what_it_must(tmp_path: Path) -> None:
    for text in FORMS:
        assert Traces([], f"x{text}x", {}).holding_the_canary() == ["printed"]
        assert Traces([], "", {"run.log": f"x{text}x".encode()}).holding_the_canary() == ["run.log"]


@pytest.mark.slow
def test_a_mirror_that_lets_nobody_in(mirror: Mirror, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    address = f"{mirror.url}/weights.pth"
    cases = [
        (0, "", words(image_folder, tiny, "--output", "runs/whole")),
        (70, "check_predictions", words(image_folder, tiny, "--output", "runs/broken")),
        (70, "prepare", words(image_folder, tiny, "--output", "runs/early")),
        (78, "", words(image_folder, "hf-hub:org/absent")),
        (78, "", words(image_folder, "hf-hub:org/closed")),
        (78, "", words(image_folder, "hf-hub:org/broken")),
        (78, "", words(image_folder, "timm/test_vit")),
        (78, "", words(image_folder, "torchvision/squeezenet1_0")),
        (2, "", words(image_folder, tiny, "--weights", address)),
        (2, "", words(image_folder, address)),
        (65, "", words(address, tiny)),
        (2, "", words(image_folder, tiny, "--recipe", address)),
        (2, "", words(image_folder, tiny, "--set", f"training.lr={address}")),
    ]
    commands = [[broken, *command] for _, broken, command in cases]
    traces = leave(tmp_path, mirror.url, *commands, HTTPS_PROXY=f"http://{USERINFO}127.0.0.1:9")
    assert traces.codes == [code for code, *_ in cases]
    assert traces.holding_the_canary() == []
    shown = {base64.b64decode(line.split()[1]).decode() for line in mirror.shown if line.startswith("Basic")}
    assert shown == {USERINFO.rstrip("@")}, "the mirror was never shown the canary, so nothing was tried"
    said = f"http://***@{mirror.url.partition('@')[2]}"
    assert traces.printed.count(said) > 15
    assert all(text in traces.printed for text in ("401", "404", "500"))
    log = next(content for path, content in traces.files.items() if path.endswith("runs/broken/run.log"))
    assert b"Traceback" in log and said.encode() in log


@pytest.mark.slow
def test_a_mirror_and_a_proxy_that_refuse(tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    names = ("timm/test_vit", "torchvision/squeezenet1_0", "hf-hub:org/name")
    traces = leave(
        tmp_path,
        f"https://{USERINFO}127.0.0.1:9",
        *(["", *words(image_folder, name)] for name in names),
        HTTPS_PROXY=f"http://{USERINFO}127.0.0.1:9",
    )
    assert traces.codes == [78, 78, 78]
    assert traces.holding_the_canary() == []
    assert traces.printed.count("https://***@127.0.0.1:9/") == 2 * len(names)
