"""``finetune backbones chart``: accuracies of networks against operations, and against speed here.

After Canziani et al. (arXiv:1605.07678), with the area of a bubble for the number of parameters.

::

    accuracy-operations.png    accuracy against multiply-adds of an image
    accuracy-speed.png         accuracy against images a second, measured on this machine
    chart.csv                  name, accuracy, parameters, multiply-adds, images a second
    chart.json                 the same, with the source of the accuracies, the device and versions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from finetune import __version__
from finetune.data.loader import Placement
from finetune.errors import UsageError
from finetune.features.network import place_network
from finetune.plots.bubbles import Bubble, draw_bubbles
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader
from finetune.system.device import available_cores, resolve_device, resolve_threads
from finetune.system.display import Display
from finetune.system.forward import time_forward
from pretrained.catalog import Card, find_card
from pretrained.graph.costs import compute_costs
from pretrained.network import build_network, build_outline, is_convolutional
from pretrained.published import published_accuracy, published_cifar10_accuracy

FEWEST = 2
"""A chart compares at least two networks."""
_NUM_TIMED = 3
"""Measurements of the speed of a network, of which the median is taken."""
_COLUMNS = ("name", "accuracy", "parameters", "multiply_adds", "images_per_second", "input_size")


@dataclass(frozen=True)
class ChartRow:
    """What the chart shows of a network.

    Attributes:
        name: as the user gave it.
        accuracy: in percent.
        parameters: number of parameters.
        multiply_adds: of one image.
        images_per_second: of the forward pass on this machine.
        input_size: height and width of its images in pixels.
    """

    name: str
    accuracy: float
    parameters: int
    multiply_adds: int
    images_per_second: float
    input_size: int


def write_chart(names: Sequence[str], output: Path, device: str, display: Display) -> dict[str, Any]:
    """Write the charts of some networks.

    Args:
        names: backbones with a published accuracy on ImageNet, published networks with one on CIFAR-10, or
            folders of finished runs; at least two.
        output: a new folder.
        device: on which the speed is measured.
        display: shows progress.

    Returns:
        The content of ``chart.json``, and the path of the output.

    Raises:
        UsageError: a name is unknown or has no accuracy, or accuracies on different images are mixed.
    """
    with translated_errors():
        place = resolve_device(device)
        torch.set_num_threads(resolve_threads())
        chosen = list(dict.fromkeys(names))
        source, accuracies = _find_accuracies(chosen)
        cards = [find_card(name) for name in chosen]
        with new_folder(output) as folder:
            rows = []
            with display.track("measuring", len(cards)) as advance:
                for name, card, accuracy in zip(chosen, cards, accuracies, strict=True):
                    rows.append(_measure(name, card, accuracy, place))
                    advance(1, name)
            record = _write(folder, rows, source, place)
        display.say(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}", style="bold")
        return {"output": str(output), **record}


def _find_accuracies(names: Sequence[str]) -> tuple[str, list[float]]:
    """Return where the accuracies come from, and the accuracy of each in percent."""
    asked = f"a chart of {', '.join(names) or 'nothing'}"
    if len(names) < FEWEST:
        raise UsageError(asked, "a chart compares networks", "Name two backbones or more, or two runs.")
    runs = {name: RunReader(RunFolder(Path(name))) for name in names}
    measured = {name: run for name, run in runs.items() if "accuracy" in run.metrics}
    if not measured:
        return _find_published(names)
    others = [name for name in names if name not in measured]
    if others:
        found = f"{others[0]} is no finished run, and its published accuracy is of other images"
        raise UsageError(asked, found, "Name runs only, or backbones only.")
    data = {str(run.recipe.data.path) for run in measured.values() if run.recipe is not None}
    if len(data) > 1:
        found = f"these runs were evaluated on different data ({', '.join(sorted(data)[:2])})"
        raise UsageError(asked, found, "Name runs on the same data.")
    return "accuracy of the runs", [100 * float(run.metrics["accuracy"]) for run in measured.values()]


def _find_published(names: Sequence[str]) -> tuple[str, list[float]]:
    """Return on which images the accuracies were published, and the accuracy of each in percent."""
    cards = {name: find_card(name) for name in names}
    of_zoo = [name for name, card in cards.items() if published_cifar10_accuracy(card) is not None]
    if of_zoo and len(of_zoo) < len(names):
        other = next(name for name in names if name not in of_zoo)
        found = f"the accuracy of {of_zoo[0]} was published for CIFAR-10, and that of {other} was not"
        raise UsageError(f"a chart of {', '.join(names)}", found, "Name networks of one kind only.")
    images, find = ("CIFAR-10", published_cifar10_accuracy) if of_zoo else ("ImageNet", published_accuracy)
    accuracies = {name: find(card) for name, card in cards.items()}
    for name, accuracy in accuracies.items():
        if accuracy is None:
            found = f"no accuracy on {images} was published for it that is known here"
            raise UsageError(f"a chart with {name}", found, "Leave it out, or name finished runs.")
    known = [accuracy for accuracy in accuracies.values() if accuracy is not None]
    return f"published top-1 accuracy on {images}", known


def _measure(name: str, card: Card, accuracy: float, device: torch.device) -> ChartRow:
    size = card.preprocessing.input_size
    costs = compute_costs(build_outline(card), size)
    network = build_network(card).eval()
    placement = Placement(device, is_convolutional(network))
    network = place_network(network, placement)
    times = [time_forward(network, size, device, placement.channels_last) for _ in range(_NUM_TIMED)]
    return ChartRow(name, accuracy, costs.parameters, costs.macs, 1 / median(times), size[-1])


def _write(folder: Path, rows: Sequence[ChartRow], source: str, device: torch.device) -> dict[str, Any]:
    cells = [
        (
            row.name,
            f"{row.accuracy:.2f}",
            row.parameters,
            row.multiply_adds,
            f"{row.images_per_second:.2f}",
            row.input_size,
        )
        for row in rows
    ]
    write_csv(folder / "chart.csv", cells, _COLUMNS)
    machine = _name(device)
    operations = [_bubble(row, row.multiply_adds / 1e9) for row in rows]
    speeds = [_bubble(row, row.images_per_second) for row in rows]
    vertical = f"{source}, in percent"
    first, second = folder / "accuracy-operations.png", folder / "accuracy-speed.png"
    draw_bubbles(first, operations, ("billion multiply-adds of an image", vertical), "accuracy by operations")
    draw_bubbles(second, speeds, (f"images a second, {machine}", vertical), "accuracy by speed here")
    record = {
        "accuracy": source,
        "device": machine,
        "rows": [asdict(row) for row in rows],
        "versions": {"finetune": __version__, "torch": torch.__version__},
    }
    write_json(folder / "chart.json", record)
    return record


def _bubble(row: ChartRow, position: float) -> Bubble:
    return Bubble(Path(row.name).name, position, row.accuracy, row.parameters)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} threads of {available_cores()} cores"
