"""``finetune explain ablate``: the error after removing each block, without training again.

::

    ablation.png    the error without each block, with intervals, beside that of the complete network
    ablation.csv    block, kind, parameters, error, increase with its 95 % interval, p-value
    explain.json    model, split, number of images, error, versions
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.errors import UsageError, count
from finetune.evaluation.paired_tests import PairedTest, compare_pairs
from finetune.explain.ablation import Block, find_blocks, without_block
from finetune.explain.commands.images import ImageReader
from finetune.explain.commands.labelled import LabelledImages, find_labelled_images
from finetune.explain.commands.model import open_model, require_classes
from finetune.explain.commands.record import say_written, write_record
from finetune.features.network import Network
from finetune.plots.ablation import AblationRow, draw_ablation
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from finetune.targets import decide
from pretrained.graph.structures import tensors_in

_COLUMNS = ("block", "kind", "parameters", "error", "increase", "low", "high", "p_value", "p_corrected")
_COMPLETE = "the complete network"
_Rights = npt.NDArray[np.bool_]


def explain_ablate(recipe: Recipe, output: Path, display: Display) -> dict[str, Any]:
    """Write the error of a network without each of its blocks.

    Args:
        recipe: names the model, and the labelled ``--data``; settings of input and machine. Without data, the
            model must be a run, and its own test or validation images are taken.
        output: a new folder.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        network = open_model(recipe, display)
        classes = require_classes(network)
        model, size = network.backbone.network, network.backbone.card.preprocessing.input_size
        blocks = find_blocks(model, size)
        if not blocks:
            found = "none of its blocks has inputs and outputs of the same shape"
            fix = "Take a network with residual blocks, or `finetune explain invariance`."
            raise UsageError(f"removing blocks of {network.backbone.card.name}", found, fix)
        labelled = find_labelled_images(recipe, classes, output, display)
        with new_folder(output) as folder:
            reader = ImageReader(network)
            with display.track("removing blocks", len(labelled.images) * len(blocks)) as advance:
                rights = _measure(network, blocks, labelled, reader, advance)
            reader.report_bad(folder, len(labelled.images), display)
            tests = compare_pairs([(_COMPLETE, rights[0], *pair) for pair in _name(blocks, rights[1:])])
            error = 1 - float(rights[0].mean())
            _write(folder, network, blocks, tests, error, labelled.split)
            facts: dict[str, Any] = {
                "layer": None,
                "class": None,
                "split": labelled.split,
                "num_images": len(rights[0]),
                "num_bad": len(reader.bad),
                "error": round(error, 6),
                "blocks": [block.name for block in blocks],
                "checks": {},
            }
            record = write_record(folder, "ablate", network, facts)
        return say_written(output, record, display)


def _name(blocks: Sequence[Block], rights: Sequence[_Rights]) -> list[tuple[str, _Rights]]:
    return [(f"without {block.name}", own) for block, own in zip(blocks, rights, strict=True)]


def _measure(
    network: Network, blocks: Sequence[Block], labelled: LabelledImages, reader: ImageReader, advance: Any
) -> list[_Rights]:
    """Return which images are classified rightly by the complete network, and without each block."""
    model = network.backbone.network
    labels = dict(zip((image.path for image in labelled.images), labelled.labels, strict=True))
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    for batch in reader.read(labelled.images):
        truth = torch.tensor([labels[image.path] for image in batch.images])
        with torch.inference_mode():
            found[0].append(_classify(model, batch.pixels) == truth)
            for place, block in enumerate(blocks, start=1):
                with without_block(model, block):
                    found[place].append(_classify(model, batch.pixels) == truth)
                advance(len(batch.images), block.name)
    return [torch.cat(parts).numpy() if parts else np.zeros(0, np.bool_) for parts in found]


def _classify(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    return decide(tensors_in(model(pixels))[0]).cpu()


def _write(
    folder: Path,
    network: Network,
    blocks: Sequence[Block],
    tests: Sequence[PairedTest],
    error: float,
    split: str,
) -> None:
    rows = [_to_row(block, test) for block, test in zip(blocks, tests, strict=True)]
    cells = [
        (
            block.name,
            block.kind,
            block.num_parameters,
            *(f"{value:.6f}" for value in (error + row.increase, row.increase, *row.interval)),
            *(f"{value:.4g}" for value in (test.p_value, test.p_corrected)),
        )
        for block, test, row in zip(blocks, tests, rows, strict=True)
    ]
    write_csv(folder / "ablation.csv", cells, _COLUMNS)
    images = count(tests[0].num_images, "image" if split == "all" else f"{split} image")
    title = f"{network.backbone.card.name} without one block, not trained again, on {images}"
    draw_ablation(folder / "ablation.png", rows, error, title)


def _to_row(block: Block, test: PairedTest) -> AblationRow:
    low, high = test.interval
    return AblationRow(block.name, -test.difference, (-high, -low), test.is_claimed)
