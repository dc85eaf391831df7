"""What every method keeps: network and random state are given back as they were, also after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from finetune.explain.ablation import find_blocks, without_block
from finetune.explain.attribution.cam import GradCam
from finetune.explain.attribution.gradient import compute_saliency
from finetune.explain.attribution.heat_map import HeatMap, to_heat_map
from finetune.explain.attribution.integrated import compute_integrated
from finetune.explain.attribution.layer_cam import LayerCam
from finetune.explain.attribution.occlusion import compute_occlusion
from finetune.explain.attribution.smoothgrad import compute_smoothgrad
from finetune.explain.checks.deletion import measure_advantage
from finetune.explain.checks.randomisation import measure_randomisation
from finetune.explain.class_image import compute_class_images
from finetune.explain.class_score import find_scores
from finetune.explain.invariance import measure_responses
from pretrained.graph.recorder import FeaturePoint
from pretrained.graph.stages import find_stages

SIZE = (3, 64, 64)
CLASSES = [1, 3]
Method = Callable[[nn.Module, Tensor], object]


def _of_pixels(method: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Method:
    return lambda network, images: method(network, images, torch.tensor(CLASSES))


def _randomise(network: nn.Module, images: Tensor) -> object:
    def make(other: nn.Module) -> Callable[[Tensor, Sequence[int]], list[HeatMap]]:
        return lambda some, classes: [
            to_heat_map(one) for one in compute_saliency(other, some, torch.tensor(classes))
        ]

    maps = make(network)(images, CLASSES)
    return measure_randomisation(network, find_stages(network, SIZE), make, images, CLASSES, maps)


def _climb(network: nn.Module, _: Tensor) -> object:
    bounds = torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)
    scores = find_scores(network, SIZE)
    return compute_class_images(scores, 1, torch.zeros(SIZE), bounds, [0], is_smooth=True, num_steps=3)


def _ablate(network: nn.Module, images: Tensor) -> object:
    with without_block(network, find_blocks(network, SIZE)[0]), torch.no_grad():
        return network(images)


METHODS: dict[str, Method] = {
    "grad-cam": lambda network, images: GradCam(network, SIZE)(images, CLASSES),
    "layer-cam": lambda network, images: LayerCam(network, SIZE)(images, CLASSES),
    "gradient": _of_pixels(compute_saliency),
    "smoothgrad": _of_pixels(partial(compute_smoothgrad, samples=2)),
    "integrated": _of_pixels(partial(compute_integrated, steps=2)),
    "occlusion": _of_pixels(partial(compute_occlusion, share=2)),
    "deletion": lambda network, images: measure_advantage(
        network, images, CLASSES, [to_heat_map(torch.rand(4, 4, generator=torch.Generator()))] * 2, 3, 1
    ),
    "randomisation": _randomise,
    "class image": _climb,
    "invariance": lambda network, images: measure_responses(
        network,
        [FeaturePoint("", 0, False)],
        images,
        torch.tensor(CLASSES),
        "scale",
        partial(torch.softmax, dim=1),
    ),
    "ablation": _ablate,
}
"""Each takes a network of five classes in eval mode, and two images (2, 3, 64, 64)."""


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Fail if the block leaves anything behind."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = {name: module.training for name, module in network.named_modules()}
    learns = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    drawn, grad = torch.get_rng_state(), torch.is_grad_enabled()
    yield
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert {name: one.requires_grad for name, one in network.named_parameters()} == learns
    assert all(parameter.grad is None for parameter in network.parameters())
    for module in network.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks), module
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.is_grad_enabled() is grad and not torch.is_inference_mode_enabled()


@pytest.fixture(params=["test_resnet", "test_vit"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    more = {"img_size": 64} if "vit" in request.param else {}
    made: nn.Module = timm.create_model(request.param, num_classes=5, **more).eval()
    next(made.parameters()).requires_grad_(False)  # as in a run that froze its stem
    return made


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_method_leaves_nothing_behind(network: nn.Module, name: str, grad: bool) -> None:
    given = images()
    with unchanged(network), torch.set_grad_enabled(grad):
        METHODS[name](network, given)
    assert torch.equal(given, images()) and given.grad is None and not given.requires_grad


class BrokenError(Exception):
    """Stands for whatever may go wrong in a network."""


class Failing(nn.Linear):
    """A layer that counts its calls, those of its copies too, and fails in one of them."""

    calls, limit = 0, 0

    def forward(self, features: Tensor) -> Tensor:
        Failing.calls += 1
        if Failing.calls == Failing.limit:
            raise BrokenError
        return super().forward(features)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind_after_an_error(network: nn.Module, name: str) -> None:
    """The network fails at its last layer, in the last of the forward passes that the method makes."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    last.__class__ = Failing
    Failing.calls, Failing.limit = 0, 0
    METHODS[name](network, images())
    Failing.calls, Failing.limit = 0, Failing.calls
    with unchanged(network), pytest.raises(BrokenError):
        METHODS[name](network, images())
