"""A tensor inside a network as a leaf of autograd's graph: gradients with respect to it, and none below.

Shape legend: B batch, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.explain.positions import MapPosition
from pretrained.graph.pooling import Form
from pretrained.graph.recorder import replace_value
from pretrained.graph.structures import map_tensors, tensors_in


def forward_from(
    network: nn.Module, position: MapPosition, images: Tensor
) -> tuple[list[tuple[Tensor, Form]], Tensor]:
    """Run a network; autograd records it from the given position on.

    The caller turns gradients off (``torch.no_grad()``); they are on above the position only.

    Args:
        network: a network in eval mode; it does not change.
        position: where the recording begins.
        images: (B, 3, H, W), normalised.

    Returns:
        The leaves at the position with their forms, and the logits (B, K).
    """
    with _leaf_at(network, position) as leaves:
        logits = tensors_in(network(images))[0].float()
    return [(leaf, position.form) for leaf in leaves], logits


@contextmanager
def _leaf_at(network: nn.Module, position: MapPosition) -> Iterator[list[Tensor]]:
    """Replace a tensor by a leaf of the autograd graph while the block runs.

    The network continues with a copy, because an in-place operation (a ReLU) would change the leaf.
    """
    leaves: list[Tensor] = []

    def exchange(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        torch.set_grad_enabled(True)  # the caller's no_grad() ends it
        leaves.append(leaf_of(tensor))
        return leaves[-1].clone()

    try:
        with replace_value(network, position.point, lambda value: map_tensors(exchange, value)):
            yield leaves
    finally:
        torch.set_grad_enabled(False)


def leaf_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that autograd computes gradients for."""
    return tensor.detach().clone().requires_grad_()
