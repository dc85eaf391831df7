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

    same = torch.zeros(len(groups), dtype=torch.int64)
    folds = draw_folds(same, NUM_FOLDS, seed, torch.from_numpy(groups)).numpy()
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


def predict_by_ridge(ridge: LeftOutRidge, groups: Ints) -> FindHits:
    """Return a function that leaves groups of images out of ridge regression on their features.

    Args:
        ridge: of features of a part of each image.
        groups: (N,); images of one group are left out together.
    """
    whole = torch.from_numpy(groups)
    return lambda labellings: ridge.find_hits(torch.from_numpy(labellings), whole).numpy()
