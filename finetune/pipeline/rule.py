"""The rule that chooses a strategy from measurements: a table of thresholds and a table of cells.

The lectures' matrix has two axes. *Size* is the number of training images. *Similarity* to the images that
the backbone was trained on is measured by how well its own classifier's predictions explain the new labels
(LEEP); for a backbone without a classifier, by how much better the features of an earlier layer separate the
classes than those of the last. docs/advise.md says which of the thresholds were measured, and how.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.targets import METRIC_NAMES

Size = Literal["little", "medium", "a lot"]
Similarity = Literal["similar", "unsure", "different"]
SIZES: tuple[Size, ...] = ("little", "medium", "a lot")
SIMILARITIES: tuple[Similarity, ...] = ("similar", "unsure", "different")

# --- thresholds ----------------------------------------------------------------------------------

LITTLE_IMAGES = 2_000
"""Fewer training images count as little data. The lectures begin full fine-tuning at "a few thousand"; the
exact number was chosen, not measured."""
LITTLE_PER_CLASS = 50
"""Fewer training images per class count as little data, however many classes there are; chosen."""
MANY_IMAGES = 10_000
"""Training images from which data are a lot, together with :data:`MANY_PER_CLASS`; chosen."""
MANY_PER_CLASS = 100
"""Training images per class from which data are a lot; chosen."""
SIMILAR_LEEP = 0.75
"""Normalised LEEP (arXiv:2002.12462) from which data are similar. It separated three similar data sets from
two others in 200 draws of classes and images on one backbone; it had been chosen on the same data sets."""
DIFFERENT_LEEP = 0.60
"""Normalised LEEP below which data are different; in between they are unsure. Digits had 0.46 to 0.60."""
GAP_ERRORS = 2.0
"""Standard errors by which an earlier layer must be better than the last for data to be different, if the
backbone has no classifier (leave-one-out nearest neighbours, paired by image). With one standard error, 5 to
25 % of similar draws were called different; with two, 0 to 5 %."""
LAST_ERRORS = 1.0
"""Standard errors by which a linear classifier on the last features must be better than one on all stages
together to be chosen. Over 96 draws of 20 to 500 images of four sets, always taking all stages lost 0.9
points to the best choice in hindsight, this rule 1.1, always the last features 3.9, and a rule that also took
the best single stage 2.9: the best of eight is too often so by luck (docs/advise.md)."""
INDEPENDENT = 0.8
"""Share of independent images from which groups are not worth a warning."""
CHANCE_ERRORS = 2.0
"""Standard errors above chance that a linear classifier must reach; otherwise the labels are suspected."""


# --- cells ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The strategy of one cell of the matrix.

    Attributes:
        description: what the strategy trains, as shown in the matrix.
        name: name of the strategy.
        keys: further keys of the recipe's section ``strategy``.
    """

    description: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)


_LINEAR = Cell("a linear classifier on all stages together, or on the last features", "freeze")
TOP = Cell("a linear classifier, then it and the last stage at 1/10", "top", {"head_factor": 0.1})
_ALL = Cell("a linear classifier, then everything at 1/10", "full", {"head_factor": 0.1, "body_factor": 0.1})

CELLS: Mapping[tuple[Size, Similarity], Cell] = {
    ("little", "similar"): _LINEAR,
    ("little", "unsure"): _LINEAR,
    ("little", "different"): _LINEAR,
    ("medium", "similar"): TOP,
    ("medium", "unsure"): _ALL,
    ("medium", "different"): _ALL,
    ("a lot", "similar"): TOP,
    ("a lot", "unsure"): _ALL,
    ("a lot", "different"): _ALL,
}
"""The matrix of lecture A5, with a middle row and a middle column. Fine-tuning starts from a trained linear
classifier (LP-FT, arXiv:2202.10054), so the head needs no higher learning rate than the other layers. The
fine-tuned network is exported only if it is better than a linear classifier on validation images."""


# --- evidence and decision -----------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A linear classifier, scored by leaving out training images.

    Attributes:
        features: ``last`` or ``all``.
        score: leave-one-out accuracy in [0, 1], or R squared.
        lead: its score minus that of ``last``.
        lead_error: standard error of the lead, paired by image.
    """

    features: str
    score: float
    lead: float
    lead_error: float


@dataclass(frozen=True)
class Evidence:
    """Measurements on the training images.

    Attributes:
        num_images: number of training images.
        num_classes: number of classes (K).
        smallest_class: number of training images of the smallest class.
        leep: normalised LEEP, 1 + LEEP / ln K; None if the backbone has no classifier of its own, or an image
            has not one class.
        gap: leave-one-out score of nearest neighbours in the best earlier layer minus that in the last.
        gap_error: standard error of the gap, paired by image.
        candidates: linear classifiers: on the last features, then on all stages if there are more.
        num_measured: number of training images that were measured.
        num_independent: number of groups of look-alikes among them.
        metric: what a score is: ``accuracy``, or ``r2`` of numbers and of several labels as 0 and 1.
    """

    num_images: int
    num_classes: int
    smallest_class: int
    leep: float | None
    gap: float
    gap_error: float
    candidates: tuple[Candidate, ...]
    num_measured: int = 1
    num_independent: int = 1
    metric: str = "accuracy"

    @property
    def chance(self) -> float:
        """The score of a predictor that sees no image."""
        return 1 / self.num_classes if self.metric == "accuracy" else 0.0

    @property
    def per_class(self) -> float:
        """Training images per class."""
        return self.num_images / self.num_classes


@dataclass(frozen=True)
class Decision:
    """The position of the data in the matrix, and the chosen strategy.

    Attributes:
        size: little, medium or a lot.
        similarity: similar, unsure or different.
        cell: cell of the matrix.
        features: features of the linear classifier: ``last`` or ``all``.
        keys: keys of the recipe's section ``strategy``.
        reasons: the measurements that led to the cell, one line each.
        changes: data that would lead to another cell, one line each.
        warnings: reasons why no strategy may work, one sentence each.
    """

    size: Size
    similarity: Similarity
    cell: Cell
    features: str
    keys: Mapping[str, Any]
    reasons: tuple[str, ...]
    changes: tuple[str, ...]
    warnings: tuple[str, ...]


def decide(evidence: Evidence) -> Decision:
    """Choose the strategy from the measurements."""
    size, similarity = find_size(evidence), find_similarity(evidence)
    cell = CELLS[size, similarity]
    best = choose_candidate(evidence.candidates)
    keys: dict[str, Any] = {"name": cell.name, **cell.keys}
    if cell.name == "freeze":
        keys["features"] = best.features
    else:
        keys |= {"probe_first": True, "floor": best.features}
    return Decision(
        size,
        similarity,
        cell,
        best.features,
        keys,
        _explain(evidence, size, similarity, best),
        tuple(_find_changes(evidence, size, similarity)),
        tuple(_find_warnings(evidence)),
    )


def find_size(evidence: Evidence) -> Size:
    """Return the row of the matrix: how much data there is."""
    if evidence.num_images < LITTLE_IMAGES or evidence.per_class < LITTLE_PER_CLASS:
        return "little"
    if evidence.num_images >= MANY_IMAGES and evidence.per_class >= MANY_PER_CLASS:
        return "a lot"
    return "medium"


def find_similarity(evidence: Evidence) -> Similarity:
    """Return the column of the matrix: how similar the data are to what the backbone was trained on."""
    if evidence.leep is not None:
        if evidence.leep >= SIMILAR_LEEP:
            return "similar"
        return "different" if evidence.leep < DIFFERENT_LEEP else "unsure"
    is_earlier_better = evidence.gap > GAP_ERRORS * evidence.gap_error and evidence.gap > 0
    return "different" if is_earlier_better else "unsure"


def choose_candidate(candidates: tuple[Candidate, ...]) -> Candidate:
    """Return the classifier on all stages; the one on the last features if that is clearly better."""
    last, together = candidates[0], candidates[-1]
    return last if -together.lead > LAST_ERRORS * together.lead_error else together


# --- reasons, changes and warnings as text -------------------------------------------------------


def _explain(evidence: Evidence, size: Size, similarity: Similarity, best: Candidate) -> tuple[str, ...]:
    amount = f"{evidence.num_images:,} training images, {evidence.per_class:.0f} a class"
    limits = {
        "little": f"little is under {LITTLE_IMAGES:,}, or under {LITTLE_PER_CLASS} a class",
        "medium": f"a lot is {MANY_IMAGES:,} and {MANY_PER_CLASS} a class",
        "a lot": f"from {MANY_IMAGES:,} and {MANY_PER_CLASS} a class on",
    }
    if evidence.leep is not None:
        likeness = f"normalised LEEP {evidence.leep:.2f}"
        bounds = f"similar from {SIMILAR_LEEP:g}, different under {DIFFERENT_LEEP:g}"
    else:
        likeness = f"the best earlier layer leads the last by {evidence.gap:+.3f} ± {evidence.gap_error:.3f}"
        bounds = (
            f"different over {GAP_ERRORS:g} standard errors; LEEP needs a backbone with its own classifier, "
            "and one class an image"
        )
    metric = METRIC_NAMES[evidence.metric]
    return (
        f"{size} data: {amount} ({limits[size]})",
        f"{similarity}: {likeness} ({bounds})",
        f"linear classifier on {_name(best.features)}: leave-one-out {metric} {best.score:.3f}{_lead(best)}",
    )


def _name(features: str) -> str:
    return {"last": "the last features", "all": "all stages together"}[features]


def _lead(best: Candidate) -> str:
    if best.features == "last":
        return ""
    return f", {best.lead:+.3f} ± {best.lead_error:.3f} against the last features"


def _find_changes(evidence: Evidence, size: Size, similarity: Similarity) -> list[str]:
    """Return the data that would lead to another cell, one line each."""
    changes = []
    if size != "a lot":
        larger = SIZES[SIZES.index(size) + 1]
        images, each = (
            (LITTLE_IMAGES, LITTLE_PER_CLASS) if size == "little" else (MANY_IMAGES, MANY_PER_CLASS)
        )
        needed = max(images, math.ceil(each * evidence.num_classes))
        cell = CELLS[larger, similarity]
        if cell != CELLS[size, similarity]:
            changes.append(f"with {needed:,} training images or more: {cell.description} ({cell.name})")
    listed = {CELLS[size, similarity].description}
    for other in SIMILARITIES:
        cell = CELLS[size, other]
        if cell.description not in listed:
            listed.add(cell.description)
            changes.append(f"{_bound(evidence, other)}: {cell.description} ({cell.name})")
    return changes


def _bound(evidence: Evidence, other: Similarity) -> str:
    if evidence.leep is None:
        return f"if the data were {other}"
    bounds = {
        "similar": f"a normalised LEEP of {SIMILAR_LEEP:g} or more",
        "unsure": f"a normalised LEEP under {SIMILAR_LEEP:g}",
        "different": f"a normalised LEEP under {DIFFERENT_LEEP:g}",
    }
    return bounds[other]


def _find_warnings(evidence: Evidence) -> list[str]:
    return [*_warn_of_groups(evidence), *_warn_of_chance(evidence)]


def _warn_of_groups(evidence: Evidence) -> Iterator[str]:
    measured, independent = evidence.num_measured, evidence.num_independent
    if independent < INDEPENDENT * measured:
        yield (
            f"training images come in groups of look-alikes: of {measured:,} images, about {independent:,} "
            "are independent. Folds keep look-alikes together. If a group is one object, patient or video, "
            "name it with --group-by: a drawn validation split then keeps them together, too"
        )


def _warn_of_chance(evidence: Evidence) -> list[str]:
    best = max(evidence.candidates, key=lambda candidate: candidate.score)
    chance = evidence.chance
    error = math.sqrt(chance * (1 - chance) / evidence.num_images)
    if best.score > chance + CHANCE_ERRORS * error:
        return []
    return [
        f"no linear classifier predicts these labels better than chance (best {best.score:.3f}, chance "
        f"{chance:.3f}): check the labels before you train"
    ]
