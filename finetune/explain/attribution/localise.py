"""A box around the object, from a saliency map alone (Simonyan et al., arXiv:1312.6034, section 3.2).

The most salient pixels are seeds of the object, the least salient ones seeds of the background. GrabCut,
which models the colours of both, spreads them over the image. It needs OpenCV; without it, the object is what
is salient. The box is that of the largest connected component.

Shape legend: H W pixels.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from finetune.evaluation.view_geometry import Box

OBJECT = 0.95
"""Quantile of the map above which a pixel is a seed of the object; the paper's."""
BACKGROUND = 0.30
"""Quantile below which a pixel is a seed of the background; the paper's."""
SMOOTHING = 0.02
"""Standard deviation, as a share of the shorter side, of the blur before a threshold: a saliency map is made
of single pixels, which are no connected component."""
_ITERATIONS = 5
_IS_BACKGROUND, _IS_OBJECT, _MAYBE_OBJECT = 0, 1, 3  # of OpenCV: GC_BGD, GC_FGD, GC_PR_FGD


def has_grabcut() -> bool:
    """Return whether OpenCV is installed."""
    return importlib.util.find_spec("cv2") is not None


def find_box(saliency: NDArray[np.float32], image: NDArray[np.uint8]) -> Box | None:
    """Return the box of the object, right and bottom outside; None if nothing is salient.

    Args:
        saliency: (H, W), larger where a pixel matters more for the class.
        image: (H, W, 3), RGB.
    """
    if saliency.max() <= saliency.min():
        return None
    mask = _cut_out(saliency, image) if has_grabcut() else _threshold(saliency)
    return _enclose_largest(mask)


def compute_iou(first: Box, second: Box) -> float:
    """Return the intersection of two boxes over their union, in [0, 1]."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _cut_out(saliency: NDArray[np.float32], image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the object's pixels (H, W) by GrabCut; its random numbers start from the same seed each time."""
    import cv2

    low, high = np.quantile(saliency, (BACKGROUND, OBJECT))
    seeds: NDArray[np.uint8] = np.full(saliency.shape, _MAYBE_OBJECT, np.uint8)
    seeds[saliency <= low] = _IS_BACKGROUND
    seeds[(saliency >= high) & (saliency > low)] = _IS_OBJECT
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    mask, *_ = cv2.grabCut(
        np.ascontiguousarray(image), seeds, None, *models, _ITERATIONS, cv2.GC_INIT_WITH_MASK
    )
    found: NDArray[np.bool_] = (mask == _IS_OBJECT) | (mask == _MAYBE_OBJECT)
    return found


def _threshold(saliency: NDArray[np.float32]) -> NDArray[np.bool_]:
    blurred = ndimage.gaussian_filter(saliency, SMOOTHING * min(saliency.shape))
    found: NDArray[np.bool_] = blurred > np.quantile(blurred, OBJECT)
    return found


def _enclose_largest(mask: NDArray[np.bool_]) -> Box | None:
    labels, number = ndimage.label(mask)
    if not number:
        return None
    sizes = np.bincount(labels.ravel())[1:].tolist()
    largest = 1 + sizes.index(max(sizes))
    rows, columns = np.nonzero(labels == largest)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
