"""The ``model/`` folder: ``config.json``, ``model.safetensors`` and a model card, in timm's format.

A timm network's folder loads with plain ``timm.create_model("local-dir:PATH", pretrained=True)``. What
timm cannot build (a network of torchvision or of :mod:`pretrained.zoo`, a classifier on several stages, or a
timm network without its fully connected layers) has an architecture that timm refuses
(:func:`finetune.exporters.config.name_for_timm`), and loads with :func:`load_exported`.

:func:`staged` writes a folder under a temporary name, so that it appears complete or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from finetune.exporters.config import build_config
from finetune.exporters.model_card import build_readme
from finetune.runs.files import disk_error, remove_folder, sync_folder, write_bytes, write_json, write_text
from finetune.targets import read_target
from pretrained.backbone import Backbone
from pretrained.catalog import Card, find_card
from pretrained.network import build_network
from pretrained.state_dict import check_digest, read_weights

WEIGHTS_FILE = "model.safetensors"


def export_model(backbone: Backbone, network: nn.Module, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write the ``model/`` folder under a temporary name and rename it when it is complete.

    Args:
        backbone: card and origin of the network.
        network: trained network, on any device, in any memory layout.
        folder: final path; an existing folder is replaced.
        metrics: for the model card.

    Raises:
        DiskError: it cannot be written.
    """
    readme = build_readme(backbone.card, metrics, backbone.match.source)
    with staged(folder) as part:
        write_model(part, backbone.card, network, readme)


def write_model(folder: Path, card: Card, network: nn.Module, readme: str) -> None:
    """Write the three files into an existing folder.

    Args:
        folder: an existing folder.
        card: description of the network.
        network: trained network, on any device, in any memory layout.
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
    """Return a state dict of contiguous tensors on the CPU, without shared memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}


def load_exported(folder: Path) -> nn.Module:
    """Build the network of an exported folder from its files alone, in eval mode."""
    card = find_card(str(folder))
    check_digest(folder / WEIGHTS_FILE, card.sha256)
    network = build_network(card)
    network.load_state_dict(read_weights(folder / WEIGHTS_FILE))
    return network.eval()


def measure_round_trip(network: nn.Module, folder: Path, images: Tensor) -> float:
    """Return the largest absolute difference of an answer between a network and its exported folder.

    Args:
        network: on the device of ``images``.
        folder: written by :func:`export_model`.
        images: (B, 3, H, W) float32, normalised.
    """
    in_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if in_channels_last else torch.contiguous_format
    reloaded = load_exported(folder).to(images.device, memory_format=layout)  # type: ignore[call-overload]
    activate = read_target(dict(find_card(str(folder)).target)).activate
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            difference = activate(network(images)) - activate(reloaded(images))
    finally:
        for module, training in modes.items():
            module.training = training
    return float(difference.abs().max())


# --- folders that appear complete or not at all ---------------------------------------------------


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` when the block ends without an error.

    Args:
        folder: final path; an existing folder is replaced.

    Raises:
        DiskError: it cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    remove_folder(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        _put_in_place(part, folder)
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        remove_folder(part, ignore_errors=True)


def _put_in_place(part: Path, folder: Path) -> None:
    """Replace a folder; the old one is deleted only after the new one has its name."""
    old = folder.with_name(f".{folder.name}.old")
    remove_folder(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    remove_folder(old, ignore_errors=True)
