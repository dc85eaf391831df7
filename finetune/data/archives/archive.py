"""Unpack an untrusted zip or tar archive into the user's cache, once.

Names and sizes in an archive are whatever its author wrote. So all names are checked before a byte is
written (:mod:`finetune.data.archives.plan`), bytes are counted as they are unpacked, and only images and
tables are unpacked. The folder gets its final name when it is complete, so that name never holds half an
archive.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from finetune.data.archives.entries import (
    GuardedFile,
    TarEntries,
    ZipEntries,
    archive_faults,
    archive_stem,
    is_archive,
    is_unread_archive,
)
from finetune.data.archives.plan import (
    MAX_ENTRIES,
    MAX_NAMES_BYTES,
    REPACK,
    UNPACK,
    Plan,
    check_sizes,
    find_size_fault,
    make_plan,
    too_many,
)
from finetune.data.formats import is_image_name
from finetune.data.layout import (
    SHOWN,
    LayoutReader,
    extension_counts,
    extensions,
    is_junk,
    names_in,
    quoted,
    some,
)
from finetune.data.layouts.split_folders import choose, is_plain, parse
from finetune.runs.cache_dir import make_once
from finetune.runs.files import read_object, write_json
from finetune.system.regular_files import open_regular, open_text

Progress = Callable[[int, int], None]
_Item = TypeVar("_Item")

_LEFT_OUT = ".left-out.json"
_CODEC = ".names.json"


def open_archive(reader: LayoutReader, file: Path, on_progress: Progress | None = None) -> Path:
    """Return the folder that holds the archive's images, unpacked now or by an earlier call.

    Raises:
        DataError: the archive is damaged, hostile, encrypted or over a limit.
        DiskError: the disk is full, or the cache cannot be written.
    """
    digest = _digest(reader, file)
    folder = make_once("archives", digest, lambda target: _unpack(reader, file, target, on_progress))
    _warn_left_out(reader, folder)
    return _entered(folder)


def find_split_archives(folder: Path) -> dict[str, Path]:
    """Return the archives of a folder's splits (``train.zip``, ``test.tar.gz``), by name without suffix.

    Empty if there is none for training, or if there are folders beside them.
    """
    names = [name for name in names_in(folder) if not is_junk(name)]
    packed = [name for name in names if is_archive(name) and (folder / name).is_file()]
    if not packed or any((folder / name).is_dir() for name in names):
        return {}
    by_stem = {archive_stem(name): folder / name for name in packed}
    chosen = choose(by_stem) if len(by_stem) == len(packed) else {}
    return {stem: by_stem[stem] for stems in chosen.values() for stem in stems} if "train" in chosen else {}


def open_split_archives(
    reader: LayoutReader, packed: Mapping[str, Path], on_progress: Progress | None = None
) -> Path:
    """Return a folder that holds the content of each archive in a folder of the archive's name.

    Raises:
        DataError: an archive leads out of the folder, or is damaged, hostile, encrypted or over a limit.
        DiskError: the disk is full, or the cache cannot be written.
    """
    for file in packed.values():
        if file.is_symlink():
            reader.leads_out(file.name)
    reader.check_links()
    _refuse_others(reader, packed)
    digests = {stem: _digest(reader, file) for stem, file in packed.items()}
    name = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]

    def unpack(target: Path) -> None:
        for stem, file in packed.items():
            (target / stem).mkdir(mode=0o700)
            _unpack(reader, file, target / stem, on_progress)

    folder = make_once("archives", name, unpack)
    for stem in packed:
        _warn_left_out(reader, folder / stem)
    files = ", ".join(repr(file.name) for file in packed.values())
    reader.warn("split-names", f"The archives {files} were read as splits.", "Rename them if that is wrong.")
    return folder


def _refuse_others(reader: LayoutReader, packed: Mapping[str, Path]) -> None:
    """Refuse an archive beside those of the splits that may be one, and is not read; warn about others."""
    folder, taken = next(iter(packed.values())).parent, {file.name for file in packed.values()}
    names = [name for name in names_in(folder) if not is_junk(name) and name not in taken]
    others = [name for name in names if is_archive(name) or is_unread_archive(name)]
    if splits := [name for name in others if is_unread_archive(name) and parse(archive_stem(name))]:
        raise reader.error(
            f"holds {some(splits)} beside {some(sorted(taken))}, and only zip, tar and tar.gz are read",
            "Unpack all of them into folders named train, val or test.",
        )
    if others:
        reader.warn(
            "ignored-file",
            f"Beside {some(sorted(taken))}, these archives are not read: {some(others)}.",
            "Unpack what belongs to the data.",
            len(others),
        )


def _digest(reader: LayoutReader, file: Path) -> str:
    try:
        with open_regular(file) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()[:32]
    except OSError as error:
        raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from None


def _unpack(reader: LayoutReader, file: Path, target: Path, on_progress: Progress | None) -> None:
    with _opened(reader, file) as archive:
        plan = make_plan(reader, _guarded(reader, file, archive.entries()))
        check_sizes(reader, plan, file.stat().st_size, target.parent)
        _extract(reader, file, archive, plan, target, on_progress)
    write_json(target / _LEFT_OUT, dict(extension_counts(plan.left_out).most_common(SHOWN)))
    if plan.codec:
        odd = [name for name in sorted(plan.folders | plan.files.keys()) if not name.isascii()]
        write_json(target / _CODEC, plan.codec + (f", as in {quoted(odd[0])}" if odd else ""))


@contextmanager
def _opened(reader: LayoutReader, file: Path) -> Iterator[ZipEntries | TarEntries]:
    """Yield the open archive; of a zip, the table of contents has been read."""
    if file.suffix.lower() != ".zip":
        packed = file.stat().st_size
        yield TarEntries(file, lambda size: _check_unpacked(reader, size, packed))
        return
    with _faults(reader, file):
        guarded = GuardedFile(file, MAX_NAMES_BYTES, MAX_ENTRIES, too_many(reader))
    with guarded:
        with _faults(reader, file):
            archive = ZipEntries(guarded)
        yield archive


def _check_unpacked(reader: LayoutReader, size: int, packed: int) -> None:
    """Refuse a tar file that grows too large, also by what is not unpacked, before more of it is read."""
    if fault := find_size_fault(0, size, packed):
        raise reader.error(fault, UNPACK)


def _faults(reader: LayoutReader, file: Path) -> AbstractContextManager[None]:
    return archive_faults(reader, "zip" if file.suffix.lower() == ".zip" else "tar", REPACK)


def _extract(
    reader: LayoutReader,
    file: Path,
    archive: ZipEntries | TarEntries,
    plan: Plan,
    target: Path,
    on_progress: Progress | None,
) -> None:
    """Write the planned files, counting the bytes that are really unpacked."""
    packed, in_all = file.stat().st_size, 0
    for folder in sorted(plan.folders):
        (target / folder).mkdir(exist_ok=True)
    contents = _guarded(reader, file, archive.contents(plan.files))
    for done, (path, chunks) in enumerate(contents, 1):
        size = 0
        with (target / path).open("xb") as output:
            for chunk in _guarded(reader, file, chunks):
                size, in_all = size + len(chunk), in_all + len(chunk)
                if fault := find_size_fault(size, in_all, packed):
                    raise reader.error(fault, UNPACK)
                output.write(chunk)
        if size != plan.files[path].size:
            found = f"is damaged: {quoted(path)} has {size} bytes, and should have {plan.files[path].size}"
            raise reader.error(found, "Get it or make it again.")
        if on_progress:
            on_progress(done, len(plan.files))


def _guarded(reader: LayoutReader, file: Path, items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items of an archive; errors of reading them become a DataError, others stay what they are."""
    while True:
        with _faults(reader, file):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _warn_left_out(reader: LayoutReader, folder: Path) -> None:
    """Warn about files that are not used, also if the archive was unpacked by an earlier call."""
    with suppress(OSError, ValueError):
        counts = read_object(folder / _LEFT_OUT)
        others = Counter({name: number for name, number in counts.items() if type(number) is int})
        reader.left_out += others
        if others:
            reader.warnings.append(
                f"Files in the archive that are not images are left out{extensions(others, ': ')}."
            )
    with suppress(OSError, ValueError, RecursionError):
        with open_text(folder / _CODEC) as file:
            codec = json.loads(file.read())
        reader.warn(
            "archive-names",
            f"Names in the archive are not UTF-8, and were read as {codec}.",
            "Pack it again with UTF-8 names if they are wrong.",
        )


def _entered(folder: Path) -> Path:
    """Return the folder below the single folders that many archives hold at the top, or the folder itself."""
    while True:
        inside = [entry for entry in os.scandir(folder) if not is_junk(entry.name)]
        if len(inside) != 1 or not inside[0].is_dir() or is_plain(inside[0].name):
            return folder
        top = Path(inside[0].path)  # a folder that holds images is a class; one that holds lists is not
        if any(map(is_image_name, names_in(top))):
            return folder
        folder = top
