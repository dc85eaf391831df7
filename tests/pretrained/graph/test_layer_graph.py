"""Graphs of layers: who reads what, and the sizes between them."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UsageError
from pretrained.graph.layer_graph import LayerGraph, trace_layers
from tests.contracts.families import DEFAULT
from tests.sweeps import slow_except


def edges_of(graph: LayerGraph) -> list[tuple[str, str, str]]:
    lines = [" + ".join(node.lines) for node in graph.nodes]
    return [(lines[edge.source], edge.size, lines[edge.target]) for edge in graph.edges]


class Block(nn.Module):
    """A residual block whose activation and addition are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.two, self.skip = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(3, 8, 1, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.two(F.relu(self.norm(self.one(images))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(inner + self.skip(images), 1), 1))


def test_a_residual_block() -> None:
    assert edges_of(trace_layers(Block(), (3, 16, 16))) == [
        ("input", "3x16x16", "one Conv2d 3x3/2 + norm BatchNorm2d + relu"),
        ("one Conv2d 3x3/2 + norm BatchNorm2d + relu", "8x8x8", "two Conv2d 3x3"),
        ("input", "3x16x16", "skip Conv2d 1x1/2"),
        ("two Conv2d 3x3", "8x8x8", "add"),
        ("skip Conv2d 1x1/2", "8x8x8", "add"),
        ("add", "8x8x8", "mean"),
        ("mean", "8", "head Linear"),
        ("head Linear", "5", "output"),
    ]


def test_a_fire_module_joins_its_branches() -> None:
    with torch.device("meta"):
        network = torchvision.models.squeezenet1_1()
    edges = edges_of(trace_layers(network, (3, 224, 224)))
    expand = [
        f"features.3.expand{size} Conv2d {size} + features.3.expand{size}_activation ReLU"
        for size in ("1x1", "3x3")
    ]
    squeeze = "features.3.squeeze Conv2d 1x1 + features.3.squeeze_activation ReLU"
    assert [(source, size) for source, size, target in edges if target in expand] == [
        (squeeze, "16x55x55")
    ] * 2
    assert [edge for edge in edges if edge[0] in expand] == [
        (one, "64x55x55", "concatenate") for one in expand
    ]


def test_the_attention_of_a_transformer_is_one_operation() -> None:
    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", depth=1)
    edges = edges_of(trace_layers(network, (3, 224, 224)))
    [into] = [edge for edge in edges if edge[2].startswith("attention")][:1]
    assert into[0].startswith("blocks.0.attn.qkv Linear")
    additions = [edge for edge in edges if edge[2].startswith("add")]
    assert len(additions) == 5, "of the positions, and of two residual connections"
    assert edges[-1] == ("head Linear", "1000", "output")


def test_the_network_is_not_changed() -> None:
    network = timm.create_model("test_resnet").train()
    trace_layers(network, (3, 64, 64))
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_size_that_the_network_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match="at 63 x 63 pixels"):
        trace_layers(timm.create_model("test_vit"), (3, 63, 63))


@pytest.mark.parametrize("name", slow_except(["timm/test_resnet"], DEFAULT))
def test_every_family_has_a_graph_from_input_to_output(name: str) -> None:
    from pretrained.catalog import find_card
    from pretrained.network import build_outline

    card = find_card(name)
    graph = trace_layers(build_outline(card), card.preprocessing.input_size)
    assert all(edge.source < edge.target for edge in graph.edges)
    last = len(graph.nodes) - 1
    assert {edge.source for edge in graph.edges} == set(range(last))
    assert {edge.target for edge in graph.edges} == set(range(1, last + 1))
