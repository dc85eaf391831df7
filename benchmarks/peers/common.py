"""What every peer's script shares: the same words on the command line, the same weights, one line out."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAST_STAGE = {"squeezenet1_0": "features.12", "resnet18": "layer4", "resnet50": "layer4"}
"""What ``top`` trains below the head: the stage that `finetune backbones show` prints as top."""
HEAD = {"squeezenet1_0": "classifier", "resnet18": "fc", "resnet50": "fc"}
Curve = list[tuple[float, float]]
"""Time (``time.perf_counter``) at the end of each epoch, and accuracy on the validation images."""


def read_arguments() -> argparse.Namespace:
    """Return the arguments, with torch's threads and all seeds set."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--arch", required=True, help="torchvision's name, or timm/NAME")
    parser.add_argument("--strategy", choices=("freeze", "top", "full"), default="freeze")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="a folder for what the tool leaves")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def load_network(arch: str, weights: Path) -> nn.Module:
    """Return a network of torchvision or timm with the weights of the file, and its own 1000 classes."""
    from safetensors.torch import load_file
    from timm import create_model

    library, _, name = arch.rpartition("/")
    network: nn.Module = create_model(name) if library == "timm" else getattr(models, name)(weights=None)
    network.load_state_dict(load_file(weights))
    return network


def replace_head(network: nn.Module, arch: str, num_classes: int) -> None:
    """Put a new classifier in, as the tutorials of torchvision and timm do."""
    if arch.startswith("timm/"):
        network.reset_classifier(num_classes)  # type: ignore[operator]
    elif arch.startswith("squeezenet"):
        network.get_submodule("classifier").register_module("1", nn.Conv2d(512, num_classes, kernel_size=1))
    else:
        width = 512 if arch == "resnet18" else 2048
        network.register_module("fc", nn.Linear(width, num_classes))


def learning_parts(network: nn.Module, arch: str, strategy: str) -> list[nn.Module]:
    """Return the modules that learn; of timm's networks all do."""
    if strategy == "full":
        return [network]
    head, last = network.get_submodule(HEAD[arch]), network.get_submodule(LAST_STAGE[arch])
    return {"freeze": [head], "top": [last, head]}[strategy]


def report(curve: Curve, began: float) -> None:
    """Print the one line that the benchmark reads.

    It has the best and the last accuracy, the seconds since training began, and for each epoch the accuracy
    and how many seconds before this line it was reached.
    """
    now, accuracies = time.perf_counter(), [accuracy for _, accuracy in curve]
    line: dict[str, object] = {"training": round(now - began, 3)}
    if curve:
        steps = [(round(now - when, 3), accuracy) for when, accuracy in curve]
        line |= {"accuracy": max(accuracies), "last_accuracy": accuracies[-1], "curve": steps}
    sys.stdout.write(json.dumps(line) + "\n")
