"""What learning changes, as named tensors: taken from a network and its optimiser, and given back.

Frozen tensors are left out. They are proved unchanged at the end of every run, so that writing them again
and again would only cost time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from finetune.errors import DataError
from finetune.training.finite import add_up, is_finite


class State:
    """The changing tensors of a training.

    Args:
        network: that learns.
        optimizer: that moves it.
        average: of the network's weights, where one is kept.
        frozen: names of tensors that never change.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        frozen: Collection[str],
    ) -> None:
        self.network, self.optimizer, self.average = network, optimizer, average
        self.frozen = frozenset(frozen)

    @property
    def judged(self) -> nn.Module:
        """The network whose figures count: the average where one is kept."""
        return self.network if self.average is None else self.average

    def is_finite(self) -> bool:
        """Return whether every weight is a finite number: an update may overflow, with a finite gradient."""
        networks = [self.network] if self.average is None else [self.network, self.average]
        weights = [weight.detach() for network in networks for weight in network.parameters()]
        return is_finite(add_up([weight for weight in weights if weight.numel()]))

    def take(self) -> dict[str, Tensor]:
        """Return copies of all of them, on the CPU."""
        tensors = network_tensors(self.network, "model.", self.frozen)
        tensors |= optimizer_tensors(self.network, self.optimizer)
        if self.average is not None:
            tensors |= network_tensors(self.average, "ema.", self.frozen)
        return _copies(tensors)

    def give_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo everything since :meth:`take`."""
        restore_network(self.network, tensors, "model.", self.frozen)
        restore_optimizer(self.network, self.optimizer, tensors)
        if self.average is not None:
            restore_network(self.average, tensors, "ema.", self.frozen)

    def take_judged(self) -> dict[str, Tensor]:
        """Return copies of the judged weights alone, on the CPU."""
        return _copies(network_tensors(self.judged, "model.", self.frozen))

    def give_back_judged(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo everything in the judged network since :meth:`take_judged`."""
        restore_network(self.judged, tensors, "model.", self.frozen)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def network_tensors(network: nn.Module, prefix: str, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a network's state under a prefix, without second names of shared tensors."""
    seen: set[tuple[int, torch.Size]] = set()
    unique = {}
    for name, tensor in network.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape)
        if name in without or (tensor.numel() and identity in seen):
            continue
        seen.add(identity)
        unique[f"{prefix}{name}"] = tensor
    return unique


def restore_network(
    network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, without: Collection[str] = ()
) -> None:
    """Fill a network from tensors under a prefix; shared tensors are filled under one of their names.

    Raises:
        DataError: tensors are missing, or have another shape.
    """
    own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {name[len(prefix) :]: t.shape for name, t in network_tensors(network, prefix, without).items()}
    unlike = [name for name, shape in expected.items() if name not in own or own[name].shape != shape]
    if unlike:
        found = f"{len(unlike)} tensors are missing or have another shape, {sorted(unlike)[0]} among them"
        raise DataError("going on from a checkpoint", found, "Start again with a new --output.")
    network.load_state_dict(own, strict=False)


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
    """Give the optimiser back what :func:`optimizer_tensors` returned, and nothing else."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict() | {"state": {}}
    for index, name in enumerate(ordered):
        prefix = f"optimizer.{name}:"
        # Copies: the optimiser would take tensors of its own type and device as they are, and move them.
        own = {key[len(prefix) :]: value.clone() for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            state["state"][index] = own
    optimizer.load_state_dict(state)
