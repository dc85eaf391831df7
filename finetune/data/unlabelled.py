"""Pictures without labels, for whoever only looks at them: every image below a folder."""

from __future__ import annotations

from pathlib import Path

from finetune.data.archive import Progress
from finetune.data.discover import discover
from finetune.data.finding import SPLIT_NAMES, Finding, is_junk, names_in, printable
from finetune.data.folders import images_below
from finetune.data.sample import Dataset, Sample
from finetune.data.split import SplitConfig


def find_pictures(
    data: Path, config: SplitConfig, follow_links: bool = False, on_progress: Progress | None = None
) -> Dataset:
    """Return what :func:`finetune.data.discover.discover` finds, or every image of a folder without classes.

    A folder has no classes when it holds fewer than two folders, and none that is called as a part. Its
    pictures have the label -1, and the data set no classes.

    Raises:
        DataError: there is no image, or what is there has more than one reading.
    """
    if not _is_unlabelled(data):
        return discover(data, config, follow_links, on_progress)
    finding = Finding(f"--data {printable(data)}", data.absolute(), follow_links=follow_links)
    images, _ = images_below(finding, "")
    finding.check_links()
    if not images:
        raise finding.refuse("holds no images", "Give a folder of images or a CSV file.")
    return Dataset(finding.root, (), tuple(Sample(path, -1, "train") for path in images))


def _is_unlabelled(data: Path) -> bool:
    if not data.is_dir():
        return False
    folders = [name for name in names_in(data) if not is_junk(name) and (data / name).is_dir()]
    return len(folders) < 2 and not any(name.lower() in SPLIT_NAMES for name in folders)
