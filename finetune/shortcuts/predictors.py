"""Classifiers that see a shortcut only, and are right or wrong on images that they were not trained on.

The folds, and what a classifier is allowed, follow from the images and never from the labels, so that true
labels and permuted ones go through the same procedure.

Shape legend: N images, F facts, K classes, P labellings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from finetune.features.folds import draw_folds
from finetune.features.ridge import LeftOutRidge
from finetune.shortcuts.permutation import Floats, Ints

Bools = npt.NDArray[np.bool_]
FindHits = Callable[[Ints], Bools]
"""Takes P labellings (P, N); returns which images are predicted right when they are left out, (P, N)."""

NUM_FOLDS = 5
_LEAF = 10
"""Leaves of a tree hold at least so small a part of the mean class: a tenth."""
_FEWEST = 3
"""Images of a leaf at least."""


def tells_nothing(facts: Floats) -> bool:
    """Return whether all images have the same facts (N, F), or none has any."""
    return len(np.unique(np.nan_to_num(facts, nan=-np.inf), axis=0)) < 2


def draw_blind_folds(groups: Ints, seed: int) -> Ints:
    """Return the fold in which each image is left out, (N,), which knows nothing of labels.

    Args:
        groups: (N,), at least two; images of one group get one fold.
        seed: of the random order.
    """
    same = torch.zeros(len(groups), dtype=torch.int64)
    folds: Ints = draw_folds(same, NUM_FOLDS, seed, torch.from_numpy(groups)).numpy()
    return folds


def predict_by_tree(facts: Floats, groups: Ints, num_classes: int, seed: int) -> FindHits:
    """Return a function that cross-validates a decision tree of scikit-learn on a few numbers.

    A tree asks for thresholds, so that neither units nor codes of words matter, and takes missing values.

    Args:
        facts: (N, F), NaN where unknown.
        groups: (N,); images of one group are in one fold.
        num_classes: K.
        seed: of the folds.
    """
    from sklearn.tree import DecisionTreeClassifier

    folds = draw_blind_folds(groups, seed)
    known = facts.astype(np.float32)
    leaf = max(_FEWEST, len(facts) // (_LEAF * num_classes))
    parts = [(folds != fold, folds == fold) for fold in np.unique(folds)]

    def predict(labels: Ints) -> Bools:
        hits = np.zeros(len(labels), bool)
        for train, test in parts:
            tree = DecisionTreeClassifier(min_samples_leaf=leaf, random_state=0)
            tree.fit(known[train], labels[train])
            hits[test] = tree.predict(known[test]) == labels[test]
        return hits

    return lambda labellings: np.stack([predict(labels) for labels in labellings])


def predict_by_ridge(ridge: LeftOutRidge, groups: Ints, seed: int) -> FindHits:
    """Return a function that leaves folds of images out of ridge regression on their features.

    Single images are no folds: without one, its class is the rarest of balanced ones, so that features that
    tell nothing would be wrong more often than chance.

    Args:
        ridge: of features of a part of each image.
        groups: (N,); images of one group are in one fold.
        seed: of the folds.
    """
    folds = torch.from_numpy(draw_blind_folds(groups, seed))
    return lambda labellings: ridge.find_hits(torch.from_numpy(labellings), folds).numpy()
