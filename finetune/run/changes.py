"""Is it still the same run? Images, weights and versions, compared with those it began with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from finetune.data.dataset import Dataset, describe_images
from finetune.data.scan import Checked, check_images
from finetune.data.scan_cache import ScanCache
from finetune.errors import DataError
from finetune.runs.claim import Claim, find_changed_environment, find_changed_images
from finetune.runs.reader import RunReader
from finetune.system.display import Display

WEIGHTS = "weights_sha256"
_HARMLESS = ("platform", "cores", "device")
"""Of the environment: other values leave every bit as it is (a device is a key of the recipe)."""


class RunChanges:
    """Says how a run differs from what an earlier attempt at it began with.

    Args:
        dataset: the images there are now.
        environment: versions, hardware and the digest of the weights.
        display: shows how far the look at the images is.
    """

    def __init__(self, dataset: Dataset, environment: dict[str, Any], display: Display) -> None:
        self.dataset, self.environment, self._display = dataset, environment, display

    @cached_property
    def checked(self) -> Checked:
        """Every image, decoded once."""
        return self._look("checking images", decode=True)

    @cached_property
    def read(self) -> Checked:
        """Every image, only read: enough where nothing will be trained."""
        return self._look("comparing images", decode=False)

    def _look(self, what: str, decode: bool) -> Checked:
        with self._display.track(what, len(self.dataset.samples)) as advance:
            store = ScanCache(self.dataset.root, keep_others=not self.dataset.is_folder)
            return check_images(
                self.dataset, on_progress=lambda _: advance(1, ""), decode=decode, store=store
            )

    def find_changes(self, claim: Claim) -> list[str]:
        """Say what an earlier attempt had otherwise: recipe, images, weights."""
        # Images that were bad, or vanished while the run went on, are no surprise; mended ones are.
        excused = {row["path"] for row in RunReader(claim.folder).bad_images}
        if claim.finished:
            digests = self.read.digests
        else:
            digests = self.checked.digests
            excused -= digests.keys()
        images = describe_images(self.dataset.without(excused), digests)
        changes = [f"recipe: {line}" for line in claim.changes]
        if images_changed := find_changed_images(claim.folder, images, excused):
            changes.append(f"images: {images_changed}")
        if WEIGHTS in find_changed_environment(claim.folder, self.environment):
            changes.append("weights: the file has another content")
        return changes


def accept(changes: list[str], claim: Claim, allow_changed: bool, display: Display) -> None:
    """Refuse to go on with another run than the folder's, unless that was allowed.

    Raises:
        DataError: something changed.
    """
    if not changes:
        return
    found = f"it is not the run that was begun there ({'; '.join(changes)})"
    if not allow_changed:
        fix = (
            "Put everything back as it was, start a new run with another --output, "
            "or add --allow-changed to go on all the same."
        )
        raise DataError(f"going on with {claim.folder.path}", found, fix)
    display.warn(f"{found}; going on all the same, as --allow-changed says")


def warn_of_versions(claim: Claim, environment: dict[str, Any], display: Display) -> None:
    """Say under what the last bits of the result may differ: they are promised for one machine only."""
    changed = find_changed_environment(claim.folder, environment)
    lines = [
        f"{key} {before} -> {now}"
        for key, (before, now) in changed.items()
        if key != WEIGHTS and key not in _HARMLESS
    ]
    if lines:
        display.warn(f"going on under other versions or hardware ({'; '.join(lines)}): last bits may differ")
