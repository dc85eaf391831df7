"""The ``model/`` folder: ``config.json``, ``model.safetensors`` and a model card, in timm's format.

A timm network's folder loads with plain ``timm.create_model("local-dir:PATH", pretrained=True)``. What
timm cannot build (a torchvision network, or a timm network without its fully connected layers) says so
in the root key ``finetune``, which timm ignores, and loads with :func:`load_exported`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from finetune.exporters.config import build_config
from finetune.exporters.model_card import build_readme
from finetune.runs.files import disk_error, sync_folder, write_bytes, write_json, write_text
from finetune.targets import to_probabilities
from pretrained.backbone import Backbone
from pretrained.catalog import Card, find_card
from pretrained.network import build_network
from pretrained.state_dict import check_digest, read_weights

WEIGHTS_FILE = "model.safetensors"


def export_model(backbone: Backbone, network: nn.Module, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write the deployable folder whole: aside first, then under its name.

    Args:
        backbone: card and architecture.
        network: the weights to hand over, on any device, in any layout.
        folder: its final name; an older folder of that name is replaced.
        metrics: for the model card.

    Raises:
        DiskError: it cannot be written.
    """
    readme = build_readme(backbone.card, metrics, backbone.match.source)
    with staged(folder) as part:
        write_model(part, backbone.card, network, readme)


def write_model(folder: Path, card: Card, network: nn.Module, readme: str) -> None:
    """Write the three files into a folder that is there.

    Args:
        folder: of the files.
        card: of the network.
        network: its weights, on any device, in any layout.
        readme: the model card.

    Raises:
        DiskError: they cannot be written.
    """
    content = safetensors.torch.save(portable_state(network), {"format": "pt"})
    write_bytes(folder / WEIGHTS_FILE, content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(folder / "config.json", build_config(card, network, digest))
    write_text(folder / "README.md", readme)


def portable_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of contiguous tensors on the CPU, each with memory of its own."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}


def load_exported(folder: Path) -> nn.Module:
    """Build the network of an exported folder again, in eval mode, from nothing but its files."""
    card = find_card(str(folder))
    check_digest(folder / WEIGHTS_FILE, card.sha256)
    network = build_network(card)
    network.load_state_dict(read_weights(folder / WEIGHTS_FILE))
    return network.eval()


def measure_round_trip(network: nn.Module, folder: Path, images: Tensor) -> float:
    """Return the largest difference between probabilities of a network and of its exported folder.

    Args:
        network: on the device of ``images``.
        folder: written by :func:`export_model`.
        images: (B, 3, H, W) float32, normalised.
    """
    in_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if in_channels_last else torch.contiguous_format
    reloaded = load_exported(folder).to(images.device, memory_format=layout)  # type: ignore[call-overload]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            difference = to_probabilities(network(images)) - to_probabilities(reloaded(images))
    finally:
        for module, training in modes.items():
            module.training = training
    return float(difference.abs().max())


# --- A folder that is there whole or not at all ---


STALE = 24 * 60 * 60
"""Seconds after which a folder that is not finished belongs to no living process."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes its final name when the block ends without an error.

    Args:
        folder: its final name; an older folder of that name is replaced.

    Raises:
        DiskError: it cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        _put_in_place(part, folder)
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def staged_alone(folder: Path) -> Iterator[Path]:
    """Give a folder as :func:`staged` does, which no other process has, for a name that must stay free.

    Args:
        folder: its final name, which nothing or an empty folder has; the folder above is there.

    Raises:
        UsageError: somebody else has taken the name meanwhile.
        DiskError: it cannot be written.
    """
    prefix, suffix = f".{folder.name}.", ".part"
    try:
        _remove_stale(folder.parent, prefix, suffix)
        part = Path(mkdtemp(suffix, prefix, folder.parent))
    except OSError as error:
        raise disk_error(folder, error) from None
    try:
        part.chmod(0o777 & ~_read_umask())
        yield part
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--output {folder}", "another process has filled it", "Name a new folder.")
        part.rename(folder)  # over an empty folder at most, whatever has happened since
        sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str, suffix: str) -> None:
    """What killed processes have left here; a younger one may be in use."""
    for part in parent.glob(f"{escape(prefix)}*{suffix}"):
        if part.is_dir() and time.time() - part.stat().st_mtime > STALE:
            shutil.rmtree(part, ignore_errors=True)


def _read_umask() -> int:
    """The system tells it only when it is set."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _put_in_place(part: Path, folder: Path) -> None:
    """Exchange a folder: the old one goes only when the new one stands in its place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
