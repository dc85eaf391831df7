"""Whether heat maps find a cause that is known: a small patch that alone decides the label.

Images are grey noise with one coloured patch and two grey ones at random places; the colours of its stripes
are the label. A small network of each family learns that from random weights. Each method then explains test
images: the mass of a map is the share of its positive values that lie in the patch, or less than a quarter of
its side beside it. The checks that a map has to pass before `finetune explain` shows it are made as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import OURS, Figures, Results
from benchmarks.text import table
from finetune.explain.attribution.cam import GradCam
from finetune.explain.attribution.gradient import compute_gradient, compute_saliency
from finetune.explain.attribution.heat_map import ComputeMaps, HeatMap, to_heat_map
from finetune.explain.attribution.integrated import compute_integrated
from finetune.explain.attribution.layer_cam import LayerCam
from finetune.explain.attribution.occlusion import compute_occlusion
from finetune.explain.attribution.smoothgrad import compute_smoothgrad
from finetune.explain.checks.deletion import measure_advantage
from finetune.explain.checks.randomisation import measure_randomisation
from finetune.explain.checks.verdicts import judge_deletion, judge_randomisation
from finetune.explain.relu_rules import ReluRule, Rule
from finetune.targets import build_loss, decide
from pretrained.graph.stages import find_stages

SIDE, PATCH = 128, 32
"""Pixels of an image and of a patch. Maps of the last stage then have four cells in each direction."""
MARGIN = PATCH // 4
COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, -1.0))
"""Of the stripes of each class, as normalised pixels: red, green, blue, yellow."""
BATCH, MOST_STEPS, LEAST_ACCURACY = 32, 1200, 0.99
IMAGES = 32
"""Test images that are explained."""
SIZE = (3, SIDE, SIDE)


class PlainDenseNet(torchvision.models.DenseNet):  # type: ignore[misc]
    """A small DenseNet, whose last ReLU is a function and no module."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(12, (2, 2, 2, 2), 24, num_classes=num_classes)


def _timm(name: str, **settings: Any) -> Callable[[int], nn.Module]:
    return partial(timm.create_model, name, **settings)


FAMILIES: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "shufflenet": ("convolutions, ReLU in place", torchvision.models.shufflenet_v2_x0_5),
    "resnet": ("convolutions, ReLU", _timm("test_resnet")),
    "densenet": ("convolutions, ReLU as a function", PlainDenseNet),
    "repvgg": ("convolutions, ReLU", _timm("test_byobnet")),
    "mobilenet": ("convolutions, ReLU6", _timm("mobilenetv2_035")),
    "efficientnet": ("convolutions, SiLU", _timm("test_efficientnet")),
    "convnext": ("convolutions, GELU", _timm("test_convnext")),
    "swin": (
        "channels last, windows, GELU",
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=SIDE,
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
        ),
    ),
    "vit": ("class token, GELU", _timm("test_vit", img_size=SIDE)),
    "vit-avg": (
        "tokens without a class token, GELU",
        _timm("test_vit", img_size=SIDE, class_token=False, global_pool="avg"),
    ),
    "mixer": (
        "tokens without attention, GELU",
        partial(MlpMixer, img_size=SIDE, patch_size=16, num_blocks=4, embed_dim=64),
    ),
    "coatnet": ("convolutions, then attention; GELU", _timm("test_coatnet", img_size=SIDE)),
}
"""What each family is, and a function of the number of classes that builds a small network of it."""


# --- images with a planted cause -------------------------------------------------------------------


def draw_images(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, 3, SIDE, SIDE), labels (N,), and top and left of their patches (N, 2).

    Grey patches with the same stripes, at two other places, are no cause: every image has them.
    """
    coarse = torch.randn(number, 1, 8, 8, generator=generator)
    images = 0.4 * F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    images = (images + 0.2 * torch.randn(number, 1, SIDE, SIDE, generator=generator)).repeat(1, 3, 1, 1)
    labels = torch.randint(len(COLOURS), (number,), generator=generator)
    places = torch.randint(SIDE - PATCH + 1, (number, 3, 2), generator=generator)
    for index, label in enumerate(labels.tolist()):
        grey, colour = torch.ones(3), torch.tensor(COLOURS[label])
        for place, ink in zip(reversed(places[index].tolist()), (grey, grey, colour), strict=True):
            rows, columns = (slice(start, start + PATCH) for start in place)
            images[index, :, rows, columns] = _stripes(ink, generator)
    return images, labels, places[:, 0]


def _stripes(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Return a patch (3, PATCH, PATCH) with stripes of one colour on black, across or upright."""
    phase = int(torch.randint(8, (), generator=generator))
    wave = ((torch.arange(PATCH) + phase) % 8 < 4).float()
    grid = wave[:, None].expand(PATCH, PATCH)
    grid = grid if torch.randint(2, (), generator=generator) else grid.T
    return ink[:, None, None] * grid - (1 - grid)


def train(network: nn.Module, generator: torch.Generator, most_steps: int) -> float:
    """Train a network until it is right on 99 % of fresh images; return its accuracy."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, 50)
    loss, accuracy = build_loss(), 0.0
    for step in range(1, most_steps + 1):
        images, labels, _ = draw_images(BATCH, generator)
        optimizer.zero_grad()
        loss(network.train()(images), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 and (accuracy := measure_accuracy(network, generator)) >= LEAST_ACCURACY:
            break
    network.eval()
    return accuracy


@torch.no_grad()
def measure_accuracy(network: nn.Module, generator: torch.Generator) -> float:
    """Return the accuracy on 256 fresh images; the network stays in eval mode."""
    images, labels, _ = draw_images(256, generator)
    return float((decide(network.eval()(images)) == labels).float().mean())


# --- methods ---------------------------------------------------------------------------------------


class RefusedError(Exception):
    """A method that is not defined for a network."""


def _of_pixels(compute: Callable[[nn.Module, Tensor, Tensor], Tensor], network: nn.Module) -> ComputeMaps:
    return lambda images, classes: [
        to_heat_map(one) for one in compute(network, images, torch.tensor(classes))
    ]


def _of_cam(kind: type[GradCam], network: nn.Module) -> ComputeMaps:
    cam = kind(network, SIZE)
    if cam.reason:
        raise RefusedError(cam.reason)
    return lambda images, classes: cam(images, classes)[0]


def _by_rule(rule: Rule, network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    with ReluRule(rule) as relus:
        gradient = compute_gradient(network, images, classes)
    if relus.others:
        raise RefusedError(f"defined for ReLU only, and there is {', '.join(relus.others)}")
    return gradient.abs().amax(dim=1)


METHODS: dict[str, Callable[[nn.Module], ComputeMaps]] = {
    "grad-cam": partial(_of_cam, GradCam),
    "layer-cam": partial(_of_cam, LayerCam),
    "gradient": partial(_of_pixels, compute_saliency),
    "smoothgrad": partial(_of_pixels, compute_smoothgrad),
    "integrated": partial(_of_pixels, compute_integrated),
    "occlusion": partial(_of_pixels, compute_occlusion),
    "deconvnet": partial(_of_pixels, partial(_by_rule, "deconv")),
    "guided": partial(_of_pixels, partial(_by_rule, "guided")),
}


def find_mass(heat: HeatMap, place: Sequence[int]) -> float:
    """Return the share of a map's values in the patch or near it; 0 without a map."""
    if heat.values is None:
        return 0.0
    fine = F.interpolate(heat.values[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
    return float(fine[_near(place)].sum() / fine.sum())


def compute_chance() -> float:
    """Return the mass of a map that is the same everywhere."""
    places = torch.cartesian_prod(*[torch.arange(0, SIDE - PATCH + 1, 4)] * 2).tolist()
    whole = HeatMap(torch.ones(SIDE, SIDE))
    return sum(find_mass(whole, place) for place in places) / len(places)


def _near(place: Sequence[int]) -> tuple[slice, slice]:
    rows, columns = (slice(max(0, start - MARGIN), start + PATCH + MARGIN) for start in place)
    return rows, columns


# --- the question ----------------------------------------------------------------------------------


def plan(bench: Bench) -> list[Case]:
    """Return a case for each family."""
    names = ("resnet", "vit") if bench.quick else tuple(FAMILIES)
    return [Case(f"planted-{name}", network=name, epochs=2 if bench.quick else MOST_STEPS) for name in names]


def measure(turn: Turn) -> Figures:
    """Return the mass and the checks of each method, or why it is not defined."""
    torch.manual_seed(turn.repeat)
    generator = torch.Generator().manual_seed(turn.repeat)
    network = FAMILIES[turn.case.network][1](num_classes=len(COLOURS))  # type: ignore[call-arg]
    figures: Figures = {"accuracy": train(network, generator, turn.case.epochs)}
    images, labels, places = draw_images(8 if turn.bench.quick else IMAGES, generator)
    for name, make in METHODS.items():
        try:
            figures[name] = _measure_method(network, make, images, labels.tolist(), places.tolist())
        except RefusedError as error:
            figures[name] = {"refused": str(error)}
    return figures


def _measure_method(
    network: nn.Module,
    make: Callable[[nn.Module], ComputeMaps],
    images: Tensor,
    labels: list[int],
    places: list[list[int]],
) -> dict[str, float | bool | None]:
    maps = make(network)(images, labels)
    few = slice(0, 8)
    similar = measure_randomisation(
        network, find_stages(network, SIZE), make, images[few], labels[few], maps[few]
    )
    deletion = judge_deletion(measure_advantage(network, images, labels, maps))
    masses = [find_mass(heat, place) for heat, place in zip(maps, places, strict=True)]
    return {
        "mass": sum(masses) / len(masses),
        "similar": max(similar.values(), default=0.0),
        "randomisation": judge_randomisation(similar, 8).passed,
        "advantage": deletion.facts.get("advantage"),
        "deletion": deletion.passed,
    }


def write(results: Results) -> Iterator[str]:
    """Yield a table of masses, a row for each family; in brackets if the checks refuse the map."""
    chance = f"{100 * compute_chance():.0f}"
    yield f"Mass in the patch, in percent; a map that is the same everywhere has {chance}.\n"
    rows = []
    for name, (what, _) in FAMILIES.items():
        for result in results.of(f"planted-{name}", OURS)[:1]:
            cells = (_cell(result.figures[method]) for method in METHODS)
            rows.append((name, what, f"{100 * result.figures['accuracy']:.0f}", *cells))
    yield from table(("family", "what it is", "accuracy", *METHODS), rows)


def _cell(found: dict[str, Any]) -> str:
    if "refused" in found:
        return "no"
    mass = f"{100 * found['mass']:.0f}"
    is_refused = False in (found["randomisation"], found["deletion"])
    return f"({mass})" if is_refused else mass


QUESTION = Question("planted", plan, measure, write=write)
