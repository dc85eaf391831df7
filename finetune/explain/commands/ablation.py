"""``finetune explain ablate``: the error after removing each block, without training again.

::

    ablation.png    the error without each block, with intervals, beside that of the complete network
    ablation.csv    block, kind, parameters, error, increase with its 95 % interval, p-value
    explain.json    model, split, number of images, metric, error, versions

The error is 1 minus the metric: accuracy, mean average precision or R squared.

Shape legend: N images, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UsageError, count
from finetune.evaluation.paired_scores import PairedScores, ScoredRun, compare_scores
from finetune.evaluation.paired_tests import PairedTest, compare_pairs
from finetune.evaluation.summary import JUDGES
from finetune.explain.ablation import Block, find_blocks, without_block
from finetune.explain.commands.images import ImageReader
from finetune.explain.commands.labelled import LabelledImages, find_labelled_images
from finetune.explain.commands.model import find_target, open_model
from finetune.explain.commands.record import say_written, write_record
from finetune.features.network import Network
from finetune.plots.ablation import AblationRow, draw_ablation
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from finetune.targets import METRIC_NAMES, SINGLE, Target, decide
from pretrained.graph.structures import tensors_in

_COLUMNS = ("block", "kind", "parameters", "error", "increase", "low", "high", "p_value", "p_corrected")
_COMPLETE = "the complete network"


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
        model, size = network.backbone.network, network.backbone.card.preprocessing.input_size
        blocks = find_blocks(model, size)
        if not blocks:
            found = "none of its blocks has inputs and outputs of the same shape"
            fix = "Take a network with residual blocks, or `finetune explain invariance`."
            raise UsageError(f"removing blocks of {network.backbone.card.name}", found, fix)
        labelled, target = find_labelled_images(recipe, network, output, display), find_target(network)
        with new_folder(output) as folder:
            reader = ImageReader(network)
            with display.track("removing blocks", len(labelled.images) * len(blocks)) as advance:
                outputs, labels = _measure(network, blocks, labelled, reader, advance)
            reader.report_bad(folder, len(labelled.images), display)
            tests = _compare(target, blocks, outputs, labels)
            error = 1 - target.compute_score(outputs[0], labels)
            _write(folder, network, blocks, tests, error, labelled.split)
            facts: dict[str, Any] = {
                "layer": None,
                "class": None,
                "split": labelled.split,
                "num_images": len(labels),
                "num_bad": len(reader.bad),
                "metric": target.score,
                "error": round(error, 6),
                "blocks": [block.name for block in blocks],
                "checks": {},
            }
            record = write_record(folder, "ablate", network, facts)
        return say_written(output, record, display)


def _measure(
    network: Network, blocks: Sequence[Block], labelled: LabelledImages, reader: ImageReader, advance: Any
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs (N, K) of the complete network and without each block, and the labels (N, ...)."""
    model = network.backbone.network
    labels = dict(zip((image.path for image in labelled.images), labelled.labels, strict=True))
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    truth: list[Tensor] = []
    for batch in reader.read(labelled.images):
        truth += [labels[image.path] for image in batch.images]
        with torch.inference_mode():
            found[0].append(_run(model, batch.pixels))
            for place, block in enumerate(blocks, start=1):
                with without_block(model, block):
                    found[place].append(_run(model, batch.pixels))
                advance(len(batch.images), block.name)
    if not truth:
        return [], labelled.labels[:0]
    return [torch.cat(parts) for parts in found], torch.stack(truth)


def _run(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    return tensors_in(model(pixels))[0].float().cpu()


def _compare(
    target: Target, blocks: Sequence[Block], outputs: Sequence[Tensor], labels: Tensor
) -> Sequence[PairedTest | PairedScores]:
    """Return how the complete network and that without each block differ on the same images."""
    names = [_COMPLETE, *(f"without {block.name}" for block in blocks)]
    if target == SINGLE:
        rights = [(decide(own) == labels).numpy() for own in outputs]
        pairs = zip(names[1:], rights[1:], strict=True)
        return compare_pairs([(names[0], rights[0], *pair) for pair in pairs])
    first, *others = (
        ScoredRun(name, target.find_evidence(own).numpy()) for name, own in zip(names, outputs, strict=True)
    )
    judge = JUDGES[target.kind]
    return compare_scores([(first, other, labels) for other in others], judge, target.score)


def _write(
    folder: Path,
    network: Network,
    blocks: Sequence[Block],
    tests: Sequence[PairedTest | PairedScores],
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
    target = find_target(network)
    label = "error" if target == SINGLE else f"1 - {METRIC_NAMES[target.score]}"
    draw_ablation(folder / "ablation.png", rows, error, title, label, is_share=target.has_classes)


def _to_row(block: Block, test: PairedTest | PairedScores) -> AblationRow:
    low, high = test.interval
    return AblationRow(block.name, -test.difference, (-high, -low), test.is_claimed)
