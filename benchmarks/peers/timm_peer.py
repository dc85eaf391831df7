"""timm: its dataset, loader, optimiser, schedule, task and evaluator, put together as in its ``train.py``.

With its own augmentation (crops from 8 % of the area, flips, colour jitter), and channels-last, which is a
switch of its script. timm has no SqueezeNet: there its pieces train torchvision's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from safetensors.torch import load_file
from timm import create_model
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.task.evaluator import ClassificationEvaluator
from timm.utils import AverageMeter
from torch import nn

from benchmarks.peers.common import (
    Curve,
    learning_parts,
    load_network,
    read_arguments,
    replace_head,
    report,
)

CPU = torch.device("cpu")


def build_loaders(options: argparse.Namespace) -> dict[str, Any]:
    """Return timm's loaders of both splits."""
    loaders = {}
    for split, training in (("train", True), ("val", False)):
        dataset = create_dataset("", root=str(options.data), split=split, is_training=training)
        loaders[split] = create_loader(
            dataset,
            input_size=(3, options.img_size, options.img_size),
            batch_size=options.batch_size,
            is_training=training,
            num_workers=options.workers,
            crop_pct=0.875,
            device=CPU,
        )
    return loaders


def build_network(options: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return the network, with gradients where it learns."""
    if options.arch.startswith("resnet"):
        network: nn.Module = create_model(options.arch)
        network.load_state_dict(load_file(options.weights))
        network.reset_classifier(num_classes)  # type: ignore[operator]
    else:
        network = load_network(options.arch, options.weights)
        replace_head(network, options.arch, num_classes)
    network.requires_grad_(False)
    for part in learning_parts(network, options.arch, options.strategy):
        part.requires_grad_()
    return network.to(memory_format=torch.channels_last)


def train_one_epoch(task: ClassificationTask, loader: Any, optimizer: Any, scheduler: Any, done: int) -> int:
    """Train for an epoch; return the updates made since the beginning."""
    losses = AverageMeter()
    task.train()
    for inputs, target in loader:
        images = inputs.contiguous(memory_format=torch.channels_last)
        loss = task(images, target)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        losses.update(loss.item(), inputs.size(0))
        scheduler.step_update(num_updates=done, metric=losses.avg)
    return done


@torch.inference_mode()
def evaluate(network: nn.Module, loader: Any) -> float:
    """Return the accuracy on the validation images."""
    evaluator = ClassificationEvaluator(CPU)
    network.eval()
    for inputs, target in loader:
        evaluator.update(network(inputs.contiguous(memory_format=torch.channels_last)), target)
    return float(evaluator.compute()["top1"]) / 100


def main() -> None:
    """Train, and report."""
    options = read_arguments()
    loaders = build_loaders(options)
    network = build_network(options, len(loaders["train"].dataset.reader.class_to_idx))
    task = ClassificationTask(network, criterion=nn.CrossEntropyLoss(), device=CPU, verbose=False)
    optimizer = create_optimizer_v2(network, opt="sgd", lr=options.lr, weight_decay=1e-4, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=options.epochs, warmup_epochs=0, step_on_epochs=True
    )
    began, done, curve = time.perf_counter(), 0, Curve()
    for epoch in range(epochs):
        done = train_one_epoch(task, loaders["train"], optimizer, scheduler, done)
        accuracy = evaluate(network, loaders["val"])
        curve.append((time.perf_counter(), accuracy))
        scheduler.step(epoch + 1, accuracy)
    torch.save(network.state_dict(), options.output / "final.pt")
    report(curve, began)


if __name__ == "__main__":
    main()
