"""Images that belong together: a patient, a burst, a video. A draw puts a group into one part.

Groups are named by a column of the CSV (``data/table.py``) or by a regular expression on the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from finetune.data.finding import Finding, quoted, some
from finetune.errors import DataError

_MANY = 10
"""Times from which a repetition counts as many, also where their number is fixed."""
_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT"})


def find_groups(finding: Finding, group_by: str | None) -> dict[str, str]:
    """Return the group of each image that belongs to one, by path.

    A column of the CSV comes before a regular expression. The first group of the expression (the whole match
    where it has none) is searched for in the path below the data folder.

    Raises:
        DataError: the expression is none, may take for ever, or finds nothing; the column is empty.
    """
    if group_by is None:
        return {}
    paths = [path for part in finding.parts.values() for own in part.values() for path in own]
    is_column = finding.columns is not None
    groups = _match(_compile(group_by), paths) if finding.columns is None else finding.columns
    if not groups and not is_column:
        found = f"it names no group of any of {len(paths)} images, {some(sorted(paths)[:2])} for example"
        fix = "Write a regular expression that is found in the paths, or name a column of the CSV file."
        raise DataError(f"--group-by {quoted(group_by)}", found, fix)
    if loose := sorted(path for path in paths if path not in groups):
        finding.warn(
            "group-missing",
            f"{len(loose)} of {len(paths)} images belong to no group, and are drawn one by one: "
            f"{some(loose)}.",
            "Fill in the column if they should." if is_column else "Correct --group-by if they should.",
            len(loose),
            loose,
        )
    return groups


def _compile(pattern: str) -> re.Pattern[str]:
    asked = f"--group-by {quoted(pattern)}"
    try:
        compiled, parsed = re.compile(pattern), _parser.parse(pattern)
        if _repeats_choice(parsed, False):
            found = "it repeats a repetition or a choice, which may take for ever"
            raise DataError(asked, found, "Write it without, as [0-9]+ instead of ([0-9]+)+ or ([0-9]|x)+.")
        return compiled
    except (re.error, RecursionError, OverflowError) as error:
        found = f"it is no regular expression ({error})"
        raise DataError(
            asked, found, r"Write one that names the group in a path, as 'patient(\d+)'."
        ) from None


def _repeats_choice(node: Any, is_repeated: bool) -> bool:
    """Tell whether a parsed expression repeats what can be matched in more than one way.

    ``(a+)+`` and ``(a|a)+`` may be matched in so many ways that nobody waits for the last. It is no proof:
    ``a*a*a*a*x`` is slow as well.
    """
    if isinstance(node, tuple) and len(node) == 2 and str(node[0]) in _REPEATS:
        least, most, inner = node[1]
        is_open = int(most) > int(least)
        is_repetition = (is_open and int(most) > 1) or int(most) >= _MANY
        return (is_repeated and is_open) or _repeats_choice(list(inner), is_repeated or is_repetition)
    if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "BRANCH" and is_repeated:
        return True
    is_many = isinstance(node, tuple | list | _parser.SubPattern)
    return is_many and any(_repeats_choice(one, is_repeated) for one in node)


def _match(pattern: re.Pattern[str], paths: Iterable[str]) -> dict[str, str]:
    groups = {}
    for path in paths:
        if found := pattern.search(path):
            name = found.group(1) if pattern.groups else found.group()
            if name:
                groups[path] = name
    return groups
