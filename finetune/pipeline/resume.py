"""Refuse what cannot resume before the first byte is written: a refused run keeps every file as it was."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.data.layout import some
from finetune.data.provenance import check_seen
from finetune.data.quality.usable import find_usable
from finetune.errors import DataError
from finetune.pipeline.changes import RunChanges
from finetune.pipeline.setup import RunSetup
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import SilentDisplay
from finetune.training.checkpoint import CheckpointStore, estimate_bytes
from finetune.training.freeze import frozen_tensors
from finetune.training.state import find_misfit

MOST_LISTED = 50
"""Most class names of a list in a message."""
UNDO = "Undo the change, or start a new run with another --output."


def refuse_other_classes(folder: RunFolder, classes: Sequence[str]) -> None:
    """Refuse classes that differ in names or order from those that the run began with.

    Its weights belong to the indices of those classes: under other names they would be wrong in silence.

    Raises:
        DataError: the classes differ; nothing allows to resume then.
    """
    run = RunReader(folder, tolerant=True)
    before = run.classes
    if not before or before == tuple(classes):
        return
    added = [name for name in classes if name not in before]
    removed = [name for name in before if name not in classes]
    parts = (f"new: {some(added)}" if added else "", f"gone: {some(removed)}" if removed else "")
    what = "; ".join(filter(None, parts)) or "the same names in another order"
    found = (
        f"the classes differ ({what}). A run never resumes with other classes, since its classifier knows "
        f"them by their order.\n  the run: {_listed(before)}\n  the data: {_listed(classes)}"
    )
    fix = "Restore the classes"
    if run.state == "done" and folder.model.is_dir():
        fix += f", or start a new run from this one with --backbone {folder.path} -o NEW"
    else:
        fix += ", or start a new run with another --output"
    raise DataError(f"resuming {folder.path}", found, f"{fix}.")


def _listed(classes: Sequence[str]) -> str:
    more = len(classes) - MOST_LISTED
    return ", ".join(classes[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def try_resume(setup: RunSetup, claim: Claim, run_changes: RunChanges, is_changed: bool) -> None:
    """Raise what resuming would raise with these images and this recipe. Nothing is written or shown.

    Args:
        setup: decisions of this attempt.
        claim: the claim that is about to be made.
        run_changes: images that exist now, and what differs from the last attempt.
        is_changed: whether anything differs but the number of epochs.

    Raises:
        DataError: the images cannot be used, or the checkpoints do not fit the network.
        DiskError: there is no space for another checkpoint.
    """
    recipe = setup.recipe
    dataset = find_usable(run_changes.dataset, run_changes.checked, claim.folder, recipe, forget=is_changed)
    check_seen(dataset, recipe, SilentDisplay())
    if recipe.strategy.features is None:
        _try_checkpoint(setup, claim, run_changes)
    elif claim.finished or claim.was_finished:
        _try_solving(claim, run_changes)


def _try_checkpoint(setup: RunSetup, claim: Claim, run_changes: RunChanges) -> None:
    asked, store = f"resuming {claim.folder.path}", CheckpointStore(claim.folder.checkpoints)
    checkpoint = store.load()
    if checkpoint is None and (claim.finished or claim.was_finished):  # that would train it all again
        found = "the checkpoints of the finished run are missing, so it cannot be trained for more epochs"
        raise DataError(asked, found, "Restore them, or start a new run with another --output.")
    if checkpoint is None:
        return
    network, settings = setup.backbone.network, setup.recipe.training
    found = run_changes.describe_other_backbone(claim) or find_misfit(
        checkpoint, network, frozen_tensors(network, setup.plan), has_average=settings.ema_decay is not None
    )
    if found:
        raise DataError(asked, found, UNDO)
    store.check_space(estimate_bytes(checkpoint.now, settings))


def _try_solving(claim: Claim, run_changes: RunChanges) -> None:
    """Refuse to solve a linear classifier where nothing of the finished run would go on."""
    before = RunReader(claim.folder, tolerant=True).recipe
    found = run_changes.describe_other_backbone(claim)
    if not found and before is not None and before.strategy.features is None:
        found = "it was trained for epochs, and a linear classifier would be solved instead"
    if found:
        raise DataError(f"resuming {claim.folder.path}", found, UNDO)
