"""What to try next: rules that each give a suggestion if a number of this run supports it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import islice

from finetune.report.facts import Facts, finite_text
from finetune.report.neighbours import find_better_linear
from finetune.strategies import find_strategy

MOST = 6
"""Largest number of suggestions on the page; the most important rules come first."""
WIDE = 0.08
"""Width of the accuracy's 95 % interval above which models are hard to compare."""
FEW = 50
"""Training images of a class below which more images help most."""
UNEVEN = 5.0
"""Ratio of the largest to the smallest class from which class weights are suggested."""
GAP = 1.5
"""Ratio of validation loss to training loss at the best epoch that counts as overfitting."""
MISCALIBRATED = 0.05
"""ECE after calibration from which the probabilities count as unreliable."""
SURE = 0.95
"""Confidence from which a mistake may be a wrong label."""
WAITING = 0.3
"""Share of the training time spent waiting for images that counts as slow loading."""

Step = tuple[str, str]
"""A suggestion, and the numbers that support it."""


def suggest_steps(facts: Facts) -> list[Step]:
    """Return at most ``MOST`` suggestions, the most important first."""
    rules = (
        _mend_data,
        _explain_the_gap,
        _look_at_sure_mistakes,
        _take_the_next_strategy,
        _set_a_test_part_aside,
        _train_longer,
        _hold_back,
        _tell_a_pair_apart,
        _find_a_weak_class,
        _weigh_classes,
        _add_images,
        _judge_more,
        _trust_probabilities,
        _feed_faster,
        _lower_the_rate,
    )
    return list(islice((step for rule in rules for step in rule(facts)), MOST))


def _mend_data(facts: Facts) -> Iterator[Step]:
    counts = dict.fromkeys(("error", "warning"), 0)
    for finding in facts.findings:
        if finding.severity in counts:
            counts[finding.severity] += 1
    if any(counts.values()):
        found = " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if count)
        yield "Fix what the data check found, then train again.", f"The check reports {found} (above)."


def _explain_the_gap(facts: Facts) -> Iterator[Step]:
    cross, val = (facts.number("advice_gap", key) for key in ("cross_validated", "val"))
    if cross is not None and val is not None:
        yield (
            "Find out whether training images come in groups (bursts, patients, frames), and name them with "
            "`--group-by`; or whether the validation images are of another kind.",
            f"The strategy was chosen by a cross-validated accuracy of {100 * cross:.1f} %, and the "
            f"validation accuracy is {100 * val:.1f} %: their 95 % intervals do not meet.",
        )


def _look_at_sure_mistakes(facts: Facts) -> Iterator[Step]:
    sure = [mistake for mistake in facts.mistakes if mistake.size >= SURE]
    if len(sure) >= 3 and facts.target.has_classes:
        yield (
            "Look at the most confident mistakes: some of them may be wrong labels. "
            f"`finetune check --run {shlex.quote(str(facts.folder.path))}` lists the probable ones.",
            f"{len(sure)} of {len(facts.mistakes)} mistakes have a confidence of {100 * SURE:.0f} % or more.",
        )


def _take_the_next_strategy(facts: Facts) -> Iterator[Step]:
    """Suggest a floor where a linear classifier was better on the same images, else the next strategy."""
    accuracy = facts.number("accuracy")
    strategy = facts.recipe.strategy if facts.recipe else None
    if strategy is None or accuracy is None or accuracy == 1 or strategy.features or strategy.floor:
        return
    known = find_strategy(strategy.name)
    key = "features" if known.solvable else "floor" if known.fine_tunes else None
    linear = find_better_linear(facts) if key else None
    if linear is not None:
        yield (
            f"Train again with `--set strategy.{key}={linear.features}`: the linear classifier on these "
            f"features {'replaces' if known.solvable else 'is kept unless it loses to'} training.",
            f"It classified {100 * linear.accuracy:.1f} % of the same images correctly ({linear.run}), and "
            f"this network {100 * accuracy:.1f} %.",
        )
    elif known.wider and not facts.advice:
        yield (
            f"Train more stages: `--strategy {known.wider}` with a new `--output`, then "
            "`finetune compare` with both runs.",
            f"`{strategy.name}` classified {100 * accuracy:.1f} % correctly.",
        )


def _set_a_test_part_aside(facts: Facts) -> Iterator[Step]:
    num_samples = facts.number("num_samples")
    if facts.metrics.get("split_chose_checkpoint") is True and num_samples:
        yield (
            "Keep some images in a `test/` folder that is used for nothing else, and report its accuracy.",
            f"The {num_samples:.0f} images evaluated here were also used to choose the epoch.",
        )


def _train_longer(facts: Facts) -> Iterator[Step]:
    best, epochs = facts.number("best_epoch"), facts.number("epochs")
    if best and best == epochs and len(facts.history) > 1:
        yield (
            "Train longer (`--epochs`): the metric was still improving.",
            f"The best epoch was the last one, {best:.0f} of {epochs:.0f}.",
        )


def _hold_back(facts: Facts) -> Iterator[Step]:
    best = facts.number("best_epoch")
    row = next((row for row in facts.history if row.get("epoch") == best), None)
    if row is None or "train_loss" not in row or "eval_loss" not in row:
        return
    train, val = row["train_loss"], row["eval_loss"]
    if train > 0 and val / train >= GAP and val - train >= 0.1:
        yield (
            "Reduce overfitting: stronger augmentation (`--augmentation`), more weight decay "
            "(`--weight-decay`), or more images.",
            f"At the best epoch the training loss was {train:.2f} and the validation loss {val:.2f}.",
        )


def _tell_a_pair_apart(facts: Facts) -> Iterator[Step]:
    wrong = sum(count for _, _, count, _ in facts.confused)
    if len(facts.classes) < 3 or wrong < 8:
        return
    two = facts.confused_two[0]
    if two.mistakes >= max(5, 0.25 * wrong):
        yield (
            f"Compare images of {two.first} and {two.second}: add images that show the difference, "
            "or try a larger `--img-size`.",
            f"{two.mistakes} of {wrong} mistakes are between these two.",
        )


def _find_a_weak_class(facts: Facts) -> Iterator[Step]:
    accuracy = facts.number("balanced_accuracy")
    rows = [
        (finite_text(row["recall"]), finite_text(row["support"]), row["label"]) for row in facts.per_class
    ]
    known = [(recall, support, label) for recall, support, label in rows if recall is not None and support]
    if accuracy is None or len(known) < 3:
        return
    solid = [row for row in known if row[1] is not None and row[1] >= 10]
    recall, support, label = min(solid, default=(1.0, 0.0, ""))
    if accuracy - recall >= 0.2:
        yield (
            f"Add training images of {label}, or check whether the class is clearly defined.",
            f"{100 * recall:.0f} % of its {support:.0f} images were classified correctly; the mean over all "
            f"classes is {100 * accuracy:.0f} %.",
        )


def _train_counts(facts: Facts) -> list[tuple[int, str]]:
    counts: Mapping[str, int] = facts.counts.get("train", {})  # only a run has them, not an evaluation
    return sorted((count, label) for label, count in counts.items())


def _weigh_classes(facts: Facts) -> Iterator[Step]:
    counts = _train_counts(facts)
    weighted = facts.recipe is not None and facts.recipe.training.class_weights == "balanced"
    if counts and counts[-1][0] / counts[0][0] >= UNEVEN and not weighted:
        (least, rare), (most, common) = counts[0], counts[-1]
        yield (
            "Weight the classes inversely to their size (`--set training.class_weights=balanced`), or add "
            "images of the small ones.",
            f"{common} has {most} training images and {rare} has {least}, a ratio of {most / least:.0f}.",
        )


def _add_images(facts: Facts) -> Iterator[Step]:
    few = [(count, label) for count, label in _train_counts(facts) if count < FEW]
    if few:
        count, label = few[0]
        more = "" if len(few) == 1 else f", and {len(few) - 1} other classes have fewer than {FEW}"
        run = shlex.quote(str(facts.folder.path))
        yield (
            f"More training images would help most; `finetune forecast {run}` says by how much.",
            f"{label} has {count} training images{more}.",
        )


def _judge_more(facts: Facts) -> Iterator[Step]:
    pair, num_samples = facts.interval("accuracy"), facts.number("num_samples")
    if pair and num_samples and pair[1] - pair[0] >= WIDE:
        yield (
            "Evaluate on more images before you choose between models, or repeat the run (`--repeats`).",
            f"With {num_samples:.0f} images the 95 % interval of the accuracy is {100 * pair[0]:.1f} to "
            f"{100 * pair[1]:.1f} %.",
        )


def _trust_probabilities(facts: Facts) -> Iterator[Step]:
    before, after = facts.number("calibration", "ece"), facts.number("calibration", "ece_calibrated")
    if after is not None and before is not None and after >= MISCALIBRATED:
        yield (
            "Do not rely on the probabilities; collect more validation images to calibrate on.",
            f"After calibration, confidence and accuracy differ by {100 * after:.1f} points (ECE); "
            f"before, by {100 * before:.1f}.",
        )


def _feed_faster(facts: Facts) -> Iterator[Step]:
    waiting = facts.number("data_wait_fraction")
    if waiting is not None and waiting >= WAITING:
        yield (
            "Use more decoding processes (`--workers`).",
            f"{100 * waiting:.0f} % of the training time was spent waiting for images.",
        )


def _lower_the_rate(facts: Facts) -> Iterator[Step]:
    skipped, back = facts.number("skipped_steps") or 0, facts.number("rollbacks") or 0
    if skipped or back:
        yield (
            "Lower the learning rate (`--lr`).",
            f"{skipped:.0f} steps were skipped and {back:.0f} epochs restarted because of non-finite values.",
        )
