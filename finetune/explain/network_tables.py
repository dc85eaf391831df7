"""The layers of a backbone as a table and as a drawing, for ``finetune backbones show``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.plots.network_graph import draw_network
from finetune.runs.files import write_text
from pretrained.catalog import Card
from pretrained.graph.costs import LayerCost, compute_costs
from pretrained.graph.layer_graph import trace_layers
from pretrained.network import build_outline

LAYER_COLUMNS = (
    "layer",
    "kind",
    "output",
    "activations",
    "weights",
    "with_biases",
    "multiply_adds",
    "forward",
    "training",
)
_BYTES = 4
"""Bytes of a float32 value."""


def describe_layers(card: Card, batch_size: int) -> dict[str, Any]:
    """Return the costs of every layer of a network, and their totals, as JSON values.

    Args:
        card: the network; its weights are not loaded.
        batch_size: images of the batch whose memory is given.

    Raises:
        UsageError: the network cannot be built, or a forward pass fails.
    """
    size = card.preprocessing.input_size
    costs = compute_costs(build_outline(card), size)
    total = {
        "activations": costs.activations,
        "weights": costs.weights,
        "parameters": costs.parameters,
        "multiply_adds": costs.macs,
        "forward_bytes": costs.forward_bytes(batch_size),
        "training_bytes": costs.training_bytes(batch_size),
        "parameter_bytes": _BYTES * costs.parameters,
    }
    layers = [_describe_row(row, batch_size) for row in costs.rows]
    return {"name": card.name, "input_size": size, "batch_size": batch_size, "layers": layers, "total": total}


def _describe_row(row: LayerCost, batch_size: int) -> dict[str, Any]:
    return {
        "layer": row.name,
        "call": row.number,
        "kind": row.kind,
        "settings": row.settings,
        "is_own": not row.is_leaf,
        "output": list(row.output),
        "activations": row.activations,
        "weights": row.weights,
        "parameters": row.parameters,
        "multiply_adds": row.macs,
        "forward_bytes": _BYTES * batch_size * row.activations,
        "training_bytes": row.kept[0] + batch_size * row.kept[1],
    }


def list_cells(facts: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table that is printed, with the totals as the last; memory is in MB."""
    for layer in facts["layers"]:
        kind = f"{layer['kind']} (itself)" if layer["is_own"] else f"{layer['kind']} {layer['settings']}"
        again = f" (call {layer['call'] + 1})" if layer["call"] else ""
        name = (layer["layer"] or "the network") + again
        yield [name, kind.strip(), "x".join(map(str, layer["output"])), *_numbers(layer)]
    yield ["total", "", "", *_numbers(facts["total"])]


def _numbers(row: Mapping[str, Any]) -> list[str]:
    counts = (row["activations"], row["weights"], row["parameters"], row["multiply_adds"])
    memory = (row["forward_bytes"], row["training_bytes"])
    return [*(f"{value:,}" for value in counts), *(f"{value / 1e6:.2f}" for value in memory)]


def draw_graph(card: Card, path: Path) -> None:
    """Draw the layers of a network as a graph with sizes at the edges, and write it as SVG.

    Args:
        card: the network; its weights are not loaded.
        path: a new file that ends in ``.svg``.

    Raises:
        UsageError: the file exists or has another ending, the network cannot be built, or a forward fails.
        DiskError: the file cannot be written.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--graph {path}", "graphs are written as SVG", f"Take {path.with_suffix('.svg')}.")
    if path.exists():
        raise UsageError(f"--graph {path}", "the file exists", "Name a new file.")
    size = card.preprocessing.input_size
    graph = trace_layers(build_outline(card), size)
    nodes = [(node.lines, node.is_layer) for node in graph.nodes]
    edges = [(edge.source, edge.target, edge.size) for edge in graph.edges]
    heading = f"{card.name} at {size[1]} x {size[2]} pixels"
    write_text(path, draw_network(path.stem, heading, nodes, edges).file)
