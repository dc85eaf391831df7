"""Values beside the tensors of a checkpoint that may be unpickled: settings, NumPy scalars, paths.

``torch.load(weights_only=True)`` refuses every class that it does not know. The classes here carry values
only. Those of other libraries, and paths, are replaced by types without any behaviour, so that nothing of
those libraries is imported or run. Everything else stays refused.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import re
import types
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch


class Settings:
    """Stands for a mapping of another class: it becomes a plain one, which torch allows to be filled."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty mapping, whatever the arguments are."""
        return collections.OrderedDict()


class Items:
    """Stands for a ``deque``: it becomes a list, which torch allows to be filled."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty list, whatever the arguments are."""
        return []


_SETTINGS = re.compile(
    r"(?:omegaconf|yacs|easydict|addict|munch|ml_collections|mmcv\.utils|mmengine|fvcore|detectron2\.config"
    r"|lightning|lightning_fabric|lightning_utilities|pytorch_lightning|fastcore|transformers\.training_args"
    r"|transformers\.trainer_utils|accelerate)(?:\.\w+)+"
)
"""Modules whose classes are replaced by :class:`Settings`."""

_NUMPY_CORE = np.core if np.__version__.startswith("1.") else np._core  # type: ignore[attr-defined]


def allowed_globals(names: list[str]) -> list[Any]:
    """Return what a file may import, for ``torch.serialization.safe_globals``.

    Args:
        names: the full names that the file would import.
    """
    found = [name for name in names if _SETTINGS.fullmatch(name)]
    return [*_ALLOWED, *((_stand_in(name), name) for name in found)]


def _stand_in(name: str) -> type:
    """Return a class of its own for each name; torch refuses one class under two names."""
    return type(name.rpartition(".")[2], (Settings,), {})


def _numpy_globals() -> list[Any]:
    """What NumPy's scalars and arrays are rebuilt with, under its old and its new module names."""
    scalar, rebuild = _NUMPY_CORE.multiarray.scalar, _NUMPY_CORE.multiarray._reconstruct
    names: list[tuple[Callable[..., Any], str]] = []
    for core in ("numpy.core", "numpy._core"):
        names += [(scalar, f"{core}.multiarray.scalar"), (rebuild, f"{core}.multiarray._reconstruct")]
    types_of_numbers = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    plain = [one for one in types_of_numbers if one is not np.dtypes.ObjectDType]
    return [*names, (np.dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray"), *plain]


_ALLOWED: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (Settings, "collections.defaultdict"),
    (Items, "collections.deque"),
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    *_numpy_globals(),
    *((kind, f"builtins.{kind.__name__}") for kind in (int, float, str, bool, list, dict, tuple, frozenset)),
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for kind, name in (
            (PurePosixPath, "PosixPath"),
            (PurePosixPath, "PurePosixPath"),
            (PureWindowsPath, "WindowsPath"),
            (PureWindowsPath, "PureWindowsPath"),
        )
    ),
]
"""Factories of a ``defaultdict`` are among the built-in types. Paths of any system become pure paths."""


def find_globals(path: Path) -> list[str]:
    """Return the names that a file would import beyond torch's own; of the older format an empty list."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the older format, or no checkpoint: the reader decides
        return []
