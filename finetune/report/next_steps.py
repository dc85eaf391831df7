"""What to try next: a few rules, each of which speaks only where a number of this run says so."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import islice

from finetune.report.facts import Facts, finite

MOST = 6
"""Sentences on the page; the first rules matter most."""
WIDE = 0.08
"""Points between the ends of accuracy's interval from which on two models can hardly be told apart."""
FEW = 50
"""Training images of a class below which each more one counts."""
UNEVEN = 5.0
"""Largest to smallest class."""
GAP = 1.5
"""Validation loss over training loss, at the best epoch."""
MISCALIBRATED = 0.05
SURE = 0.95
WAITING = 0.3
"""Share of the training time spent waiting for images."""

Step = tuple[str, str]
"""What to try, and the numbers it follows from."""


def suggest_steps(facts: Facts) -> list[Step]:
    """Return at most ``MOST`` suggestions, the weightiest first."""
    rules = (
        _mend_data,
        _look_at_sure_mistakes,
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
        yield "Mend what the data check found, then train again.", f"The check reports {found} (above)."


def _look_at_sure_mistakes(facts: Facts) -> Iterator[Step]:
    sure = [one for one in facts.mistakes if one.confidence >= SURE]
    if len(sure) >= 3:
        yield (
            "Look at the surest mistakes: many of them may be wrong labels. "
            f"`finetune check --run {shlex.quote(str(facts.folder.path))}` lists the likely ones.",
            f"{len(sure)} of {len(facts.mistakes)} mistakes have a confidence of {100 * SURE:.0f} % or more.",
        )


def _set_a_test_part_aside(facts: Facts) -> Iterator[Step]:
    judged = facts.number("num_samples")
    if facts.metrics.get("split_chose_checkpoint") is True and judged:
        yield (
            "Keep some images in a `test/` folder, by which nothing is chosen; quote the accuracy there.",
            f"The {judged:.0f} images that are reported here also chose the epoch.",
        )


def _train_longer(facts: Facts) -> Iterator[Step]:
    best, epochs = facts.number("best_epoch"), facts.number("epochs")
    if best and best == epochs and len(facts.history) > 1:
        yield (
            "Train longer (`--epochs`): the end was not reached.",
            f"The best epoch was the last one, {best:.0f} of {epochs:.0f}.",
        )


def _hold_back(facts: Facts) -> Iterator[Step]:
    best = facts.number("best_epoch")
    row = next((row for row in facts.history if row.get("epoch") == best), None)
    if row is None or "train_loss" not in row or "eval_loss" not in row:
        return
    train, judged = row["train_loss"], row["eval_loss"]
    if train > 0 and judged / train >= GAP and judged - train >= 0.1:
        yield (
            "Hold the network back: heavier augmentation (`input.augmentation`), fewer stages that learn, "
            "or more images.",
            f"At the best epoch the loss was {train:.2f} in training and {judged:.2f} in validation.",
        )


def _tell_a_pair_apart(facts: Facts) -> Iterator[Step]:
    wrong = sum(count for _, _, count, _ in facts.confused)
    if len(facts.classes) < 3 or wrong < 8:
        return
    both: dict[frozenset[str], int] = {}
    for label, guess, count, _ in facts.confused:
        pair = frozenset((label, guess))
        both[pair] = both.get(pair, 0) + count
    pair, count = max(both.items(), key=lambda item: item[1])
    if count >= max(5, 0.25 * wrong):
        one, other = sorted(pair)
        yield (
            f"Look at {one} and {other} side by side: add images that show the difference, "
            "or try a larger `--img-size`.",
            f"{count} of {wrong} mistakes are between these two.",
        )


def _find_a_weak_class(facts: Facts) -> Iterator[Step]:
    accuracy = facts.number("balanced_accuracy")
    rows = [(_number(row["recall"]), _number(row["support"]), row["label"]) for row in facts.per_class]
    known = [(recall, support, label) for recall, support, label in rows if recall is not None and support]
    if accuracy is None or len(known) < 3:
        return
    solid = [row for row in known if row[1] is not None and row[1] >= 10]
    recall, support, label = min(solid, default=(1.0, 0.0, ""))
    if accuracy - recall >= 0.2:
        yield (
            f"Add training images of {label}, or look whether its label is clear.",
            f"{100 * recall:.0f} % of its {support:.0f} images were found; over all classes the mean is "
            f"{100 * accuracy:.0f} %.",
        )


def _number(text: str) -> float | None:
    try:
        return finite(float(text))
    except ValueError:
        return None


def _train_counts(facts: Facts) -> list[tuple[int, str]]:
    counts: Mapping[str, int] = facts.counts.get("train", {})  # of a run only
    return sorted((count, label) for label, count in counts.items())


def _weigh_classes(facts: Facts) -> Iterator[Step]:
    counts = _train_counts(facts)
    weighed = facts.recipe is not None and facts.recipe.training.class_weights == "balanced"
    if counts and counts[-1][0] / counts[0][0] >= UNEVEN and not weighed:
        (least, rare), (most, common) = counts[0], counts[-1]
        yield (
            "Weigh the classes evenly (`--set training.class_weights=balanced`), or add images of rare ones.",
            f"{common} has {most} training images and {rare} has {least}, a ratio of {most / least:.0f}.",
        )


def _add_images(facts: Facts) -> Iterator[Step]:
    few = [(count, label) for count, label in _train_counts(facts) if count < FEW]
    if few:
        count, label = few[0]
        more = "" if len(few) == 1 else f", and {len(few) - 1} other classes have fewer than {FEW}"
        yield "More training images would help most of all.", f"{label} has {count}{more}."


def _judge_more(facts: Facts) -> Iterator[Step]:
    pair, judged = facts.interval("accuracy"), facts.number("num_samples")
    if pair and judged and pair[1] - pair[0] >= WIDE:
        yield (
            "Judge on more images before you choose between models, or repeat the run (`--repeats`).",
            f"All that {judged:.0f} images say is that the accuracy lies between {100 * pair[0]:.1f} and "
            f"{100 * pair[1]:.1f} %.",
        )


def _trust_probabilities(facts: Facts) -> Iterator[Step]:
    before, after = facts.number("calibration", "ece"), facts.number("calibration", "ece_calibrated")
    if after is not None and before is not None and after >= MISCALIBRATED:
        yield (
            "Do not read the probabilities literally; collect more validation images to calibrate on.",
            f"After calibration, confidence and accuracy are {100 * after:.1f} points apart (ECE); "
            f"before, {100 * before:.1f}.",
        )


def _feed_faster(facts: Facts) -> Iterator[Step]:
    waiting = facts.number("data_wait_fraction")
    if waiting is not None and waiting >= WAITING:
        yield (
            "Give it more decoding processes (`--workers`).",
            f"{100 * waiting:.0f} % of the training time was spent waiting for images.",
        )


def _lower_the_rate(facts: Facts) -> Iterator[Step]:
    skipped, back = facts.number("skipped_steps") or 0, facts.number("rollbacks") or 0
    if skipped or back:
        yield (
            "Lower the learning rate (`--lr`).",
            f"{skipped:.0f} steps were left out and {back:.0f} epochs begun again: no finite numbers.",
        )
