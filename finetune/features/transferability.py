"""How well a pretrained network fits new labels, without training: LEEP, and nearest neighbours.

LEEP (arXiv:2002.12462) compares the labels with the predictions of the network's own classifier. Nearest
neighbours by cosine vote with the weight exp(cosine / 0.07), as in the evaluation of self-supervised features
(arXiv:1805.01978). Images are compared over blocks of images and features, to bound memory.

Shape legend: N (training) images, M test images, B of them in a block, D features, S classes of the network's
own classifier, K classes of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.features.rows import Rows
from finetune.system.device import derive_seed
from finetune.targets import Target, decide

PER_CLASS = 20
"""Images of a class that LEEP uses. LEEP falls with their number (for ants and bees from 0.98 with 10 a class
to 0.77 with 60), so a threshold is only valid for a fixed number."""


def compute_leep(probabilities: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return LEEP: the mean log likelihood of labels given the classifier's own classes, in nats; at most 0.

    ``P(y | x) = sum_z P(y | z) p(z | x)``, with ``P(y | z)`` estimated on the same images.

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


def compute_normalised_leep(probabilities: Tensor, labels: Tensor, num_classes: int, seed: int) -> float:
    """Return 1 + LEEP / ln K on at most 20 images of each class.

    It is 1 if the classifier's own classes determine the labels, and about 0 if they are unrelated.

    Args:
        probabilities: (N, S) of the network's own classifier.
        labels: (N,) int64.
        num_classes: K, at least 2.
        seed: the seed of the draw of images.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "leep"))
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == label][:PER_CLASS] for label in range(num_classes)])
    return 1 + compute_leep(probabilities[chosen], labels[chosen], num_classes) / math.log(num_classes)


# --- nearest neighbours --------------------------------------------------------------------------


NEIGHBOURS = 5
"""Neighbours that vote; all images if there are fewer."""
TEMPERATURE = 0.07
"""Divides the cosines in the weights of the votes."""
_BLOCK_BYTES = 256 * 2**20
"""Bytes of the cosines of a block, and of the features that are compared at a time."""
_SHORTEST = 1e-12
"""Smallest norm of a row, instead of zero: a row of zeros has cosine 0 with all others."""


def score_neighbours(
    rows: Rows,
    indices: Tensor,
    labels: Tensor,
    num_classes: int,
    target: Target,
    groups: Tensor | None = None,
) -> Tensor:
    """Return the score of each image, predicted by the nearest images of other groups, (N,) float64.

    Their mean is the metric ``target.additive_score``.

    Args:
        rows: features (all images, D).
        indices: (N,) int64, the images to use.
        labels: (N,) int64, or (N, K) float32, as ``target`` encodes them.
        num_classes: K.
        target: what the labels are.
        groups: (N,) int64; images of equal numbers do not vote for each other. By default each is a group.
    """
    groups = torch.arange(len(indices)) if groups is None else groups
    return target.score_each(vote(rows, indices, labels, indices, num_classes, groups), labels)


def classify(rows: Rows, train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Return the class of each test image by its nearest training images, (M,) int64.

    Among equally near images the first in ``train`` vote; among equal votes the lowest class index wins.

    Args:
        rows: features (all images, D).
        train: (N,) int64, the training images.
        labels: (N,) int64, the labels of the training images.
        test: (M,) int64, the test images.
        num_classes: K.
    """
    return decide(vote(rows, train, labels, test, num_classes))


def vote(
    rows: Rows,
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    groups: Tensor | None = None,
) -> Tensor:
    """Return the votes of the nearest training images for each class, (M, K), or means of their numbers.

    Args:
        rows, train, test, num_classes: see :func:`classify`.
        labels: (N,) int64, or numbers (N, K) float32, of the training images.
        groups: (N,) int64 where the test images are the training images: images of equal numbers do not vote
            for each other. None where they are others.
    """
    found, is_same = [], groups is not None
    size = max(1, _BLOCK_BYTES // (4 * len(train)))
    for start in range(0, len(test), size):
        part = test[start : start + size]
        cosines = _compare(rows, part, train)
        if groups is not None:
            own = groups[start : start + size, None] == groups
            cosines.masked_fill_(own.to(cosines.device), -torch.inf)
        places = _find_nearest(cosines, min(NEIGHBOURS, len(train) - is_same))
        weights = (cosines.gather(1, places) / TEMPERATURE).exp()
        if labels.ndim == 2:
            shares = weights / weights.sum(dim=1, keepdim=True)
            found.append((shares[..., None] * labels.to(cosines)[places]).sum(dim=1))
            continue
        votes = cosines.new_zeros(len(part), num_classes)
        classes = labels.to(cosines.device)[places]
        for neighbour in range(
            places.shape[1]
        ):  # one neighbour at a time, so that every device adds in the same order
            one = slice(neighbour, neighbour + 1)
            votes.scatter_add_(1, classes[:, one], weights[:, one])
        found.append(votes)
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
    """Return the positions of the ``count`` largest values of each row in ascending order, (B, count).

    ``topk`` may return any of equal cosines; here the first of them are returned.
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
"""Most training images that are used, evenly over classes; the standard error of an accuracy is then 1 %."""
