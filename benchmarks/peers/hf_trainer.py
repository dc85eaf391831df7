"""Hugging Face: ``Trainer`` on a timm network through transformers' wrapper, as its image example is.

Random crops and flips, AdamW at 5e-5 that falls to 0 in a line, all weights, judged after every epoch. What
the example leaves open is the suite's: batch size, image size, workers, threads.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torchvision import datasets, transforms
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.common import Curve, read_arguments, report


class Clock(TrainerCallback):
    """Notes time and accuracy after every epoch."""

    def __init__(self) -> None:
        self.curve: Curve = []

    def on_evaluate(self, *_args: Any, **facts: Any) -> None:
        """Take the accuracy."""
        self.curve.append((time.perf_counter(), float(facts["metrics"]["eval_accuracy"])))


def build_model(arch: str, weights: Path, folder: Path, num_classes: int) -> Any:
    """Return the network with a new classifier, from a folder in timm's format made of the weights."""
    folder.mkdir()
    shutil.copyfile(weights, folder / "model.safetensors")
    name = arch.removeprefix("timm/")
    config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": get_pretrained_cfg(name).to_dict()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoModelForImageClassification.from_pretrained(
        folder, num_labels=num_classes, ignore_mismatched_sizes=True
    )


def build_images(data: Path, size: int, mean: Any, std: Any) -> dict[str, datasets.ImageFolder]:
    """Return the images of both splits, with the example's views."""
    normalize = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    views = {
        "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *normalize],
        "val": [transforms.Resize(size), transforms.CenterCrop(size), *normalize],
    }
    return {part: datasets.ImageFolder(data / part, transforms.Compose(view)) for part, view in views.items()}


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """Return a batch under the names that the wrapper takes."""
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def measure_accuracy(result: Any) -> dict[str, float]:
    """Return the share of right answers."""
    logits, labels = result
    return {"accuracy": float((logits.argmax(axis=-1) == labels).mean())}


def main() -> None:
    """Train, and report."""
    options, clock = read_arguments(), Clock()
    num_classes = sum(1 for path in (options.data / "train").iterdir() if path.is_dir())
    model = build_model(options.arch, options.weights, options.output / "pretrained", num_classes)
    mean, std = (model.timm_model.pretrained_cfg[key] for key in ("mean", "std"))
    images = build_images(options.data, options.img_size, mean, std)
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_strategy="epoch",
        save_strategy="no",
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        report_to=[],
        seed=options.seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=images["train"],
        eval_dataset=images["val"],
        compute_metrics=measure_accuracy,
        callbacks=[clock],
    )
    began = time.perf_counter()
    trainer.train()
    trainer.save_model()
    report(clock.curve, began)


if __name__ == "__main__":
    main()
