"""Freezing takes three steps: no gradient, eval mode, and no place in the optimizer.

One step alone is not enough. Without eval mode a BatchNorm keeps updating its statistics; a parameter without
gradient that is still in the optimizer is changed by weight decay and momentum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from finetune.errors import InternalError
from finetune.training.plan import NORM_LAYERS, Plan
from pretrained.state_dict import _digest, digest_tensors


def freeze(network: nn.Module, plan: Plan) -> None:
    """First step: require gradients for the trained stages only."""
    trained = {name for row in plan.trained for name in row.stage.parameters}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)


def set_train_mode(network: nn.Module, plan: Plan) -> None:
    """Second step: train mode, except for frozen stages and norm layers that the plan keeps in eval."""
    network.train()
    modules = dict(network.named_modules())
    for row in plan.rows:
        for name in row.stage.modules:
            module = modules[name]
            if not row.trained or (row.norm == "eval" and isinstance(module, NORM_LAYERS)):
                module.training = False


def build_param_groups(
    network: nn.Module, plan: Plan, weight_decay: float, bias_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Third step: parameter groups of the trained stages only, two per stage: with and without weight decay.

    Biases, norm parameters, scales, tokens, position embeddings and parameters that the network exempts get
    no weight decay (:func:`takes_decay`), and ``bias_lr_factor`` times the learning rate of their stage.

    Returns:
        Groups with ``name``, ``params``, ``lr``, ``base_lr`` and ``weight_decay``.

    Raises:
        InternalError: the groups do not hold exactly the parameters that have a gradient.
    """
    parameters = dict(network.named_parameters())
    exempt = _exempt(network)
    groups = []
    for row in plan.trained:
        for decay in (True, False):
            names = [n for n in row.stage.parameters if takes_decay(n, parameters[n], exempt) == decay]
            lr = row.lr if decay else bias_lr_factor * row.lr
            groups.append(
                {
                    "name": f"{row.stage.name}{'' if decay else ' (no decay)'}",
                    "params": [parameters[name] for name in names],
                    "lr": lr,
                    "base_lr": lr,
                    "weight_decay": weight_decay if decay else 0.0,
                }
            )
    groups = [group for group in groups if group["params"]]
    _check_groups(network, groups)
    return groups


def takes_decay(name: str, parameter: Tensor, exempt: Collection[str] = ()) -> bool:
    """Return whether weight decay applies to a parameter: only to matrices and convolution kernels.

    Args:
        name: name in ``named_parameters()``.
        parameter: the parameter; fewer than two dimensions longer than 1 mean a bias, a norm or a scale.
        exempt: name patterns that the network exempts, from timm's ``no_weight_decay``.
    """
    last = name.rpartition(".")[2]
    is_matrix = sum(size > 1 for size in parameter.shape) > 1
    named_otherwise = any(fnmatch(last, pattern) for pattern in _NOT_WEIGHTS)
    return is_matrix and not named_otherwise and not any(fnmatch(name, pattern) for pattern in exempt)


_NOT_WEIGHTS = ("*bias*", "*pos_emb*", "*_token", "*_tokens", "*layer_scale*")
"""Last name components of parameters shaped like a matrix that get no decay (torchvision exempts none)."""


def _exempt(network: nn.Module) -> Collection[str]:
    declared = getattr(network, "no_weight_decay", None)
    return set(declared()) if callable(declared) else set()


def _check_groups(network: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    if sorted(grouped) != sorted(trainable):
        found = f"{len(trainable)} parameters have a gradient, {len(grouped)} are in a group"
        raise InternalError("grouping the parameters", found, "Please report this with the backbone's name.")


def digest_frozen(network: nn.Module, plan: Plan) -> dict[str, str]:
    """Return a sha256 of every frozen tensor, parameters and buffers alike."""
    state = network.state_dict()
    return {name: _digest(state[name]) for name in frozen_tensors(network, plan)}


def digest_weights(network: nn.Module, plan: Plan) -> str:
    """Return one sha256 of everything below the head: it detects other weights under the same name."""
    stage = plan.rows[-1].stage
    return digest_tensors(network, stage.parameters, stage.modules)


def frozen_tensors(network: nn.Module, plan: Plan) -> list[str]:
    """Return the names of all parameters and buffers of frozen stages."""
    parameters = {name for row in plan.frozen for name in row.stage.parameters}
    modules = {name for row in plan.frozen for name in row.stage.modules}
    return [n for n in network.state_dict() if n in parameters or n.rpartition(".")[0] in modules]


def check_frozen(network: nn.Module, plan: Plan, before: Mapping[str, str]) -> None:
    """Verify that no frozen tensor changed by a single bit.

    Raises:
        InternalError: a frozen tensor changed.
    """
    after = digest_frozen(network, plan)
    changed = [name for name, digest in before.items() if after[name] != digest]
    if changed:
        found = f"{len(changed)} frozen tensors changed during training: {', '.join(changed[:3])}"
        raise InternalError(
            "checking the frozen stages", found, "Do not use this model; please report the backbone's name."
        )
