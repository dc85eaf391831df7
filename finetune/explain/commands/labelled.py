"""Labelled images whose labels are those of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finetune.data.dataset import SPLITS, Dataset
from finetune.data.inputs import InputImage
from finetune.data.prepare import check_outside
from finetune.errors import DataError, UsageError
from finetune.explain.commands.model import find_class, find_target, name_outputs
from finetune.features.extraction import open_images
from finetune.features.network import Network
from finetune.recipe import Recipe
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.targets import SEPARATOR


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split, with their labels among the model's outputs.

    Attributes:
        images: in the order of the data, N of them.
        outputs: the output of the network that each image's label is about; None for no class, or several.
        labels: as the model's kind of labels encodes them, (N,) int64, or (N, K) float32.
        split: train, val or test; ``all`` for images without splits.
    """

    images: tuple[InputImage, ...]
    outputs: tuple[int | None, ...]
    labels: Tensor
    split: str


def find_labelled_images(recipe: Recipe, network: Network, output: Path, display: Display) -> LabelledImages:
    """Return the test images of labelled data, else the validation images, else all.

    Args:
        recipe: names the data; without any, the model must be a run, and the data are its own.
        network: the model. A class of the data has the name of one of its classes, or is a synonym (``ant``
            for ``ant, emmet, pismire``).
        output: the folder of the results.
        display: shows progress.

    Raises:
        UsageError: no data were named, or the output lies among them.
        DataError: the data have no labels, labels of another kind, or a class that the model does not know.
    """
    dataset = open_images(_with_data(recipe), display, draws=False)
    check_outside(output, dataset)
    if not dataset.is_labelled:
        fix = "Put the images into a folder for each class, or name a CSV file with a column label."
        raise DataError(f"data in {dataset.root}", "the images have no labels", fix)
    target = find_target(network)
    if dataset.target.kind != target.kind:
        found = f"it has labels of the kind {dataset.target.kind}, and the model those of {target.kind}"
        raise DataError(f"data in {dataset.root}", found, "Name images with the labels of the model.")
    split = next((name for name in reversed(SPLITS) if name != "train" and dataset.of(name)), "all")
    samples = [sample for sample in dataset.samples if split in ("all", sample.split)]
    labels = [dataset.label_of(sample) for sample in samples]
    classes, names = name_outputs(network), {name for label in labels for name in target.classes_of(label)}
    indices = _match_classes(dataset, classes, names) if target.has_classes else dict.fromkeys(names, 0)
    outputs = [[indices[name] for name in target.classes_of(label)] for label in labels]
    if target.has_classes:
        labels = [SEPARATOR.join(classes[index] for index in own) for own in outputs]
    return LabelledImages(
        tuple(InputImage(sample.path, dataset.file(sample)) for sample in samples),
        tuple(own[0] if len(own) == 1 else None for own in outputs),
        target.encode(labels, classes),
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


def _match_classes(dataset: Dataset, classes: Sequence[str], used: set[str]) -> dict[str, int]:
    """Return the model's index for each class of the data."""
    found: dict[str, int] = {}
    for name in sorted(used):
        try:
            found[name] = find_class(classes, name)
        except UsageError as error:
            asked = f"the class {name!r} of the data in {dataset.root}"
            raise DataError(asked, error.found, "Rename its folder to a class of the model.") from None
    return found
