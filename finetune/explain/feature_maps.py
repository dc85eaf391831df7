"""The feature maps of an image at a layer, how strong each is, and how much it contributes to a class score.

A strong map need not matter: the contribution of a map is its activations times the gradient of the class's
logit with respect to them, summed over positions. Where a layer is followed by global average pooling and one
linear layer, the contributions of all maps add up to the logit, up to the bias.

Shape legend: B batch, C channels, H W pixels, h w positions of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.explain.leaves import forward_from
from finetune.explain.positions import MapPosition
from pretrained.graph.pooling import to_map


@dataclass(frozen=True)
class FeatureMaps:
    """The feature maps of one layer, float32 on the CPU.

    Attributes:
        values: (B, C, h, w), activations.
        strengths: (B, C), mean magnitude over the positions.
        contributions: (B, C), share of each map in the logit of the class, to first order.
    """

    values: Tensor
    strengths: Tensor
    contributions: Tensor


def compute_feature_maps(
    network: nn.Module, position: MapPosition, images: Tensor, classes: Sequence[int]
) -> FeatureMaps:
    """Return the feature maps of some images.

    Args:
        network: a network (B, 3, H, W) -> (B, K) in eval mode; it does not change.
        position: the layer.
        images: (B, 3, H, W), normalised.
        classes: B class indices, for whose logits the maps are weighed.
    """
    index = torch.tensor(classes, device=images.device)[:, None]
    with torch.inference_mode(False), torch.no_grad():
        [(leaf, form)], logits = forward_from(network, position, images.detach().clone())
        with torch.enable_grad():
            score = logits.gather(1, index).sum()
        [slope] = torch.autograd.grad(score, [leaf], allow_unused=True)
        values = to_map(leaf.detach(), form).float()
        slopes = torch.zeros_like(values) if slope is None else to_map(slope, form).float()
        return FeatureMaps(
            values.cpu(), values.abs().mean(dim=(2, 3)).cpu(), (values * slopes).sum(dim=(2, 3)).cpu()
        )
