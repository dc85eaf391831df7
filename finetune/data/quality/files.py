"""What single files are: unreadable, disguised, animated, the odd one out, plain, too small, too long."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from finetune.data.dataset import BadImage, Issue, Severity
from finetune.data.layout import count
from finetune.data.quality.subject import SHOWN_PATHS, ScannedDataset
from finetune.data.scan import check_bad
from finetune.errors import DataError

SMALL_SIDE = 32
"""Pixels of the shorter side under which an image shows little."""
LONG = 4.0
"""Longer to shorter side from which a centre crop loses three quarters of an image and more."""
PLAIN = 1.0
"""Deviation of a thumbnail's grey levels under which there is nothing to see."""
FEWEST = 20
"""Images from which one can be odd."""
ODD, ODD_SHARE = 3, 0.01
"""Most images that are odd: so many, or that share; more are a part of the data."""

_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
}
_GRAPHIC_MODES = frozenset({"1", "P", "PA"})
"""Of drawings: photographs have no palette."""
_PLACEHOLDER = re.compile(
    r"(?<![a-z])((image|img|photo|picture|file|page)[ _-]?)?not[ _-]?(found|available)"
    r"|(?<![a-z])no[ _-]?(image|photo|picture)"
    r"|place[ _-]?holder|unavailable|coming[ _-]?soon"
    r"|(?<![a-z])((image|photo|picture)[ _-]?missing|missing[ _-]?(image|photo|picture))",
    re.IGNORECASE,
)
"""Matches whole words only: "piano photo" and "volcano picture" are not placeholders."""

_REASONS = (
    ("file-empty", "empty file", "{} without a byte", "Copy or download them again."),
    ("file-truncated", "truncated", "{} cut short", "Download or copy them again."),
    (
        "file-no-image",
        "not an image",
        "{} with an image's name that are not images",
        "Remove them; they may be saved error pages.",
    ),
    (
        "picture-too-large",
        "more than",
        "{} over the limits of pixels or bytes",
        "Make them smaller, or remove them.",
    ),
    ("file-unreadable", "", "{} that cannot be read", "Replace or remove them."),
)
"""Code, what the decoder's reason holds, what was found, and what to do."""
UNREADABLE = frozenset(code for code, *_ in _REASONS)


_KINDS = (
    (
        "named",
        "picture-placeholder",
        "named like a placeholder",
        "Look at it, and remove it.",
    ),
    (
        "odd",
        "picture-odd",
        "unlike the others, nearly all {main} photographs",
        "Look at it: placeholders and drawings are often of another format.",
    ),
    (
        "disguised",
        "file-disguised",
        "not what the name says",
        "It is read by its content; rename it.",
    ),
    (
        "animated",
        "picture-animated",
        "with several frames, of which only the first is used",
        "Save the frames as separate files to use all.",
    ),
    ("plain", "picture-plain", "of one colour", "Look at it, and remove it if it shows nothing."),
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
        "Crop them, or add --set input.crop_mode=border: a centre crop sees only part of them.",
    ),
    (
        "other_size",
        "size-odd",
        "with another size than nearly all others",
        "Look at it: it may come from another source.",
    ),
)
"""Of oddities: which, code, what is said, what to do."""
_BY_KIND = frozenset({"picture-placeholder", "picture-odd", "file-disguised", "picture-animated"})
"""Of which format and mode are shown; of the others, the size."""


@dataclass(frozen=True)
class Oddities:
    """Places in ``ScannedDataset.samples`` of images that stand out.

    Attributes:
        disguised: of another format than their names say.
        animated: with more than one frame.
        odd: of a format, or with a palette, that hardly any other has.
        named: called like the image for a missing image.
        plain: one colour.
        small: their shorter sides have few pixels.
        long: much longer than wide, or wider than long.
        other_size: where nearly all have one size, the others.
    """

    disguised: Sequence[int]
    animated: Sequence[int]
    odd: Sequence[int]
    named: Sequence[int]
    plain: Sequence[int]
    small: Sequence[int]
    long: Sequence[int]
    other_size: Sequence[int]


def find_unreadable_issues(seen: ScannedDataset) -> Iterator[Issue]:
    """Yield what is to be said of files that cannot be decoded, by kind; errors where a run would refuse."""
    bad = seen.checked.bad
    severity: Severity = "warning"
    try:
        check_bad(seen.dataset, bad)
    except DataError:
        severity = "error"
    kinds: defaultdict[str, list[BadImage]] = defaultdict(list)
    for image in bad:
        kinds[next(code for code, word, _, _ in _REASONS if word in image.reason)].append(image)
    for code, _, found, fix in _REASONS:
        if own := kinds[code]:
            shown = ", ".join(f"{image.path} ({image.reason})" for image in own[:3])
            what = found.format(count(len(own), "file", "files"))
            paths = tuple(image.path for image in own[:SHOWN_PATHS])
            yield Issue(code, severity, f"{what}: {shown}{_more(len(own), 3)}.", fix, len(own), paths)


def find_oddities(seen: ScannedDataset) -> Oddities:
    """Return the images that stand out."""
    rows, places = seen.scan.rows, range(len(seen.samples))
    widths, heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    names = [PurePosixPath(sample.path) for sample in seen.samples]
    suffixes, stems = [name.suffix.lower() for name in names], [name.stem for name in names]
    return Oddities(
        disguised=[place for place in places if _is_disguised(suffixes[place], seen.scan.format_of(place))],
        animated=np.flatnonzero(rows["is_animated"]).tolist(),
        odd=_find_odd(seen),
        named=[place for place in places if _PLACEHOLDER.search(stems[place])],
        plain=np.flatnonzero(seen.contrasts < PLAIN).tolist(),
        small=np.flatnonzero(short < SMALL_SIDE).tolist(),
        long=np.flatnonzero(long > LONG * short).tolist(),
        other_size=list(_rare(list(zip(widths.tolist(), heights.tolist(), strict=True)))),
    )


def _is_disguised(suffix: str, form: str) -> bool:
    """Tell whether a name says another format; a table may name files whose names say none."""
    return _FORMATS.get(suffix, form) != form


def _find_odd(seen: ScannedDataset) -> list[int]:
    """Return images of a format that few have among many of another one, and drawings among photographs."""
    places = range(len(seen.samples))
    formats = [seen.scan.format_of(place) for place in places]
    drawn = [seen.scan.mode_of(place) in _GRAPHIC_MODES for place in places]
    return sorted({*_rare(formats), *_rare(drawn)})


def _rare(values: Sequence[object]) -> Iterator[int]:
    """Yield the places of values other than the main one, where that is nearly all."""
    if len(values) < FEWEST:
        return
    main, number = Counter(values).most_common(1)[0]
    if len(values) - number <= max(ODD, ODD_SHARE * len(values)):
        yield from (place for place, value in enumerate(values) if value != main)


def find_oddity_issues(seen: ScannedDataset, odd: Oddities) -> Iterator[Issue]:
    """Yield what is to be said of images that stand out."""
    formats = Counter(seen.scan.format_of(place) for place in range(len(seen.samples)))
    main = formats.most_common(1)[0][0] if formats else ""
    for field, code, said, fix in _KINDS:
        if places := getattr(odd, field):
            shown = ", ".join(_named(seen, place, code in _BY_KIND) for place in places[:3])
            number = count(len(places), "image", "images")
            words = f"{number} {said.format(main=main)}: {shown}{_more(len(places), 3)}."
            yield Issue(code, "warning", words, fix, len(places), seen.paths(places))


def _named(seen: ScannedDataset, place: int, words: bool) -> str:
    path = seen.samples[place].path
    if not words:
        return f"{path} ({seen.scan.rows['width'][place]} x {seen.scan.rows['height'][place]})"
    return f"{path} ({seen.scan.format_of(place)}, {seen.scan.mode_of(place)})"


def _more(total: int, shown: int) -> str:
    return f" and {total - shown} more" if total > shown else ""
