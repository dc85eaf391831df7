"""Read tensors from safetensors, or from PyTorch files with weights_only: no code of a file ever runs."""

from __future__ import annotations

import hashlib
import re
import stat
import warnings
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.file_kinds import describe_foreign, is_safetensors
from pretrained.hub import MAX_FILE_BYTES
from pretrained.inert import allowed_globals, find_globals

MAX_UNPACK_RATIO = 10
"""Largest ratio of unpacked to packed bytes. PyTorch does not compress; packed zeros could fill memory."""
MAX_WRAPPERS = 8
"""Largest depth of mappings in mappings."""
_LAYER_WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
"""What ``torch.compile``, FSDP and activation checkpointing put into names."""
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.[\w.]+)")
"""Finds what a pickle would import in PyTorch's error message."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return every named tensor of a file; those in a mapping have its key and a dot before their names.

    The names that ``torch.compile``, FSDP and activation checkpointing put in between are left out.

    Raises:
        UsageError: the file is too large or damaged, contains other objects than tensors and settings, or no
            named tensors.
    """
    asked = f"weights {path}"
    try:
        _check_size(asked, path)
        content = _read(path)
    except UsageError:
        raise
    except Exception as error:  # torch.load raises errors of six kinds
        if isinstance(error, UnpicklingError) and (more := _forbidden_content(error, path)):
            found = f"it holds more than tensors ({more}), and nothing else is ever loaded or run"
            raise UsageError(asked, found, "Save its state_dict as safetensors.") from None
        if not isinstance(error, OSError) and (foreign := describe_foreign(path)) is not None:
            what, fix = foreign
            raise UsageError(asked, f"the file cannot be read: it is {what}", fix) from None
        found = f"the file cannot be read: {_reason(error, path)}"
        raise UsageError(asked, found, "Fetch or save the file again.") from None
    tensors = {_clean_key(key): value for key, value in _flatten(content, "", 0, set())}
    if not tensors:
        raise UsageError(asked, _describe_content(content), "Name a file with a state dict.")
    odd = next((key for key, value in tensors.items() if not _is_dense(value)), None)
    if odd is not None:
        found = f"its tensor {odd[:100]!r} is sparse, quantised or without content"
        raise UsageError(asked, found, "Save its state_dict with plain tensors.")
    return tensors


def _check_size(asked: str, path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever, and a device has no end
        raise UsageError(asked, "it is a folder, a pipe or a device, not a file", "Name a file.")
    if (size := status.st_size) > MAX_FILE_BYTES:
        found = f"it has {size:,} bytes, more than {MAX_FILE_BYTES:,}"
        raise UsageError(asked, found, "Name the weights of an image classifier.")
    if is_safetensors(path) or not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except BadZipFile:  # another format; the reader decides
        return
    if unpacked > MAX_UNPACK_RATIO * size:
        found = f"its {size:,} bytes unpack to {unpacked:,}, more than {MAX_UNPACK_RATIO} times as many"
        raise UsageError(asked, found, "Save its state_dict as safetensors.")


def check_digest(path: Path, sha256: str) -> None:
    """Refuse a file that changed since it was written; no reader notices a flipped bit in a weight.

    Args:
        path: file with weights.
        sha256: digest from the time of writing; ``""`` if there is none.

    Raises:
        UsageError: the file has another digest, or there is no such file.
    """
    if not path.is_file():
        fix = "Bring it back from a copy, or export the model again."
        raise UsageError(f"weights {path}", "there is no such file", fix)
    with path.open("rb") as file:
        if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            found = "it has changed since it was written (sha256)"
            fix = (
                "Bring it back from a copy; or take `sha256` out of config.json, if you changed it yourself."
            )
            raise UsageError(f"weights {path}", found, fix)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)


def _read(path: Path) -> Any:
    if is_safetensors(path) or (path.suffix == ".safetensors" and not is_zipfile(path)):
        return safetensors.torch.load_file(path)
    allowed = allowed_globals(find_globals(path))
    # The errors below are clearer than torch's warnings.
    with (
        warnings.catch_warnings(action="ignore"),
        torch.serialization.safe_globals(allowed),
        path.open("rb") as file,  # of a path, torch believes the suffix
    ):
        return torch.load(file, map_location="cpu", weights_only=True)


def _forbidden_content(error: UnpicklingError, path: Path) -> str:
    forbidden = _FORBIDDEN.search(str(error))
    if forbidden:
        return forbidden[1] or forbidden[2]
    with path.open("rb") as file:
        return "a plain pickle" if file.read(1) == b"\x80" else ""


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, without PyTorch's advice to read it unsafely."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if path.stat().st_size == 0:
        return "it is empty"
    if isinstance(error, SafetensorError):
        return f"it is no whole safetensors file ({str(error)[:200]})"
    if "TorchScript" in str(error):
        return "it is a TorchScript program, not a state dict"
    return "it is damaged, cut off, or no PyTorch file at all"


def _flatten(content: Any, prefix: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in mappings, and in lists of mappings; each once, as a pickle may contain itself."""
    if not isinstance(content, Mapping | list | tuple) or depth > MAX_WRAPPERS or id(content) in seen:
        return
    seen.add(id(content))
    is_mapping = isinstance(content, Mapping)
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        if isinstance(value, Tensor) and is_mapping:
            yield f"{prefix}{key}", value
        elif isinstance(value, np.ndarray) and is_mapping and value.dtype.kind in "fiub" and value.ndim:
            yield f"{prefix}{key}", torch.from_numpy(np.ascontiguousarray(value))
        else:
            yield from _flatten(value, f"{prefix}{key}.", depth + 1, seen)


def _describe_content(content: Any) -> str:
    """Say what a file holds that has no named tensors."""
    if isinstance(content, Tensor):
        return f"it holds a single tensor of shape {tuple(content.shape)}, without a name"
    if isinstance(content, list | tuple) and _holds_tensor(content):
        return f"it holds a list of {len(content):,} tensors without names, so none can be assigned"
    keys = ", ".join(repr(str(key)[:40]) for key in list(content)[:4]) if isinstance(content, Mapping) else ""
    return f"it holds no tensors{f', only {keys}' if keys else ''}"


def _holds_tensor(content: list[Any] | tuple[Any, ...]) -> bool:
    """Return whether a list has a tensor, or pairs with one."""
    pairs = [value for value in content if isinstance(value, list | tuple)]
    return any(isinstance(value, Tensor) for value in chain(content, *pairs))


def _clean_key(key: str) -> str:
    """Leave out the parts that wrappers of single layers add to names, wherever they are."""
    return _LAYER_WRAPPERS.sub(r"\1", key)


def digest_tensors(network: nn.Module, without: Collection[str], modules: Collection[str] = ()) -> str:
    """Return one sha256 of all parameters and buffers.

    Args:
        network: any network.
        without: names of tensors to leave out.
        modules: names of modules whose own tensors are left out.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name not in without and name.rpartition(".")[0] not in modules:
            whole.update(f"{name} {_digest(tensor)}\n".encode())
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
