"""The backbones that come with the installation: trained by this project, and loaded as any others.

Each is a folder of ``pretrained/bundled`` in timm's format (``config.json``, ``model.safetensors``), with a
README.md that says what it was trained on, how, and how good it is. Its name is ``finetune/`` and the
folder's.
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
    """Return the folder of a bundled backbone (with ``finetune/`` or without), None where there is none."""
    bare = name.removeprefix(f"{LIBRARY}/")
    return _root() / bare if bare in list_bundled() else None


def _root() -> Path:
    """The package is installed as files: torch, which it needs, cannot be run from an archive either."""
    return Path(str(resources.files("pretrained"))) / "bundled"
