"""Training state in one safetensors file: tensors, and everything else as JSON in its header.

One file means one rename, so there is never half a checkpoint. No pickle is written or read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.errors import DataError
from finetune.runs.files import write_bytes


@dataclass
class Progress:
    """Where training stands. Everything in it is plain JSON.

    Attributes:
        epoch: being trained, from 0.
        batch: next one of that epoch.
        step: optimiser updates so far.
        lr: the head's rate in the last step.
        loss_sum: of the epoch so far, over images.
        num_seen: images of the epoch so far.
        epoch_seconds: training time of the epoch so far.
        wait_seconds: of it spent waiting for data.
        best: validation figures of the best epoch.
        best_epoch: from 0; -1 before the first.
        bad_epochs: since the best one, for early stopping.
        plateau_factor: of the plateau schedule.
        plateau_bad_epochs: of the plateau schedule.
        history: one row an epoch.
        scaler: state of float16's loss scaler.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    lr: float = 0.0
    loss_sum: float = 0.0
    num_seen: int = 0
    epoch_seconds: float = 0.0
    wait_seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int = -1
    bad_epochs: int = 0
    plateau_factor: float = 1.0
    plateau_bad_epochs: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a checkpoint in one piece (see :func:`finetune.runs.files.write_bytes`)."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(plain, metadata={"progress": json.dumps(asdict(progress))})
    write_bytes(path, content)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """Read a checkpoint.

    Raises:
        DataError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        fix = "Start again with a new --output."
        raise DataError(f"going on from {path}", f"the checkpoint is damaged ({error})", fix) from None


# --- what is saved -------------------------------------------------------------------------------


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors under the names of their parameters."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"optimizer.{names[id(parameter)]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimiser back what :func:`optimizer_tensors` returned."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    state = optimizer.state_dict()
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    for index, name in enumerate(ordered):
        prefix = f"optimizer.{name}:"
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            state["state"][index] = own
    optimizer.load_state_dict(state)


def network_tensors(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return a network's state under a prefix, without second names of shared tensors."""
    state = network.state_dict()
    seen: set[tuple[int, torch.Size]] = set()
    unique = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        unique[f"{prefix}{name}"] = tensor
    return unique


def restore_network(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Fill a network from tensors under a prefix; shared tensors are filled under one of their names."""
    own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {name[len(prefix) :] for name in network_tensors(network, prefix)}
    missing = expected - own.keys()
    if missing:
        found = f"{len(missing)} tensors are missing, {sorted(missing)[0]} among them"
        raise DataError("going on from a checkpoint", found, "Start again with a new --output.")
    network.load_state_dict(own, strict=False)
