"""Labelled images whose classes are those of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.dataset import SPLITS, Dataset
from finetune.data.inputs import InputImage
from finetune.data.prepare import check_outside
from finetune.errors import DataError, UsageError
from finetune.explain.commands.model import find_class
from finetune.features.extraction import open_images
from finetune.recipe import Recipe
from finetune.runs.folder import RunFolder
from finetune.system.display import Display


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split, with the index of the class of each among the model's classes.

    Attributes:
        images: in the order of the data.
        labels: as many class indices.
        split: train, val or test; ``all`` for images without splits.
    """

    images: tuple[InputImage, ...]
    labels: tuple[int, ...]
    split: str


def find_labelled_images(
    recipe: Recipe, classes: Sequence[str], output: Path, display: Display
) -> LabelledImages:
    """Return the test images of labelled data, else the validation images, else all.

    Args:
        recipe: names the data; without any, the model must be a run, and the data are its own.
        classes: class names of the model in index order. A class of the data has one of these names, or is a
            synonym (``ant`` for ``ant, emmet, pismire``).
        output: the folder of the results.
        display: shows progress.

    Raises:
        UsageError: no data were named, or the output lies among them.
        DataError: the data have no labels, or a class that the model does not know.
    """
    dataset = open_images(_with_data(recipe), display, draws=False)
    check_outside(output, dataset)
    if not dataset.is_labelled:
        fix = "Put the images into a folder for each class, or name a CSV file with a column label."
        raise DataError(f"data in {dataset.root}", "the images have no labels", fix)
    split = next((name for name in reversed(SPLITS) if name != "train" and dataset.of(name)), "all")
    samples = [sample for sample in dataset.samples if split in ("all", sample.split)]
    indices = _match_classes(dataset, classes, {sample.label for sample in samples})
    return LabelledImages(
        tuple(InputImage(sample.path, dataset.file(sample)) for sample in samples),
        tuple(indices[sample.label] for sample in samples),
        split,
    )


def _with_data(recipe: Recipe) -> Recipe:
    """Return the recipe with data: its own, or those of the run that is the model."""
    if recipe.data.path:
        return recipe
    model = Path(str(recipe.backbone.name))
    if not RunFolder(model).split.is_file():
        raise UsageError("finetune explain", "no labelled images were named", "Add --data FOLDER.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(model)})})


def _match_classes(dataset: Dataset, classes: Sequence[str], used: set[int]) -> dict[int, int]:
    """Return the model's index for each class index of the data."""
    found: dict[int, int] = {}
    for label in sorted(used):
        name = dataset.classes[label]
        try:
            found[label] = find_class(classes, name)
        except UsageError as error:
            asked = f"the class {name!r} of the data in {dataset.root}"
            raise DataError(asked, error.found, "Rename its folder to a class of the model.") from None
    return found
