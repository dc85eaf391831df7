"""Groups (a patient, a burst, a video) that lie in more than one part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from finetune.data.finding import count, some
from finetune.data.remark import Remark
from finetune.data.sample import Dataset
from finetune.preflight.seen import SHOWN_PATHS


def judge_groups(dataset: Dataset) -> Iterator[Remark]:
    """Yield what is to be said of groups; drawn parts never break one."""
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for sample in dataset.samples:
        if sample.group:
            parts[sample.group].add(sample.split)
    broken = sorted(name for name, found in parts.items() if len(found) > 1)
    if broken:
        torn = frozenset(broken)
        paths = [sample.path for sample in dataset.samples if sample.group in torn]
        yield Remark(
            "group-leak",
            "warning",
            f"{len(broken)} of {count(len(parts), 'group lies', 'groups lie')} in more than one part: "
            f"{some(broken)}.",
            "Move each group into one part, or give no val/: then it is drawn by group.",
            len(broken),
            tuple(paths[:SHOWN_PATHS]),
        )
