"""Make the bundled backbone of a finished run: weights in half precision, and a card that says what they are.

    python -m benchmarks.bundle runs/source pretrained/bundled/resnet10t.tin180 --data tiny

Matrices are kept in float16, and everything else as it is: it takes no room, and variances of BatchNorm may
be smaller than float16 knows. What is written is then judged on the run's validation images, at several
sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from finetune.data.decode import decode_image
from finetune.data.transforms import Normalizer, build_eval_transform
from finetune.export.config import build_config
from finetune.export.folder import WEIGHTS_FILE, load_exported, portable_state
from finetune.runs.files import write_bytes, write_json, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from pretrained.backbone import load_source
from pretrained.catalog import Card, Preprocessing, find_card

SIZES = (48, 56, 64, 80, 96)
"""Pixels at which the validation images, of 64, are judged."""
LICENSE = "apache-2.0"
ORIGIN = "this project, from images of ImageNet; its README.md names their terms"
BATCH = 100


def halve(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with its matrices in float16."""
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in state.items()}


def write_bundle(run: RunFolder, folder: Path, img_size: int) -> Card:
    """Write weights and ``config.json``; return the card that they make."""
    network = load_exported(run.model)
    card = find_card(str(run.model))
    view = replace(card.preprocessing, img_size=img_size, crop_pct=1.0)
    tag = folder.name.partition(".")[2]
    card = replace(card, tag=tag, preprocessing=view, license=LICENSE, origin=ORIGIN)
    content = safetensors.torch.save(halve(portable_state(network)), {"format": "pt"})
    write_bytes(folder / WEIGHTS_FILE, content)
    write_json(folder / "config.json", build_config(card, network, hashlib.sha256(content).hexdigest()))
    return find_card(str(folder))


def read_judged(run: RunFolder, data: Path) -> tuple[list[Path], Tensor]:
    """Return the validation images of a run, and their labels (N,)."""
    reader = RunReader(run)
    names, rows = reader.classes, [row for row in reader.split if row["split"] == "val"]
    return [data / row["path"] for row in rows], torch.tensor([names.index(row["label"]) for row in rows])


@torch.inference_mode()
def measure(card: Card, view: Preprocessing, images: Sequence[Path], labels: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy of weights, loaded as any others, on images of a size."""
    network = load_source(card.with_input(view)).network.eval()
    transform, normalize = build_eval_transform(view), Normalizer(view, torch.device("cpu"))
    hits = torch.zeros(2)
    for start in range(0, len(images), BATCH):
        views = [transform(decode_image(path)) for path in images[start : start + BATCH]]
        logits = network(normalize(torch.stack(views)).to(memory_format=torch.channels_last))
        right = logits.topk(5).indices == labels[start : start + BATCH, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (hits / len(images)).tolist()
    return top1, top5


def build_card(run: RunFolder, folder: Path, card: Card, sizes: Mapping[int, tuple[float, float]]) -> str:
    """Return README.md: what the weights are, in facts of the run that made them."""
    metrics, recipe = RunReader(run).metrics, RunReader(run).recipe
    assert recipe is not None
    size, trained_at = card.preprocessing.img_size, recipe.input.img_size
    number_each = metrics["num_samples"] // card.num_classes
    content = (folder / WEIGHTS_FILE).read_bytes()
    number = sum(tensor.numel() for tensor in safetensors.torch.load(content).values())
    facts = {
        "name": f"finetune/{folder.name}",
        "architecture": f"{card.architecture} (timm), {number:,} numbers with its classifier",
        "data": f"Tiny-ImageNet, training part, 64 x 64 pixels: {metrics['num_train']:,} images of "
        f"{card.num_classes} classes; the others were kept out (`benchmarks/tiny_imagenet.py`)",
        "recipe": "`recipes/source-network.yaml`: random weights, "
        f"{recipe.training.epochs} epochs, {trained_at} x {trained_at} pixels, seed {recipe.seed}",
        "command": "`finetune run --recipe source-network --data tiny/source.csv --output runs/source`",
        "time": f"{metrics['seconds']['total'] / 60:.0f} minutes on {torch.get_num_threads()} processor "
        "cores, which other work shared",
        "accuracy": f"top-1 {100 * metrics['accuracy']:.1f} %, top-5 {100 * metrics['top5_accuracy']:.1f} % "
        f"on {metrics['num_samples']:,} images that were not trained on ({number_each} of each class; "
        f"they chose the epoch), at {trained_at} pixels",
        "preprocessing": f"RGB, {size} x {size} pixels "
        f"({card.preprocessing.interpolation}, centre crop of everything), ImageNet's mean and deviation",
        "file": f"`{WEIGHTS_FILE}`, {len(content):,} bytes, matrices in float16",
        "sha256": f"`{hashlib.sha256(content).hexdigest()}`, compared whenever it is loaded",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    rows = "\n".join(
        f"| {size} | {100 * top1:.1f} | {100 * top5:.1f} |" for size, (top1, top5) in sizes.items()
    )
    return _README.format(name=folder.name, table=table, rows=rows)


_README = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, finetune]
---

# {name}

A small backbone that comes with the installation, so that the first run needs no network. It was trained by
this project from random weights, with the command below.

| | |
|---|---|
{table}

As it is in this file, on the same validation images, resized:

| pixels | top-1, % | top-5, % |
|---|---|---|
{rows}

## What it is for

A start: features for small data sets on a machine without a network, and a fair reference for what transfer
is worth. Weights that were trained on all of ImageNet at full size are better for photographs;
`finetune pull` fetches them. Its 180 labels are WordNet numbers, as ImageNet's folders are called.

## Licence

The weights are under the licence of this project, Apache-2.0. They were learned from images of ImageNet,
whose terms allow the images themselves for non-commercial research and education only; none of the images is
in this repository, and whether such terms reach weights is not settled law.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bundle", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that the paths are relative to")
    parser.add_argument("--img-size", type=int, default=48)
    arguments = parser.parse_args(words)
    run, folder = RunFolder(arguments.run), arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    card = write_bundle(run, folder, arguments.img_size)
    images, labels = read_judged(run, arguments.data)
    sizes: dict[int, Any] = {}
    for size in SIZES:
        sizes[size] = measure(card, replace(card.preprocessing, img_size=size), images, labels)
        sys.stderr.write(f"{size} pixels: top-1 {sizes[size][0]:.4f}, top-5 {sizes[size][1]:.4f}\n")
    write_text(folder / "README.md", build_card(run, folder, card, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
