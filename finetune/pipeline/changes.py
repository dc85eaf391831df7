"""Compare the recipe, images, weights and versions of a run with those of its last attempt."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from finetune.data.dataset import Dataset, describe_images
from finetune.data.prepare import keep_split
from finetune.data.scan import CheckedImages, scan_images
from finetune.errors import DataError
from finetune.pipeline.setup import RunSetup
from finetune.runs.claim import Claim, find_changed_environment, find_changed_images
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.device import describe_environment
from finetune.system.display import Display
from finetune.training.freeze import digest_weights

WEIGHTS = "weights_sha256"
_HARMLESS = ("platform", "cores", "device")
"""Keys of the environment that do not affect the result (the device is compared as a recipe key)."""


class RunChanges:
    """Finds what changed in a run since its last attempt.

    Everything is computed at its first use, on rank 0 only.

    Args:
        setup: decisions of this attempt.
        found: images that exist now.
        folder: run folder.
        display: display for the progress of reading the images.
        num_processes: number of ranks.
    """

    def __init__(
        self, setup: RunSetup, found: Dataset, folder: RunFolder, display: Display, num_processes: int
    ) -> None:
        self._setup, self._found, self._folder = setup, found, folder
        self._display, self._num_processes = display, num_processes

    @cached_property
    def dataset(self) -> Dataset:
        """The images that exist now, with the split that an earlier attempt drew."""
        return keep_split(self._found, self._folder, self._setup.recipe)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, and the digest of the weights."""
        setup = self._setup
        random = setup.recipe.strategy.starts_random
        weights = None if random else digest_weights(setup.backbone.network, setup.plan)
        machine = describe_environment(setup.placement.device)
        return machine | {"processes": self._num_processes, WEIGHTS: weights}

    @cached_property
    def checked(self) -> CheckedImages:
        """Every image, decoded once."""
        channels = self._setup.backbone.card.preprocessing.channels
        return scan_images(self.dataset, self._display, "checking images", channels=channels)

    @cached_property
    def read(self) -> CheckedImages:
        """Every image, read but not decoded, which is enough if nothing will be trained."""
        return scan_images(self.dataset, self._display, "comparing images", decode=False)

    def find_changes(self, claim: Claim) -> list[str]:
        """Return a line for each change of recipe, images or weights since the last attempt."""
        # Images that the last attempt found bad or lost are no change, unless they can be read again now.
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
            changes.append("weights: the content of the file changed")
        return changes

    def describe_other_backbone(self, claim: Claim) -> str:
        """Return which backbone was trained before, if it is another one; "" if it is the same.

        A folder that was moved is another name for the same weights.
        """
        before = RunReader(claim.folder).recipe
        now = self._setup.recipe.backbone.name
        if before is None or before.backbone.name == now:
            return ""
        if WEIGHTS not in find_changed_environment(claim.folder, self.environment):
            return ""
        return f"it has another backbone ({before.backbone.name}, and now {now})"


def accept(changes: list[str], claim: Claim, allow_changed: bool, display: Display) -> None:
    """Refuse to resume a run that changed, unless ``allow_changed``.

    Raises:
        DataError: there are changes and they are not allowed.
    """
    if not changes:
        return
    found = f"the data, the weights or the recipe changed since the last attempt ({'; '.join(changes)})"
    if not allow_changed:
        fix = (
            "Undo the changes, start a new run with another --output, "
            "or add --allow-changed to resume with them."
        )
        raise DataError(f"resuming {claim.folder.path}", found, fix)
    display.warn(f"{found}; the run resumes, because of --allow-changed")


def warn_of_versions(claim: Claim, environment: dict[str, Any], display: Display) -> None:
    """Warn if versions or hardware changed, since the result is bit-exact on one machine only."""
    changed = find_changed_environment(claim.folder, environment)
    lines = [
        f"{key} {before} -> {now}"
        for key, (before, now) in changed.items()
        if key != WEIGHTS and key not in _HARMLESS
    ]
    if lines:
        display.warn(
            f"resuming with other versions or hardware ({'; '.join(lines)}): the last bits may differ"
        )
