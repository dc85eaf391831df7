"""What a network's own classifier says about labels that it was not made for: LEEP (arXiv:2002.12462).

Shape legend: N images, S classes of the network's own classifier, K classes of the labels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.runtime import derive_seed

PER_CLASS = 20
"""Images of a class that LEEP sees. It falls with their number (ants and bees are at 0.98 with 10 a class, at
0.77 with 60), so that a threshold means something at a fixed number only."""


def compute_leep(probabilities: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return the mean log likelihood of labels, in nats, by way of the classifier's own classes; at most 0.

    ``P(y | x) = sum_z P(y | z) p(z | x)``, with ``P(y | z)`` counted on the same images.

    Args:
        probabilities: (N, S) of the network's own classifier.
        labels: (N,) int64.
        num_classes: K.
    """
    soft = probabilities.double()
    joint = F.one_hot(labels, num_classes).double().T @ soft / len(labels)
    conditional = joint / joint.sum(dim=0).clamp_min(1e-12)
    likelihood = (soft @ conditional.T).gather(1, labels[:, None])
    return likelihood.clamp_min(1e-12).log().mean().item()


def normalised_leep(probabilities: Tensor, labels: Tensor, num_classes: int, seed: int) -> float:
    """Return 1 + LEEP / ln K on at most 20 images of each class: 1 where the labels follow from the
    classifier's own, about 0 where they have nothing to do with them.

    Args:
        probabilities: (N, S) of the network's own classifier.
        labels: (N,) int64.
        num_classes: K, at least 2.
        seed: draws the images.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "leep"))
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == label][:PER_CLASS] for label in range(num_classes)])
    return 1 + compute_leep(probabilities[chosen], labels[chosen], num_classes) / math.log(num_classes)
