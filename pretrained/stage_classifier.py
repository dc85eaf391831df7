"""A linear classifier on the features of one or several layers, which need not be the last.

The forward pass of the backbone ends at the last of these layers. Earlier features serve small data sets
that are very different from ImageNet. All stages together are Head2Toe without feature selection
(arXiv:2201.03529).

Shape legend: B batch, D features of all layers, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.graph.layers import FeatureExtractor, Layer, Layers
from pretrained.graph.pooling import Pool, check_pool
from pretrained.graph.recorder import FeaturePoint

MAX_FEATURES = 1_000_000
"""Limit for a classifier from a file; all stages of a wide network together have some ten thousand."""


class StageClassifier(nn.Module):
    """One linear layer on the concatenated features of some layers: (B, 3, H, W) -> (B, K).

    Args:
        network: the backbone; its own classifier is never executed.
        layers: layers of the network, at least one.
        pool: how their features are pooled.
        num_classes: K.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer], pool: Pool, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.extractor = FeatureExtractor(network, layers, pool)
        self.num_features = sum(layer.num_features(pool) for layer in layers)
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K)."""
        features = torch.cat(self.extractor(images), dim=1)
        logits: Tensor = self.classifier(features)
        return logits

    def get_classifier(self) -> nn.Module:
        """Return the linear layer, like the networks of timm."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer."""
        weight = self.classifier.weight
        self.classifier = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)


def build_stage_classifier(
    network: nn.Module,
    points: Sequence[FeaturePoint],
    pool: Pool,
    num_classes: int,
    input_size: tuple[int, int, int],
) -> StageClassifier:
    """Build a classifier on the layers at some points of a network.

    Raises:
        UsageError: the network has no features there, or the classifier would be too large.
    """
    layers = Layers(network, (), input_size)
    chosen = [layers.at(point) for point in points]
    for layer in chosen:
        for form in layer.forms:
            check_pool(layer.name, form, layer.pool_of(pool))
    if (total := sum(layer.num_features(pool) for layer in chosen)) > MAX_FEATURES:
        raise UsageError("its classifier", f"it reads {total:,} features per image", "Export the run again.")
    return StageClassifier(network, chosen, pool, num_classes)
