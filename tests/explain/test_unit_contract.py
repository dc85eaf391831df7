"""What every method on layers and units keeps, as the others do (:mod:`tests.explain.test_contract`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from finetune.explain.deconv import project_units
from finetune.explain.effective_field import measure_gradient_mass
from finetune.explain.feature_maps import compute_feature_maps
from finetune.explain.positions import MapPosition
from finetune.explain.receptive_field import find_boxes, measure_fields
from finetune.explain.top_units import TopRecorder
from finetune.explain.units import Unit, record_maps
from tests.explain.places import place
from tests.explain.test_contract import SIZE, BrokenError, images, unchanged

UNITS = [Unit(0, 1, 1), Unit(1, 0, 0)]
Method = Callable[[nn.Module, MapPosition, Tensor], object]

METHODS: dict[str, Method] = {
    "maps": lambda network, position, pixels: compute_feature_maps(network, position, pixels, [1, 3]),
    "record": lambda network, position, pixels: record_maps(network, [position], pixels),
    "top": lambda network, position, pixels: TopRecorder(network, [position], 2).add(pixels),
    "deconv": lambda network, position, pixels: project_units(network, position, pixels, UNITS),
    "guided": lambda network, position, pixels: project_units(network, position, pixels, UNITS, "guided"),
    "effective field": lambda network, position, pixels: measure_gradient_mass(network, [position], pixels),
}
"""Each takes a network in eval mode, a layer of it, and two images."""


@pytest.fixture(params=["test_resnet", "test_vit"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    more = {"img_size": 64} if "vit" in request.param else {}
    made: nn.Module = timm.create_model(request.param, num_classes=5, **more).eval()
    next(made.parameters()).requires_grad_(False)  # as in a run that froze its stem
    return made


def find_layer(network: nn.Module) -> MapPosition:
    """A layer without an activation below it that the deconvnet has no rule for."""
    return place(network, "patch_embed" if hasattr(network, "patch_embed") else "layer2", SIZE)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_method_leaves_nothing_behind(network: nn.Module, name: str, grad: bool) -> None:
    given, position = images(), find_layer(network)
    with unchanged(network), torch.set_grad_enabled(grad):
        METHODS[name](network, position, given)
    assert torch.equal(given, images()) and given.grad is None and not given.requires_grad


def test_receptive_fields_leave_nothing_behind(network: nn.Module) -> None:
    position = find_layer(network)
    with unchanged(network):
        measure_fields(network, [position], SIZE)
        find_boxes(network, position, SIZE, UNITS)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind_after_an_error(network: nn.Module, name: str) -> None:
    position = find_layer(network)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))

    def fail(pixels: Tensor) -> Tensor:
        raise BrokenError

    first.forward = fail  # type: ignore[method-assign]
    with unchanged(network), pytest.raises(BrokenError):
        METHODS[name](network, position, images())
