"""What a network's own classifier says about labels that it was not made for: LEEP (arXiv:2002.12462).

Shape legend: N images, S classes of the network's own classifier, K classes of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.features.rows import Rows
from finetune.system.device import derive_seed
from finetune.targets import decide

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


# --- Nearest neighbours by the cosine of their angle: a classifier that learns nothing ---
#
# The five nearest neighbours vote for their classes, each with the weight exp(cosine / 0.07), as in the
# evaluation of self-supervised features (arXiv:1805.01978).
#
# Images are compared over some of the features at a time, so that neither many images nor many features
# have to be in memory together.
#
# Shape legend: N training images, M test images, B of them in a block, D features, K classes.


NEIGHBOURS = 5
"""Images that vote, or all if there are fewer."""
TEMPERATURE = 0.07
_BLOCK_BYTES = 256 * 2**20
"""Of the cosines of a block, and of the features that are compared at a time."""
_SHORTEST = 1e-12
"""Length in place of zero: an image without features is at right angles to all."""


def leave_one_out(rows: Rows, indices: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return whether the neighbours of each image among the others give it its class, (N,) bool.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the images that count.
        labels: (N,) int64, their classes.
        num_classes: K.
    """
    return _vote(rows, indices, labels, indices, num_classes, True) == labels


def classify(rows: Rows, train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Return the class that its neighbours among training images give each test image, (M,) int64.

    Of equally near images the first ones of ``train`` vote, and of equal votes the lowest class wins.

    Args:
        rows: (all images, D).
        train: (N,) int64, training images.
        labels: (N,) int64, their classes.
        test: (M,) int64, the others.
        num_classes: K.
    """
    return _vote(rows, train, labels, test, num_classes, False)


def _vote(rows: Rows, train: Tensor, labels: Tensor, test: Tensor, num_classes: int, is_same: bool) -> Tensor:
    found = []
    size = max(1, _BLOCK_BYTES // (4 * len(train)))
    for start in range(0, len(test), size):
        part = test[start : start + size]
        cosines = _compare(rows, part, train)
        if is_same:
            cosines.diagonal(start).fill_(-torch.inf)
        places = _find_nearest(cosines, min(NEIGHBOURS, len(train) - is_same))
        weights = (cosines.gather(1, places) / TEMPERATURE).exp()
        votes = cosines.new_zeros(len(part), num_classes)
        classes = labels.to(cosines.device)[places]
        for neighbour in range(places.shape[1]):  # one at a time: sums have the same order on every device
            one = slice(neighbour, neighbour + 1)
            votes.scatter_add_(1, classes[:, one], weights[:, one])
        found.append(decide(votes))
    return torch.cat(found).cpu()


def _compare(rows: Rows, asked: Tensor, known: Tensor) -> Tensor:
    """Return cosines (B, N) float32, summed over blocks of features."""
    device = rows.columns(asked[:1], 0, 1).device
    products = torch.zeros(len(asked), len(known), device=device)
    squares = torch.zeros(len(asked), device=device), torch.zeros(len(known), device=device)
    for start, stop in _blocks(rows.shape[1], len(asked) + len(known)):
        ours = rows.columns(asked, start, stop).float()
        theirs = rows.columns(known, start, stop).float()
        products.addmm_(ours, theirs.T)
        squares[0].add_(ours.square().sum(dim=1))
        squares[1].add_(theirs.square().sum(dim=1))
    lengths, others = (one.sqrt().clamp_min(_SHORTEST) for one in squares)
    return products.div_(lengths[:, None]).div_(others)


def _blocks(num_columns: int, num_rows: int) -> Iterator[tuple[int, int]]:
    width = max(1, _BLOCK_BYTES // (4 * num_rows))
    for start in range(0, num_columns, width):
        yield start, min(start + width, num_columns)


def _find_nearest(cosines: Tensor, count: int) -> Tensor:
    """Return the places of the ``count`` largest of each row in ascending order, (B, count).

    ``topk`` takes any of equal cosines. Where there are more of the last one than are wanted, the first are
    taken.
    """
    values, places = cosines.topk(min(count + 1, cosines.shape[1]), dim=1)
    last = values[:, count - 1]
    if values.shape[1] > count:
        for row in (values[:, count] == last).nonzero().flatten().tolist():
            nearer = (cosines[row] > last[row]).nonzero().flatten()
            equal = (cosines[row] == last[row]).nonzero().flatten()
            places[row, :count] = torch.cat([nearer, equal])[:count]
    return places[:, :count].sort(dim=1).values


MOST_IMAGES = 2_000
"""Training images that are looked at, evenly over the classes; an accuracy is known to 1 % then."""
