"""The optional environment of the peers: made beside ours, with the very same torch."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
REQUIREMENTS = PEERS / "requirements.txt"
_VERSIONS = """
import json, sys
from importlib.metadata import version
names = ("torch", "torchvision", "timm", "fastai")
json.dump({name: version(name) for name in names}, sys.stdout)
"""


class PeersEnvironmentError(Exception):
    """The environment cannot be made, or holds another torch."""


def build_environment(folder: Path) -> Path:
    """Return the Python of the environment, made or brought up to date where needed.

    It sees the packages of the interpreter that runs this, after its own: torch, torchvision and timm are
    the same files for all tools. (``--system-site-packages`` of a virtual environment would mean those of
    the Python under it.)

    Raises:
        PeersEnvironmentError: the registry does not answer, or torch would not be the same.
    """
    kept = folder / "requirements.txt"
    if kept.exists() and kept.read_bytes() == REQUIREMENTS.read_bytes():
        return folder / "bin" / "python"
    sys.stderr.write(f"making the peers' environment in {folder}\n")
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    parts = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(parts["purelib"]) / "finetune-benchmarks.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    words = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)]
    said = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    if said.returncode:
        raise PeersEnvironmentError(f"{' '.join(words)}\n{said.stderr}")
    _check_same_torch(python)
    kept.write_bytes(REQUIREMENTS.read_bytes())
    return python


def read_versions(python: Path) -> dict[str, str]:
    """Return the versions that the peers run with."""
    words = [str(python), "-c", _VERSIONS]
    said = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    if said.returncode:
        raise PeersEnvironmentError(said.stderr)
    versions: dict[str, str] = json.loads(said.stdout)
    return versions


def _check_same_torch(python: Path) -> None:
    from importlib.metadata import version

    theirs = read_versions(python)
    for name in ("torch", "torchvision", "timm"):
        if theirs[name] != version(name):
            raise PeersEnvironmentError(f"{name} is {theirs[name]} for the peers and {version(name)} for us")
