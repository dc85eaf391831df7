"""Linear classifiers on features, solved to their optimum, with C chosen by cross-validation.

::

    rows -> standardised by training images -> projected to the span of the images, if features are many
         -> C by cross-validation inside the training images -> L-BFGS -> weights for the original features

With standardised features, C has the same effect on every layer except for the number of features and the
loss. So C is chosen among multiples of a natural unit: the C at which the loss of a single image has as much
curvature as the penalty. On the stages of SqueezeNet, with 2 to 101 classes of 3 to 50 images, the best
multiple was 1, or a neighbour of it was as good (``STRENGTHS``).

A penalised optimum lies in the span of the images: weights orthogonal to it cost and change no score. So N
images with many more features are reduced exactly to N coordinates each, without having all features in
memory at once.

All of this runs on the device that the caller names: blocks of rows go there, weights come back to the CPU.

Shape legend: N training images, D features, R numbers (R <= D) and a 1 for the bias, K classes, B images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import DataError
from finetune.features.folds import draw_folds
from finetune.features.minimize import (
    Logistic,
    Loss,
    Objective,
    Softmax,
    Spectrum,
    SquaredHinge,
    measure_spectrum,
    minimize,
)
from finetune.features.ridge import solve_ridge
from finetune.features.rows import Rows
from finetune.features.standardised import Standardised, standardise
from finetune.system.forward import compute_where_it_fits
from finetune.targets import decide

Kind = Literal["softmax", "svm", "logreg", "ridge"]
"""softmax: multinomial logistic regression; svm and logreg: one class against the rest, with the squared
hinge or the logistic loss; ridge: least squares, for numbers (:mod:`finetune.features.ridge`)."""

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Choices of C, as multiples of its natural unit (see above)."""
DEFAULT_STRENGTH = 1.0
"""The multiple that is used if nothing can be held out, because no class has two images."""
NUM_FOLDS = 3
"""Folds of the cross-validation that chooses C."""
LARGE = 2e8
"""N times R times K from which only the first fold is held out; all three would take two seconds or more."""
WIDE = 2
"""D / N from which projecting to the span of the images saves time."""

_SOLVED = 3e-7
"""Largest relative distance from the minimum of the objective, as the minimiser estimates it. Compared with
float64 it was up to 1e-6 with C up to ten times its natural unit, and 3e-6 at a hundred times."""
_NEARLY_SOLVED = 5e-3
"""The same while C is chosen: it changes accuracies by less than a point, a factor of ten in C by more."""
_LEAST_SQUARE = 1e-6
"""Replaces zero if all images are the same."""
_CPU = torch.device("cpu")
_LOSSES: dict[Kind, type[Loss]] = {"softmax": Softmax, "svm": SquaredHinge, "logreg": Logistic}


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A linear classifier of the original features, not standardised.

    Attributes:
        weight: (K, D) float32, on the CPU.
        bias: (K,) float32, on the CPU.
        strength: C of the objective on standardised features.
    """

    weight: Tensor
    bias: Tensor
    strength: float

    def scores(self, rows: Tensor) -> Tensor:
        """Return scores (B, K) float32 of rows (B, D); logits, if the classifier is a softmax."""
        return torch.nn.functional.linear(rows.to(self.weight), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Training images, prepared for the solver.

    Attributes:
        matrix: (N, R + 1) float32: standardised features or coordinates in their span, then a column of ones.
        labels: (N,) int64, or (N, K) float32: 1 for each class of an image and 0 for others.
        num_classes: K.
        groups: (N,) int64; images of equal numbers are held out together.
        spectrum: the spectrum of the matrix.
        mean_square: mean over images of the squared norm of their standardised features, at most D.
    """

    matrix: Tensor
    labels: Tensor
    groups: Tensor
    num_classes: int
    spectrum: Spectrum
    mean_square: float
    _standardised: Standardised
    _turn: Tensor | None

    def select(self, chosen: Tensor) -> TrainingRows:
        """Return some of the images, (N,) bool, in the same coordinates."""
        matrix, labels, groups = (one[chosen] for one in (self.matrix, self.labels, self.groups))
        return replace(self, matrix=matrix, labels=labels, groups=groups)

    def project(self, images: Tensor) -> Tensor:
        """Return any images (B,), by their indices into all rows, as rows of the matrix, (B, R + 1)."""
        scaled = self._standardised
        if self._turn is None:
            inner = scaled.take_others(images)
        else:
            blocks = [(start, stop, images) for start, stop in scaled.blocks()]
            products = [scaled.columns(*block) @ scaled.columns(*block[:2]).T for block in blocks]
            inner = torch.stack(products).sum(dim=0) @ self._turn
        return torch.nn.functional.pad(inner.float(), (0, 1), value=1.0)

    def strength(self, kind: Kind, multiple: float) -> float:
        """Return C for a multiple of its natural unit."""
        return multiple / (self._loss(kind).initial_curvature * max(self.mean_square, _LEAST_SQUARE))

    def minimize(
        self, kind: Kind, strength: float, tolerance: float = _SOLVED, weights: Tensor | None = None
    ) -> Tensor:
        """Return the optimal weights (K, R + 1) for a C, to a tolerance, from some weights on."""
        return minimize(Objective(self.matrix, self._loss(kind), strength, self.spectrum), tolerance, weights)

    def _loss(self, kind: Kind) -> Loss:
        if self.labels.ndim == 2:  # several classes an image
            return _LOSSES[kind](2 * self.labels - 1)
        classes = torch.arange(self.num_classes, device=self.labels.device)
        return _LOSSES[kind](torch.where(self.labels[:, None] == classes, 1.0, -1.0))

    def is_correct(self, weights: Tensor) -> Tensor:
        """Return whether weights (K, R + 1) predict the label of each image, (N,) bool."""
        return decide(self.matrix @ weights.T) == self.labels

    def score(self, kind: Kind, weights: Tensor) -> Tensor:
        """Return the score of each image under weights (K, R + 1), (N,) float64; higher is better.

        It is the log likelihood in nats: of its class, or summed over one-vs-rest decisions. For support
        vector machines it is 1 if the prediction is correct, else 0.
        """
        if kind == "svm":
            return self.is_correct(weights).double()
        return -self._loss(kind).values(self.matrix @ weights.T).double()

    def restore(self, weights: Tensor, strength: float) -> LinearClassifier:
        """Return weights (K, R + 1) as a classifier of the original features, computed block by block."""
        scaled, inner = self._standardised, weights[:, :-1].double()
        inner = inner if self._turn is None else inner @ self._turn.T
        bias = weights[:, -1].double()
        weight = weights.new_empty(len(weights), len(scaled.mean))
        for start, stop in scaled.blocks():
            block = inner[:, start:stop] if self._turn is None else inner @ scaled.columns(start, stop)
            weight[:, start:stop] = block / scaled.std[start:stop]
            bias -= weight[:, start:stop].double() @ scaled.mean[start:stop]
        return LinearClassifier(weight.cpu(), bias.float().cpu(), strength)


def build_training_rows(
    rows: Rows,
    indices: Tensor,
    labels: Tensor,
    num_classes: int,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> TrainingRows:
    """Return training images, prepared for any kind of classifier and any C.

    If there are more than two features for each image, images are projected to their span by the
    eigenvectors of the products of images (N, N), summed in float64 over blocks of features.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the training images; no others are read.
        labels: (N,) int64 of these images, or (N, K) float32: 1 for each class of an image.
        num_classes: K, at least 2 if each image has one class.
        device: device of the result, and of all that is computed with it.
        groups: (N,) int64; images of equal numbers are held out together. By default each is held out alone.

    Raises:
        DataError: there is only one class, or a class has no training image.
        InternalError: a feature is not finite.
    """
    _refuse_missing(labels, num_classes)
    scaled = standardise(rows, indices, device)
    if len(scaled.mean) > WIDE * len(indices):
        inner, turn = _turn_into_span(scaled)
    else:
        inner, turn = scaled.gather(), None
    matrix = torch.nn.functional.pad(inner, (0, 1), value=1.0)
    mean_square = inner.square().sum(dtype=torch.float64).item() / len(inner)
    spectrum = measure_spectrum(matrix)
    groups = torch.arange(len(labels)) if groups is None else groups
    labels, groups = labels.to(matrix.device), groups.to(matrix.device)
    return TrainingRows(matrix, labels, groups, num_classes, spectrum, mean_square, scaled, turn)


def solve(training: TrainingRows, kind: Kind, strength: float) -> LinearClassifier:
    """Return the classifier at the minimum of ``strength * sum of losses + ||W||^2 / 2``, with a free bias.

    ``strength`` is the C of scikit-learn's LogisticRegression and LinearSVC on standardised features.
    """
    return training.restore(training.minimize(kind, strength, _SOLVED), strength)


def choose_strength(training: TrainingRows, kind: Kind, seed: int) -> float:
    """Return the C with the best score on held-out training images; of equal ones, the smallest.

    The score is the mean log likelihood: accuracy on some dozens of images is so coarse that other folds
    chose a C a hundred times as large, and probabilities suffered. Support vector machines are scored by
    accuracy.

    C grows by decades, and each fit starts from the previous one. The search stops when the score has dropped
    by more than its standard error (over paired images), since large C take longest. For large problems only
    one third is held out, not each in turn. Standardisation and span are those of all training images.
    """
    return _choose(training, kind, seed)[0]


def choose_and_solve(training: TrainingRows, kind: Kind, seed: int) -> LinearClassifier:
    """Return the classifier for the C of :func:`choose_strength`."""
    strength, start = _choose(training, kind, seed)
    return training.restore(training.minimize(kind, strength, _SOLVED, start), strength)


def fit(
    rows: Rows,
    indices: Tensor,
    labels: Tensor,
    num_classes: int,
    kind: Kind,
    seed: int,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> LinearClassifier:
    """Choose C by cross-validation inside the training images, and solve with all of them.

    The arguments and refusals are those of :func:`build_training_rows`; ``seed`` draws the folds. If the
    memory of a GPU runs out, the CPU solves. ``ridge`` takes numbers, (N, 1), and chooses its penalty by the
    errors of images left out.
    """
    if kind == "ridge":
        weight, bias, penalty = solve_ridge(rows, indices, labels, device, groups)
        return LinearClassifier(weight, bias, 1 / penalty)

    def solve_on(place: torch.device) -> LinearClassifier:
        training = build_training_rows(rows, indices, labels, num_classes, place, groups)
        return choose_and_solve(training, kind, seed)

    return compute_where_it_fits(device, solve_on)


def _choose(training: TrainingRows, kind: Kind, seed: int) -> tuple[float, Tensor | None]:
    """Return the best C, and initial weights for all images: the mean of those of the folds."""
    strata = training.labels if training.labels.ndim == 1 else torch.zeros_like(training.groups)
    folds = draw_folds(strata.cpu(), NUM_FOLDS, seed, training.groups.cpu())
    folds = folds.to(training.labels.device)
    is_large = training.matrix.numel() * training.num_classes >= LARGE
    numbers = [fold for fold in range(1 if is_large else NUM_FOLDS) if (folds == fold).any()]
    if not numbers:
        return training.strength(kind, DEFAULT_STRENGTH), None
    parts = [(training.select(folds != fold), training.select(folds == fold)) for fold in numbers]
    weights: list[Tensor | None] = [None] * len(parts)
    best: tuple[Tensor, float, Tensor] | None = None
    for multiple in STRENGTHS:
        strength = training.strength(kind, multiple)
        found = [
            part.minimize(kind, strength, _NEARLY_SOLVED, start)
            for (part, _), start in zip(parts, weights, strict=True)
        ]
        scores = torch.cat([held.score(kind, one) for (_, held), one in zip(parts, found, strict=True)])
        lead = scores if best is None else scores - best[0]
        if best is None or lead.mean() > 0:
            best = scores, strength, torch.stack(found).mean(dim=0)
        elif lead.mean() ** 2 > lead.var(correction=0) / len(lead):
            break
        weights = [*found]
    assert best is not None
    return best[1], best[2]


def _refuse_missing(labels: Tensor, num_classes: int) -> None:
    if labels.ndim == 1 and num_classes < 2:
        raise DataError(
            "a linear classifier", "there is only one class", "Give it images of two classes or more."
        )
    counts = labels.bincount(minlength=num_classes) if labels.ndim == 1 else labels.sum(dim=0)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        found = f"class number {missing[0]} has no training image"
        raise DataError("a linear classifier", found, "Add images of the class, or leave the class out.")


def _turn_into_span(scaled: Standardised) -> tuple[Tensor, Tensor]:
    """Return coordinates (N, R) float32 in the span of the images, and the back projection (N, R) float64.

    With Z = standardised features and Z Z' = U S^2 U', the coordinates are U S, in the orthonormal basis
    Z' U / S. Weights V in that basis are V (U / S)' Z.
    """
    vectors, squares = scaled.directions()
    lengths = squares.sqrt()
    return (vectors * lengths).float(), vectors / lengths
