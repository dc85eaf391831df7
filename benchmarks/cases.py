"""What is timed: every case by name, with its tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from typing import Literal

from benchmarks.results import OURS

Kind = Literal["train", "second", "extract", "scaling", "startup", "limit", "pipeline", "overhead", "gpu"]
STRATEGIES = ("freeze", "top", "full")
TOOLS = (OURS, "fastai", "plain", "timm")
SECOND_EPOCHS = 50
SCALES = (1_000, 10_000, 100_000)
STARTUP = ("finetune --help", "import torch")


@dataclass(frozen=True)
class Network:
    """A network, and the images it learns on.

    Attributes:
        arch: torchvision's name.
        data: name of the data folder.
        img_size: pixels.
        batch_size: images a step.
    """

    arch: str
    data: str
    img_size: int
    batch_size: int


NETWORKS = {
    "squeezenet": Network("squeezenet1_0", "photographs", 224, 16),
    "resnet18": Network("resnet18", "two-thousand", 64, 32),
    "resnet50": Network("resnet50", "two-thousand", 64, 32),
}
QUICK_NETWORKS = {"squeezenet": Network("squeezenet1_0", "photographs", 96, 8)}
GPU_NETWORK = Network("resnet50", "two-thousand", 224, 256)
SMALL = Network("test_resnet", "", 32, 64)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: of the case, unique.
        kind: what is done.
        tools: what is timed, in this order, again and again.
        network: which one, where there is one.
        strategy: what learns.
        epochs: of training; for ``scaling`` always 1.
        size: images, for ``scaling``.
        repeats: how often, where not as often as asked.
    """

    name: str
    kind: Kind
    tools: tuple[str, ...]
    network: Network = SMALL
    strategy: str = "freeze"
    epochs: int = 1
    size: int = 0
    repeats: int | None = None


def expand(quick: bool, cuda: bool) -> list[Case]:
    """Return every case, in the order in which they are run: the longest last.

    Args:
        quick: small ones, to see that everything works.
        cuda: there is a GPU.
    """
    networks = QUICK_NETWORKS if quick else NETWORKS
    epochs = (2,) if quick else (1, 5, 20)
    squeezenet = networks["squeezenet"]
    second = 5 if quick else SECOND_EPOCHS
    cases = [
        Case("startup", "startup", STARTUP, repeats=2 if quick else 5),
        Case(f"second-squeezenet-{second}", "second", (OURS,), squeezenet, epochs=second),
        Case("pipeline-photographs", "pipeline", ("views",), squeezenet),
        *(Case(f"limit-{name}", "limit", ("bare",), network) for name, network in networks.items()),
        *(_overhead(name, network) for name, network in networks.items() if name != "resnet50"),
        Case("extract-squeezenet", "extract", (OURS, "torchvision"), squeezenet),
    ]
    if cuda:
        cases.append(Case("gpu-resnet50", "gpu", ("bare",), GPU_NETWORK))
        cases.append(_overhead("resnet50", GPU_NETWORK))
    scaling = [Case(f"scaling-{size}", "scaling", (OURS,), size=size) for size in SCALES]
    cases += scaling[:1] if quick else scaling
    for (name, network), number, strategy in product(networks.items(), epochs, STRATEGIES):
        cases.append(Case(f"{strategy}-{name}-{number}", "train", TOOLS, network, strategy, number))
    return cases


def _overhead(name: str, network: Network) -> Case:
    return Case(f"overhead-{name}", "overhead", ("bare",), network, strategy="full")


def pick(cases: Sequence[Case], patterns: str | None) -> list[Case]:
    """Return the cases whose names match one of the patterns, parted by commas; all without any.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if not patterns:
        return list(cases)
    words = [word.strip() for word in patterns.split(",")]
    for word in words:
        if not any(fnmatch(case.name, word) for case in cases):
            raise ValueError(f"no case is called {word}; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatch(case.name, word) for word in words)]


def plan_turns(case: Case, repeats: int) -> Iterator[tuple[int, str]]:
    """Yield ``(repeat, tool)``, interleaved: A B A B, so that a slower hour meets all tools alike."""
    for repeat in range(case.repeats or repeats):
        for tool in case.tools:
            yield repeat, tool
