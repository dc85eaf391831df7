"""The backbones that are part of the installation. They were trained by this project.

Each is a folder in ``pretrained/bundled`` in timm's format (``config.json``, ``model.safetensors``), with a
README.md about its training data, training and accuracy. Its name is ``finetune/FOLDER``.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

LIBRARY = "finetune"


@cache
def list_bundled() -> tuple[str, ...]:
    """Return the names of the bundled backbones, without ``finetune/``."""
    root = _root()
    return tuple(sorted(path.name for path in root.iterdir() if (path / "config.json").is_file()))


def find_bundled(name: str) -> Path | None:
    """Return the folder of a bundled backbone (with or without ``finetune/``), None if there is none."""
    bare = name.removeprefix(f"{LIBRARY}/")
    return _root() / bare if bare in list_bundled() else None


def _root() -> Path:
    """The package is installed as files: it needs torch, which cannot run from an archive either."""
    return Path(str(resources.files("pretrained"))) / "bundled"
