"""What a label is, and everything that follows from it: one class, several classes, or a number.

The training loss, the activation, the decision, the names of metrics and the columns of prediction files
depend on the kind of label. They are defined here and nowhere else (tests/test_architecture.py checks this):
another kind is one more file and its line in :mod:`finetune.targets.kinds`.
"""

from finetune.targets.columns import (
    PREDICTION_COLUMNS,
    make_unique,
    name_answer_columns,
    name_probabilities,
    read_classes,
)
from finetune.targets.kinds import KINDS, SINGLE, fit_target, name_target, read_target
from finetune.targets.metrics import (
    CARD_METRICS,
    CLASS_METRICS,
    DETAIL_METRICS,
    HEADLINE_METRICS,
    METRIC_NAMES,
    PLAIN_METRICS,
    SCORES,
    SERIES_METRICS,
    TOP5_CLASSES,
    Monitor,
)
from finetune.targets.multi_label import MultiLabel, average_precisions
from finetune.targets.number import Number
from finetune.targets.single_label import (
    ACTIVATION,
    LINEAR_CLASSIFIER,
    SingleLabel,
    build_loss,
    compute_class_weights,
    compute_log_odds,
    compute_losses,
    compute_margins,
    compute_mean_loss,
    compute_share,
    decide,
    decide_with_confidence,
    find_in_top_k,
    rank_classes,
    to_logits,
    to_probabilities,
)
from finetune.targets.target import SEPARATOR, ClassWeights, Target, TargetKind, is_better

__all__ = [
    "ACTIVATION",
    "CARD_METRICS",
    "CLASS_METRICS",
    "DETAIL_METRICS",
    "HEADLINE_METRICS",
    "KINDS",
    "LINEAR_CLASSIFIER",
    "METRIC_NAMES",
    "PLAIN_METRICS",
    "PREDICTION_COLUMNS",
    "SCORES",
    "SEPARATOR",
    "SERIES_METRICS",
    "SINGLE",
    "TOP5_CLASSES",
    "ClassWeights",
    "Monitor",
    "MultiLabel",
    "Number",
    "SingleLabel",
    "Target",
    "TargetKind",
    "average_precisions",
    "build_loss",
    "compute_class_weights",
    "compute_log_odds",
    "compute_losses",
    "compute_margins",
    "compute_mean_loss",
    "compute_share",
    "decide",
    "decide_with_confidence",
    "find_in_top_k",
    "fit_target",
    "is_better",
    "make_unique",
    "name_answer_columns",
    "name_probabilities",
    "name_target",
    "rank_classes",
    "read_classes",
    "read_target",
    "to_logits",
    "to_probabilities",
]
