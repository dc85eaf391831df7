"""Issues of single files: unreadable, misnamed, animated, unusual, plain, too small or too long."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from finetune.data.dataset import BadImage, Issue, Severity
from finetune.data.formats import READ
from finetune.data.quality.subject import SHOWN_PATHS, ScannedDataset
from finetune.data.scan import check_bad
from finetune.errors import DataError, count

SMALL_SIDE = 32
"""Shorter side in pixels below which an image is reported as small."""
LONG = 4.0
"""Ratio of the sides above which an image is reported as long: a centre crop loses 3/4 of it or more."""
PLAIN = 1.0
"""Standard deviation of a thumbnail's grey levels below which an image is reported as plain."""
FEWEST = 20
"""Smallest number of images for which unusual ones are reported."""
ODD, ODD_SHARE = 3, 0.01
"""Largest number and share of unusual images; the larger of the two counts. More are a normal part of the
data."""

_GRAPHIC_MODES = frozenset({"1", "P", "PA"})
"""Pillow modes of drawings: photographs have no palette."""
_PLACEHOLDER = re.compile(
    r"(?<![a-z])((image|img|photo|picture|file|page)[ _-]?)?not[ _-]?(found|available)"
    r"|(?<![a-z])no[ _-]?(image|photo|picture)"
    r"|place[ _-]?holder|unavailable|coming[ _-]?soon"
    r"|(?<![a-z])((image|photo|picture)[ _-]?missing|missing[ _-]?(image|photo|picture))",
    re.IGNORECASE,
)
"""Matches whole words only: "piano photo" and "volcano picture" are not placeholders."""

_REASONS = (
    ("file-empty", "empty file", "{} without content", "Copy or download them again."),
    ("file-truncated", "truncated", "{} truncated", "Download or copy them again."),
    (
        "file-no-image",
        "git-lfs",
        "{} that are pointers of git-lfs, not images",
        "Fetch the images with git lfs pull.",
    ),
    (
        "file-no-image",
        "not an image",
        "{} with an image's name that are not images",
        "Remove them; they may be saved error pages.",
    ),
    (
        "picture-too-large",
        "more than",
        "{} over a limit of size or of the time to decode them",
        "Make them smaller and save them again, or remove them.",
    ),
    (
        "file-format",
        "convert",
        "{} in a format or with bands that are not read",
        "Convert them to JPEG or PNG.",
    ),
    ("file-unreadable", "", "{} that cannot be read", "Replace or remove them."),
)
"""Code, phrase in the decoder's reason, message and fix of each kind of unreadable file."""
UNREADABLE = frozenset(code for code, *_ in _REASONS)


_KINDS = (
    (
        "named",
        "picture-placeholder",
        "named like a placeholder",
        "Look at them, and remove placeholders.",
    ),
    (
        "odd",
        "picture-odd",
        "unlike the others, nearly all {main} photographs",
        "Look at them: placeholders and drawings often have another format.",
    ),
    (
        "disguised",
        "file-disguised",
        "in another format than the name says",
        "They are read by their content; rename them.",
    ),
    (
        "animated",
        "picture-animated",
        "with several frames, of which only the first is used",
        "Save the frames as separate files to use all.",
    ),
    ("plain", "picture-plain", "of one colour", "Look at them, and remove those that show nothing."),
    (
        "small",
        "picture-small",
        f"with a shorter side under {SMALL_SIDE} pixels",
        "Use larger originals, if there are any.",
    ),
    (
        "long",
        "picture-long",
        f"more than {LONG:g} times as long as wide, or as wide as long",
        "Crop them, or add --resize pad or --resize squash: a centre crop sees only part of them.",
    ),
    (
        "other_size",
        "size-odd",
        "with another size than nearly all others",
        "Look at them: they may come from another source.",
    ),
)
"""Attribute of ``Oddities``, code, message and fix of each kind of unusual image."""
_SHOWING_FORMAT = frozenset({"picture-placeholder", "picture-odd", "file-disguised", "picture-animated"})
"""Codes of issues that show format and mode of the images; the others show the size."""


@dataclass(frozen=True)
class Oddities:
    """Unusual images, as indices into ``ScannedDataset.samples``.

    Attributes:
        disguised: images in another format than their names say.
        animated: images with more than one frame.
        odd: images with a format or a palette that hardly any other image has.
        named: images named like a placeholder for a missing image.
        plain: images of one colour.
        small: images whose shorter side is below ``SMALL_SIDE``.
        long: images whose sides have a ratio above ``LONG``.
        other_size: images of another size, if nearly all have the same size.
    """

    disguised: Sequence[int]
    animated: Sequence[int]
    odd: Sequence[int]
    named: Sequence[int]
    plain: Sequence[int]
    small: Sequence[int]
    long: Sequence[int]
    other_size: Sequence[int]


def find_unreadable_issues(scanned: ScannedDataset) -> Iterator[Issue]:
    """Yield the issues of unreadable files by kind; they are errors if a run would refuse the dataset."""
    bad = scanned.checked.bad
    severity: Severity = "warning"
    try:
        check_bad(scanned.dataset, bad)
    except DataError:
        severity = "error"
    kinds: defaultdict[str, list[BadImage]] = defaultdict(list)
    for image in bad:
        kinds[next(phrase for _, phrase, _, _ in _REASONS if phrase in image.reason)].append(image)
    for code, phrase, found, fix in _REASONS:
        if own := kinds[phrase]:
            shown = ", ".join(f"{image.path} ({image.reason})" for image in own[:3])
            what = found.format(count(len(own), "file"))
            paths = tuple(image.path for image in own[:SHOWN_PATHS])
            yield Issue(code, severity, f"{what}: {shown}{_more(len(own), 3)}.", fix, len(own), paths)


def find_oddities(scanned: ScannedDataset) -> Oddities:
    """Return the unusual images."""
    rows, indices = scanned.scan.rows, range(len(scanned.samples))
    widths, heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    names = [PurePosixPath(sample.path) for sample in scanned.samples]
    suffixes, stems = [name.suffix.lower() for name in names], [name.stem for name in names]
    return Oddities(
        disguised=[
            index for index in indices if _is_disguised(suffixes[index], scanned.scan.format_of(index))
        ],
        animated=np.flatnonzero(rows["is_animated"]).tolist(),
        odd=_find_odd(scanned),
        named=[index for index in indices if _PLACEHOLDER.search(stems[index])],
        plain=np.flatnonzero(scanned.contrasts < PLAIN).tolist(),
        small=np.flatnonzero(short < SMALL_SIDE).tolist(),
        long=np.flatnonzero(long > LONG * short).tolist(),
        other_size=list(_find_rare(list(zip(widths.tolist(), heights.tolist(), strict=True)))),
    )


def _is_disguised(suffix: str, form: str) -> bool:
    """Return whether a suffix belongs to another format; a CSV file may name files with any suffix."""
    return READ.get(suffix, form) != form


def _find_odd(scanned: ScannedDataset) -> list[int]:
    """Return the images with a rare format, and drawings among photographs or photographs among drawings."""
    indices = range(len(scanned.samples))
    formats = [scanned.scan.format_of(index) for index in indices]
    drawn = [scanned.scan.mode_of(index) in _GRAPHIC_MODES for index in indices]
    return sorted({*_find_rare(formats), *_find_rare(drawn)})


def _find_rare(values: Sequence[object]) -> Iterator[int]:
    """Yield the indices of values other than the most frequent one, if nearly all have that one."""
    if len(values) < FEWEST:
        return
    main, number = Counter(values).most_common(1)[0]
    if len(values) - number <= max(ODD, ODD_SHARE * len(values)):
        yield from (index for index, value in enumerate(values) if value != main)


def find_oddity_issues(scanned: ScannedDataset, odd: Oddities) -> Iterator[Issue]:
    """Yield the issues of unusual images."""
    formats = Counter(scanned.scan.format_of(index) for index in range(len(scanned.samples)))
    main = formats.most_common(1)[0][0] if formats else ""
    for field, code, description, fix in _KINDS:
        if indices := getattr(odd, field):
            shown = ", ".join(_describe(scanned, index, code in _SHOWING_FORMAT) for index in indices[:3])
            number = count(len(indices), "image")
            message = f"{number} {description.format(main=main)}: {shown}{_more(len(indices), 3)}."
            yield Issue(code, "warning", message, fix, len(indices), scanned.first_paths(indices))


def _describe(scanned: ScannedDataset, index: int, shows_format: bool) -> str:
    path = scanned.samples[index].path
    if not shows_format:
        return f"{path} ({scanned.scan.rows['width'][index]} x {scanned.scan.rows['height'][index]})"
    return f"{path} ({scanned.scan.format_of(index)}, {scanned.scan.mode_of(index)})"


def _more(total: int, shown: int) -> str:
    return f" and {total - shown} more" if total > shown else ""
