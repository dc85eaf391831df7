"""The loop of PyTorch's transfer learning tutorial: its transforms, its rates, its saving of the best.

What the tutorial leaves open is the suite's: batch size, image size, workers, threads, the network. It has
one learning rate for whatever learns, 0.001, times 0.1 every 7 epochs, and no channels-last layout.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.peers.common import (
    MEAN,
    STD,
    Curve,
    learning_parts,
    load_network,
    read_arguments,
    replace_head,
    report,
)


def build_loaders(options: argparse.Namespace) -> dict[str, DataLoader]:  # type: ignore[type-arg]
    """Return the tutorial's two loaders."""
    size = options.img_size
    normalize = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    views = {
        "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *normalize],
        "val": [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *normalize],
    }
    parts = {x: datasets.ImageFolder(options.data / x, transforms.Compose(views[x])) for x in views}
    batch_size, workers = options.batch_size, options.workers
    return {x: DataLoader(parts[x], batch_size, shuffle=True, num_workers=workers) for x in parts}


def run_pass(
    network: nn.Module,
    loader: DataLoader,  # type: ignore[type-arg]
    optimizer: optim.Optimizer | None,
) -> float:
    """Train for an epoch, or judge without an optimiser; return the accuracy."""
    criterion = nn.CrossEntropyLoss()
    network.train(optimizer is not None)
    running_loss, running_corrects = 0.0, 0
    for inputs, labels in loader:
        if optimizer is not None:
            optimizer.zero_grad()
        with torch.set_grad_enabled(optimizer is not None):
            outputs = network(inputs)
            _, preds = torch.max(outputs, 1)
            loss = criterion(outputs, labels)
            if optimizer is not None:
                loss.backward()
                optimizer.step()
        running_loss += loss.item() * inputs.size(0)
        running_corrects += int(torch.sum(preds == labels.data))
    return running_corrects / len(loader.dataset)  # type: ignore[arg-type]


def train(
    network: nn.Module,
    loaders: dict[str, DataLoader],  # type: ignore[type-arg]
    optimizer: optim.Optimizer,
    epochs: int,
    best_path: Path,
) -> Curve:
    """Return the validation accuracy of each epoch; the network ends with the weights of the best."""
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best, curve = 0.0, Curve()
    torch.save(network.state_dict(), best_path)
    for _ in range(epochs):
        run_pass(network, loaders["train"], optimizer)
        scheduler.step()
        accuracy = run_pass(network, loaders["val"], None)
        curve.append((time.perf_counter(), accuracy))
        if accuracy > best:
            best = accuracy
            torch.save(network.state_dict(), best_path)
    network.load_state_dict(torch.load(best_path, weights_only=True))
    return curve


def main() -> None:
    """Train, and report."""
    options = read_arguments()
    loaders = build_loaders(options)
    network = load_network(options.arch, options.weights)
    network.requires_grad_(options.strategy == "full")
    replace_head(network, options.arch, len(loaders["train"].dataset.classes))  # type: ignore[attr-defined]
    parts = learning_parts(network, options.arch, options.strategy)
    weights = [weight for part in parts for weight in part.requires_grad_().parameters()]
    optimizer = optim.SGD(weights, lr=options.lr, momentum=0.9)
    began = time.perf_counter()
    curve = train(network, loaders, optimizer, options.epochs, options.output / "best.pt")
    report(curve, began)


if __name__ == "__main__":
    main()
