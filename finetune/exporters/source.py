"""The model to export, its run, and the inputs that the exported model is compared on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.data.dataset import Dataset, Sample
from finetune.data.decode import BadImageError
from finetune.data.root import find_root
from finetune.data.tables.config import TableConfig
from finetune.data.transforms import Transform, build_eval_transform
from finetune.errors import DataError, FinetuneError, UsageError
from finetune.exporters.folder import WEIGHTS_FILE, load_exported
from finetune.recipe import Recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import CsvRow, RunReader
from finetune.system.device import resolve_threads
from finetune.system.regular_files import open_regular
from finetune.targets import name_probabilities, read_classes
from pretrained.catalog import Card, find_card


@dataclass(frozen=True)
class Exportable:
    """A model to export, with its run if there is one.

    Attributes:
        path: path that the user gave.
        card: description of the network.
        network: network on the CPU, in eval mode.
        run: run that the model belongs to; None for a model folder alone.
        recipe: recipe of the run; None if there is none or it cannot be read.
        images: images that the run recorded, which may be missing by now; or the reason why they are unknown.
    """

    path: Path
    card: Card
    network: nn.Module
    run: RunFolder | None
    recipe: Recipe | None
    images: Dataset | str


def open_model(path: Path) -> Exportable:
    """Load a model and find its run.

    Raises:
        UsageError: there is no model, or it is damaged.
        DataError: the run is not finished, or ``split.csv`` is damaged.
    """
    files = ("config.json", WEIGHTS_FILE)
    if not any(all((folder / file).is_file() for file in files) for folder in (path / "model", path)):
        if path.is_file():
            fix = f"Train it first, or name its network: finetune run --backbone NAME --weights {path}"
            raise UsageError(f"model {path}", "it is a file, and no folder of a model", fix)
        found = "it contains no model" if path.is_dir() else "there is no such folder"
        raise UsageError(f"model {path}", found, "Give a finished run or a model folder.")
    run = _find_run(path)
    if run is not None:
        _check_done(run)
    card = find_card(f"local-dir:{path}")
    try:
        network = load_exported(Path(card.location))
    except RuntimeError as error:  # of load_state_dict
        found = f"its weights do not fit its architecture: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"model {path}", found, "Export it again.") from None
    # Another version may have written the recipe.
    recipe = RunReader(run, tolerant=True).recipe if run is not None else None
    return Exportable(path, card, network, run, recipe, _find_images(run, recipe))


def _find_run(path: Path) -> RunFolder | None:
    """Return the run of a folder: the folder itself, or the parent of its model folder."""
    for folder in (RunFolder(path), RunFolder(path.absolute().parent)):
        if folder.recipe.is_file() and folder.model.absolute() in (
            path.absolute(),
            (path / "model").absolute(),
        ):
            return folder
    return None


def _check_done(run: RunFolder) -> None:
    """Refuse an unfinished run: its model and its metrics may come from different attempts."""
    state = RunReader(run, tolerant=True).state
    if state != "done":
        found = f"the run is not finished ({state}), and its model and metrics may not belong together"
        raise DataError(
            f"model {run.path}", found, "Give the run's command again to finish it, then export it."
        )


def _find_images(run: RunFolder | None, recipe: Recipe | None) -> Dataset | str:
    """Return the images that the run recorded, or why they are unknown; images added since do not matter."""
    if run is None:
        return "the model came without a run"
    if recipe is None or recipe.data.path is None:
        return f"{run.recipe} cannot be read"
    data = Path(recipe.data.path)
    try:
        root = find_root(data, TableConfig.of(recipe))
    except FinetuneError as error:
        return f"the run's data cannot be read ({error.message})"
    if root is None:
        return f"the run's data, {data}, no longer exist"
    samples = tuple(Sample(row["path"], -1, "train") for row in RunReader(run).split)
    return Dataset(root, (), samples, is_folder=root != data.parent)


# --- inputs of the comparison (shapes: N images, K classes, H W pixels) ---------------------------


MOST_IMAGES = 512
"""Largest number of images that are compared; more take longer and add little."""
MOST_BYTES = 256 * 2**20
"""Largest number of bytes of their pixels, for networks with large inputs."""
NUM_RANDOM = 32


@dataclass(frozen=True)
class ProofInputs:
    """Preprocessed images, and the probabilities that the run recorded for them.

    Attributes:
        views: uint8 (N, 3, H, W), as the network's evaluation transform makes them; float32 (N, C, H, W) for
            a network that takes arrays.
        recorded: probabilities (N, K) of ``predictions.csv``; None if there are none.
        num_evaluated: number of images that the run evaluated; 0 for random inputs.
        notes: what was left out and why, one sentence each.
    """

    views: Tensor
    recorded: Tensor | None
    num_evaluated: int
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """``judged images`` or ``random inputs``."""
        return "judged images" if self.num_evaluated else "random inputs"


def draw_random(card: Card, note: str) -> ProofInputs:
    """Return random inputs, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (_limit_images(card, NUM_RANDOM), *card.preprocessing.input_size)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if not card.preprocessing.is_rgb:
        views = views.to(torch.float32) / 255
    return ProofInputs(views, None, 0, (note,))


def load_evaluated(run: RunFolder, root: Path, card: Card) -> ProofInputs | str:
    """Return views of the run's evaluated images, evenly spaced, or the reason why there are none.

    Args:
        run: a finished run.
        root: folder that its image paths are relative to.
        card: description of its model.

    Raises:
        DataError: ``predictions.csv`` or ``split.csv`` is damaged.
    """
    if not run.predictions.is_file():
        return f"{run.predictions} does not exist"
    reader = RunReader(run)
    rows = reader.prediction_rows
    chosen = _draw_evenly(rows, _limit_images(card, MOST_IMAGES))
    transform = build_eval_transform(card.preprocessing)

    def load(row: CsvRow) -> Tensor | str:
        return _open(root / row["path"], reader.digests.get(row["path"]), transform)

    pool = ThreadPoolExecutor(resolve_threads(), thread_name_prefix="evaluated")
    try:
        found = list(pool.map(load, chosen))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    kept = [(row, view) for row, view in zip(chosen, found, strict=True) if isinstance(view, Tensor)]
    unusable = [
        f"{row['path']} ({why})" for row, why in zip(chosen, found, strict=True) if isinstance(why, str)
    ]
    if not kept:
        return (
            f"none of its {len(rows)} evaluated images is unchanged: {unusable[0]}"
            if unusable
            else "the run evaluated no images"
        )
    notes = []
    if unusable:
        notes.append(
            f"{len(unusable)} of {len(chosen)} evaluated images are missing or have changed: {unusable[0]}"
        )
    recorded = _read_probabilities([row for row, _ in kept], card)
    if recorded is None:
        what = f"probabilities of the model's {card.num_classes} classes in their order"
        notes.append(f"{run.predictions.name} holds no {what}: it is not compared")
    return ProofInputs(torch.stack([view for _, view in kept]), recorded, len(rows), tuple(notes))


def _limit_images(card: Card, num_images: int) -> int:
    """Return a number of images whose pixels take at most :data:`MOST_BYTES`."""
    return min(num_images, max(1, MOST_BYTES // torch.Size(card.preprocessing.input_size).numel()))


def _draw_evenly(rows: Sequence[CsvRow], most: int) -> list[CsvRow]:
    """Return at most ``most`` rows, evenly spaced, since the rows are sorted by class."""
    count = min(most, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _open(path: Path, sha256: str | None, transform: Transform) -> Tensor | str:
    """Return the view of an unchanged image, or the reason why it cannot be used."""
    try:
        with open_regular(path) as file:
            if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return "it has changed"
        return transform(transform.open(path))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except BadImageError as error:
        return error.reason


def _read_probabilities(rows: Sequence[CsvRow], card: Card) -> Tensor | None:
    classes = read_classes(list(rows[0]))
    if len(classes) != card.num_classes or (card.label_names and classes != list(card.label_names)):
        return None
    columns = name_probabilities(classes)
    try:
        return torch.tensor([[float(row[name]) for name in columns] for row in rows])
    except ValueError:
        return None
