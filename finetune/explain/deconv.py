"""The projection of a unit to pixels: deconvolutional network and guided backpropagation.

What excited a unit is traced back through the network: convolutions are transposed, a maximum is put back to
where it came from (the switches of Zeiler and Fergus, arXiv:1311.2901), and the signal is rectified at every
ReLU on the way down (:mod:`finetune.explain.relu_rules`). This is autograd's gradient with another rule for
ReLU; where windows of a pooling overlap, contributions add up.

Both pictures show less of the network than they seem to: they hardly change when its weights are made random
(Adebayo et al., arXiv:1810.03292), as they recover parts of the image (arXiv:1805.07039).

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from finetune.explain.positions import MapPosition
from finetune.explain.relu_rules import ReluRule, Rule
from finetune.explain.units import Unit, activations_of, record_maps


def project_units(
    network: nn.Module, position: MapPosition, images: Tensor, units: Sequence[Unit], rule: Rule = "deconv"
) -> Tensor:
    """Return the projection (B, 3, H, W) of one unit for each image.

    Args:
        network: a network in eval mode; it does not change.
        position: the layer of the units.
        images: (B, 3, H, W), normalised.
        units: B of them, each with a channel.
        rule: ``deconv`` or ``guided``.

    Raises:
        UsageError: an activation between the images and the layer is no ReLU, so that there is no rule.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.detach().clone().requires_grad_()
        maps = _record(network, position, pixels, rule)
        [projection] = torch.autograd.grad(activations_of(maps, units).sum(), [pixels])
    return projection


def check_projectable(
    network: nn.Module, position: MapPosition, input_size: tuple[int, int, int], rule: Rule = "deconv"
) -> None:
    """Refuse a layer whose units :func:`project_units` cannot project, with one forward pass.

    Args:
        network: a network in eval mode; it does not change.
        position: the layer of the units.
        input_size: (C, H, W) of the images.
        rule: ``deconv`` or ``guided``.

    Raises:
        UsageError: an activation between the images and the layer is no ReLU, so that there is no rule.
    """
    with torch.inference_mode(False), torch.enable_grad():
        blank = next(network.parameters()).new_zeros(1, *input_size).requires_grad_()
        _record(network, position, blank, rule)


def _record(network: nn.Module, position: MapPosition, pixels: Tensor, rule: Rule) -> Tensor:
    """Return the maps (B, C, h, w) of a layer, with the rule in the history of autograd."""
    with ReluRule(rule) as relus:
        [maps] = record_maps(network, [position], pixels * 1)
    _check(relus, position, rule)
    return maps


def _check(relus: ReluRule, position: MapPosition, rule: Rule) -> None:
    if not relus.others:
        return
    others = ", ".join(f"{name} ({number})" for name, number in relus.others.most_common())
    found = f"it is defined for ReLU only, and between the images and {position.point} there is {others}"
    if relus.num_relus:
        found += f" beside ReLU ({relus.num_relus})"
    fix = "Name an earlier --layer, or a network with ReLU, such as VGG, ResNet or SqueezeNet."
    raise UsageError("deconvnet" if rule == "deconv" else "guided backpropagation", found, fix)
