"""A model that is to be exported, and what is known of it: its run, and the images of that run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from finetune.data.archive import find_root
from finetune.data.sample import Dataset, Sample
from finetune.errors import DataError, FinetuneError, UsageError
from finetune.export.folder import WEIGHTS_FILE, load_exported
from finetune.recipe import Recipe, load_recipe
from finetune.runs.claim import read_split
from finetune.runs.folder import RunFolder
from pretrained.catalog import Card, find_card


@dataclass(frozen=True)
class Exportable:
    """A model on this machine.

    Attributes:
        path: that the user named.
        card: of the network.
        network: on the CPU, in eval mode.
        run: that it comes from; None for a model folder alone.
        recipe: of the run; None where there is none that can be read.
        images: that the run began with, whether they are still there or not; else why there are none.
    """

    path: Path
    card: Card
    network: nn.Module
    run: RunFolder | None
    recipe: Recipe | None
    images: Dataset | str


def open_model(path: Path) -> Exportable:
    """Load a model and find what is known of it.

    Raises:
        UsageError: there is none, or it is damaged.
        DataError: its run is not finished, or ``split.csv`` is damaged.
    """
    files = ("config.json", WEIGHTS_FILE)
    if not any(all((folder / file).is_file() for file in files) for folder in (path / "model", path)):
        found = "there is no model in it" if path.is_dir() else "there is no such folder"
        raise UsageError(f"model {path}", found, "Name a finished run, or a model folder.")
    run = _find_run(path)
    if run is not None:
        _check_done(run)
    card = find_card(f"local-dir:{path}")
    try:
        network = load_exported(Path(card.location))
    except RuntimeError as error:  # load_state_dict's
        found = f"its weights belong to another network: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"model {path}", found, "Export it again.") from None
    recipe = _read_recipe(run)
    return Exportable(path, card, network, run, recipe, _find_images(run, recipe))


def _find_run(path: Path) -> RunFolder | None:
    """The run of a folder: itself, or the one that the model folder lies in."""
    for folder in (RunFolder(path), RunFolder(path.absolute().parent)):
        if folder.recipe.is_file() and folder.model.absolute() in (
            path.absolute(),
            (path / "model").absolute(),
        ):
            return folder
    return None


def _check_done(run: RunFolder) -> None:
    """A model of an earlier end beside figures of a later one would be told as if they belonged together."""
    state = run.read_outcome().get("state", "done")
    if state != "done":
        found = f"the run is not finished ({state}), and its model and figures may not belong together"
        raise DataError(
            f"model {run.path}", found, "Give the run's command again to finish it, and export then."
        )


def _read_recipe(run: RunFolder | None) -> Recipe | None:
    try:
        return load_recipe(str(run.recipe)) if run else None
    except FinetuneError:  # of another version, perhaps
        return None


def _find_images(run: RunFolder | None, recipe: Recipe | None) -> Dataset | str:
    """The images that the run recorded; what else lies among the data by now is no concern of its model."""
    if run is None:
        return "it is a model without a run"
    if recipe is None or recipe.data.path is None:
        return f"{run.recipe} cannot be read"
    data = Path(recipe.data.path)
    try:
        root = find_root(data)
    except FinetuneError as error:
        return f"the run's data cannot be read ({error.message})"
    if root is None:
        return f"the run's data, {data}, are not there any more"
    samples = tuple(Sample(row["path"], -1, "train") for row in read_split(run))
    return Dataset(root, (), samples, is_folder=root != data.parent)
