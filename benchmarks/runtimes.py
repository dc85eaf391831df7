"""The features of all stages of a network, in torch and in ONNX Runtime: images a second, and the export.

Weights are random, since times do not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures, Results, spread
from benchmarks.text import span, table
from finetune.data.loader import Placement
from finetune.features.network import place_network
from finetune.features.runtime import open_forward
from finetune.features.store import compute_batch_size
from finetune.recipe import Runtime
from finetune.system.display import SilentDisplay
from pretrained.catalog import find_card
from pretrained.graph.layers import FeatureExtractor, Layers
from pretrained.graph.stages import find_stages
from pretrained.network import build_network, is_convolutional

CPU = torch.device("cpu")
NETWORKS = (
    *("tf_efficientnet_lite0", "mobilenetv3_large_100", "efficientnet_b0", "resnet18", "resnet50"),
    *("convnext_tiny", "vit_small_patch16_224", "swin_tiny_patch4_window7_224"),
)
RUNTIMES: tuple[Runtime, ...] = ("torch", "onnxruntime")


def plan(bench: Bench) -> list[Case]:
    """Return a case for each network."""
    names = ("test_efficientnet",) if bench.quick else NETWORKS
    return [Case(f"runtimes-{name}", RUNTIMES, name) for name in names]


def measure(turn: Turn) -> Figures:
    """Return images a second, of the fastest of several batches, and the seconds until the first one."""
    torch.manual_seed(0)
    card = find_card(f"timm/{turn.case.network}")
    size = card.preprocessing.input_size
    network = build_network(card, 0.0).eval()
    placement = Placement(CPU, is_convolutional(network))
    layers = Layers(place_network(network, placement), find_stages(network, size), size).all
    extract = FeatureExtractor(network, layers, "auto")

    def in_torch(images: Tensor) -> Tensor:
        return torch.cat(extract(images), dim=1)

    images = torch.randn(compute_batch_size(CPU, size), *size).to(memory_format=placement.memory_format)
    began = time.perf_counter()
    runtime: Runtime = "torch" if turn.tool == "torch" else "onnxruntime"
    forward = open_forward(runtime, network, in_torch, placement, size, SilentDisplay())
    opened = time.perf_counter() - began
    seconds = []
    with torch.inference_mode():
        forward(images)
        for _ in range(2 if turn.bench.quick else 15):
            began = time.perf_counter()
            forward(images)
            seconds.append(time.perf_counter() - began)
    return {"images_per_second": len(images) / min(seconds), "export": opened}


def write(results: Results) -> Iterator[str]:
    """Yield a row for each network; the ratio is turn by turn."""
    head = ["network", "torch, images/s", "ONNX Runtime, images/s", "ratio", "export, s"]
    rows = []
    for case in dict.fromkeys(case for case, _ in results.measured("runtimes-")):
        speeds = [span(results.figure(case, tool, "images_per_second")) for tool in RUNTIMES]
        pairs = results.pairs(case, "onnxruntime", "torch", "images_per_second")
        ratio = span(spread(own / base for own, base in pairs), "x")
        export = span(results.figure(case, "onnxruntime", "export"))
        rows.append([case.removeprefix("runtimes-"), *speeds, ratio, export])
    yield from table(head, rows)


QUESTION = Question("runtimes", plan, measure, write=write)
