"""Images that belong together: a patient, a burst, a video. A draw puts a group into one part.

Groups are named by a column of the CSV (``data/table.py``) or by a regular expression on the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetune.data.finding import Finding, quoted, some
from finetune.errors import DataError

_NESTED = re.compile(r"\((?:[^()\\]|\\.)*[+*}](?:[^()\\]|\\.)*\)[+*{]")
"""A repetition of a repetition, ``(a+)+``: it may take longer than anybody waits."""


def find_groups(finding: Finding, group_by: str | None) -> dict[str, str]:
    """Return the group of each image that belongs to one, by path.

    A column of the CSV comes before a regular expression. The first group of the expression (the whole match
    where it has none) is searched for in the path below the data folder.

    Raises:
        DataError: the expression is none, may take for ever, or finds nothing; the column is empty.
    """
    if group_by is None or finding.columns:
        return finding.columns
    paths = [path for part in finding.parts.values() for own in part.values() for path in own]
    groups = _match(_compile(group_by), paths)
    if not groups:
        found = f"it names no group of any of {len(paths)} images, {some(sorted(paths)[:2])} for example"
        fix = "Write a regular expression that is found in the paths, or name a column of the CSV file."
        raise DataError(f"--group-by {quoted(group_by)}", found, fix)
    if loose := sorted(path for path in paths if path not in groups):
        finding.warn(
            "group-missing",
            f"{len(loose)} of {len(paths)} images belong to no group, and are drawn one by one: "
            f"{some(loose)}.",
            "Correct --group-by if they should.",
            len(loose),
            loose,
        )
    return groups


def _compile(pattern: str) -> re.Pattern[str]:
    asked = f"--group-by {quoted(pattern)}"
    if _NESTED.search(pattern):
        found = "it repeats a repetition, which may take for ever"
        raise DataError(asked, found, "Write it without, as [0-9]+ instead of ([0-9]+)+.")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        found = f"it is no regular expression ({error})"
        raise DataError(
            asked, found, r"Write one that names the group in a path, as 'patient(\d+)'."
        ) from None


def _match(pattern: re.Pattern[str], paths: Iterable[str]) -> dict[str, str]:
    groups = {}
    for path in paths:
        if found := pattern.search(path):
            name = found.group(1) if pattern.groups else found.group()
            if name:
                groups[path] = name
    return groups
