"""torchvision's feature extractor: pooled features of every image, kept in one file.

thingsvision, the usual tool for it, cannot be installed beside a current torch: its newest release (2.7.3)
asks for torchvision 0.15.2, NumPy below 2 and TensorFlow below 2.16.
"""

from __future__ import annotations

from typing import Any

import torch
from common import MEAN, STD, Phases, load_network, read_arguments, report
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import datasets, transforms
from torchvision.models.feature_extraction import create_feature_extractor

NODES = {"squeezenet1_0": "features.12.cat", "resnet18": "avgpool", "resnet50": "avgpool"}


def main() -> None:
    """Extract, and report."""
    options, phases = read_arguments(), Phases()
    size = options.img_size
    view = transforms.Compose(
        [
            transforms.Resize(size * 256 // 224),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    with phases.phase("load"):
        parts = [datasets.ImageFolder(options.data / part, view) for part in ("train", "val")]
        loader: DataLoader[Any] = DataLoader(
            ConcatDataset(parts), options.batch_size, num_workers=options.workers
        )
        network = load_network(options.arch, options.weights).eval()
        extractor = create_feature_extractor(network, {NODES[options.arch]: "features"})
    with phases.phase("extract"), torch.inference_mode():
        features = [extractor(images)["features"].mean((2, 3)) for images, _ in loader]
        torch.save(torch.cat(features), options.output / "features.pt")
    report(None, sum(len(part) for part in parts), phases)


if __name__ == "__main__":
    main()
