"""A linear classifier on features of other layers than the last: one stage's, or several together.

The network below is the backbone's own, and its forward ends where the last of these features is there. With
few images that are very different from ImageNet this is the lectures' hard cell; all stages together are
Head2Toe without its selection (arXiv:2201.03529).

Shape legend: B batch, D numbers of all layers for one image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.graph.layers import FeatureExtractor, Layer, Layers
from pretrained.graph.pooling import Pool, check_pool
from pretrained.graph.recorder import FeaturePoint

MOST_FEATURES = 1_000_000
"""That a classifier from a file may read; all stages of wide networks together have some ten thousand."""


class StageClassifier(nn.Module):
    """Features of some layers, side by side, and one linear layer: (B, 3, H, W) -> (B, K).

    Args:
        network: the backbone; its own classifier is never reached.
        layers: of that network, at least one.
        pool: of what they give.
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
        """Return the linear layer, as timm's networks do."""
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
    """Put a classifier on layers that are known by their place in the network.

    Raises:
        UsageError: the network has no such places.
    """
    layers = Layers(network, (), input_size)
    chosen = [layers.at(point) for point in points]
    for layer in chosen:
        for form in layer.forms:
            check_pool(layer.name, form, layer.pool_of(pool))
    if (total := sum(layer.num_features(pool) for layer in chosen)) > MOST_FEATURES:
        raise UsageError("its classifier", f"it reads {total:,} numbers an image", "Export the run again.")
    return StageClassifier(network, chosen, pool, num_classes)
