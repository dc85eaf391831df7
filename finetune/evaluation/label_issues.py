"""Suspected wrong labels: confident learning (Northcutt, Jiang and Chuang, arXiv:1911.00068).

A class's threshold is the mean probability that images with its label are given for it. An image that reaches
the threshold of another class than its label's, and for which its label is not the likeliest, is suspected.
These are the off-diagonal entries of the paper's confident joint, as in cleanlab's
``find_label_issues(filter_by="confident_learning")``, against which the tests hold this.

Shape legend: N images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-6
"""Under a threshold that still counts as reached: probabilities are float32."""


def find_label_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the images whose labels are suspected, the least likely label first, (M,) int64.

    Args:
        labels: (N,) int64, as given.
        probabilities: (N, K), by classifiers that have not seen the image.
    """
    likeliest = probabilities.argmax(dim=1)
    reached = probabilities >= compute_thresholds(labels, probabilities) - _ROUNDING
    number = reached.sum(dim=1)
    # Of several classes that are reached, the likeliest of all counts, as in the paper.
    guess = torch.where(number > 1, likeliest, reached.int().argmax(dim=1))
    issues = ((number > 0) & (guess != labels) & (likeliest != labels)).nonzero().flatten()
    own = probabilities[issues, labels[issues]]
    return issues[own.argsort(stable=True)]


def compute_thresholds(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean probability of each class over the images with its label, (K,); infinite without."""
    num_classes = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None]).flatten().double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, own)
    counts = labels.bincount(minlength=num_classes)
    return torch.where(counts > 0, sums / counts, torch.inf)
