"""torchvision's feature extractor: pooled features of every image, kept in one file.

thingsvision, the usual tool for it, cannot be installed beside a current torch: its newest release (2.7.3)
asks for torchvision 0.15.2, NumPy below 2 and TensorFlow below 2.16.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import datasets, transforms
from torchvision.models.feature_extraction import create_feature_extractor

from benchmarks.peers.common import MEAN, STD, load_network, read_arguments, report

NODES = {"squeezenet1_0": "features.12.cat", "resnet18": "avgpool", "resnet50": "avgpool"}


def main() -> None:
    """Extract, and report."""
    options, began = read_arguments(), time.perf_counter()
    size, normalize = options.img_size, [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    resize = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    view = transforms.Compose([*resize, *normalize])
    parts = [datasets.ImageFolder(options.data / part, view) for part in ("train", "val")]
    loader: DataLoader[Any] = DataLoader(
        ConcatDataset(parts), options.batch_size, num_workers=options.workers
    )
    network = load_network(options.arch, options.weights).eval()
    extractor = create_feature_extractor(network, {NODES[options.arch]: "features"})
    with torch.inference_mode():
        features = [extractor(images)["features"].mean((2, 3)) for images, _ in loader]
    torch.save(torch.cat(features), options.output / "features.pt")
    report([], began)


if __name__ == "__main__":
    main()
