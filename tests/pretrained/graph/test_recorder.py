"""Recording and replacing values in a forward pass, against plain hooks and forwards written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import InternalError
from pretrained.graph.recorder import (
    FeaturePoint,
    FeatureRecorder,
    PointNotReachedError,
    observe_calls,
    replace_value,
)


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def output_of(module: str, number: int = 0) -> FeaturePoint:
    return FeaturePoint(module, number, at_input=False)


def input_of(module: str, number: int = 0) -> FeaturePoint:
    return FeaturePoint(module, number, at_input=True)


def num_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


# --- raw maps of the families ----------------------------------------------------------------------


def resnet_maps(network: Any, x: Tensor) -> dict[FeaturePoint, Tensor]:
    """The batch norm's output is overwritten by the ReLU in place after it."""
    conv = network.conv1(x)
    norm = network.bn1(conv)
    layer1 = network.layer1(network.maxpool(F.relu(norm)))
    return {output_of("conv1"): conv, output_of("bn1"): norm, output_of("layer1"): layer1}


def vgg_maps(network: Any, x: Tensor) -> dict[FeaturePoint, Tensor]:
    """``features.0`` is a convolution, and ``features.1`` a ReLU in place on its output."""
    conv = network.features[0](x)
    rectified = F.relu(conv)
    pooled = network.features[4](F.relu(network.features[2](rectified)))
    return {
        output_of("features.0"): conv,
        output_of("features.1"): rectified,
        output_of("features.4"): pooled,
    }


def densenet_maps(network: Any, x: Tensor) -> dict[FeaturePoint, Tensor]:
    """Torchvision applies a ReLU in place to the output of ``features``."""
    conv = network.features.conv0(x)
    norm = network.features.norm0(conv)
    features = network.features(x).clone()
    return {
        output_of("features.conv0"): conv,
        output_of("features.norm0"): norm,
        output_of("features"): features,
    }


def vit_maps(network: Any, x: Tensor) -> dict[FeaturePoint, Tensor]:
    embedded = network.patch_embed(x)
    tokens = network.norm_pre(network.patch_drop(network._pos_embed(embedded)))
    first = network.blocks[0](tokens)
    second = network.blocks[1](first)
    return {output_of("patch_embed"): embedded, input_of("blocks.1"): first, output_of("blocks.1"): second}


Maps = Callable[[Any, Tensor], dict[FeaturePoint, Tensor]]
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Maps]] = {
    "resnet": (tv.resnet18, resnet_maps),
    "vgg": (tv.vgg13, vgg_maps),
    "densenet": (tv.densenet121, densenet_maps),
    "vit": (lambda: timm.create_model("test_vit", img_size=32), vit_maps),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_raw_maps_are_those_of_the_forward_written_out(family: str) -> None:
    build, maps = FAMILIES[family]
    torch.manual_seed(0)
    network, x = build().eval(), images()
    with torch.no_grad():
        expected = maps(network, x)
        whole = network(x)
        recorder = FeatureRecorder(network, list(expected))
        early = recorder.record(x)
        complete, output = recorder.record_all(x)
    assert torch.equal(output, whole)
    for point, one, other in zip(expected, early, complete, strict=True):
        assert torch.equal(one, expected[point]), point
        assert torch.equal(other, expected[point]), point
    assert num_hooks(network) == 0


def test_values_come_in_the_order_of_the_points_also_twice() -> None:
    network = tv.resnet18().eval()
    points = [output_of("layer2"), output_of("layer1"), output_of("layer2")]
    with torch.no_grad():
        late, early, again = FeatureRecorder(network, points).record(images())
    assert late.shape[1:] == (128, 4, 4) and early.shape[1:] == (64, 8, 8)
    assert torch.equal(late, again)


def test_gradients_flow_through_what_is_recorded() -> None:
    torch.manual_seed(0)
    network = tv.resnet18().eval()
    x = images().requires_grad_()
    [value] = FeatureRecorder(network, [output_of("layer1")]).record(x)
    [gradient] = torch.autograd.grad(value.sum(), x)
    assert gradient.any()


# --- calls -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Calls one module twice, the second time on a pair, and overwrites what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Identity()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        first = self.scale(x + 1)
        first.mul_(2)
        if x.sum() > 1000:  # another way for other images
            return first
        second = self.scale(first * 10)
        both = self.pair(second)["both"]
        total: Tensor = both[0] + both[1]
        second.zero_()
        return total


class Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"both": (x, -0.5 * x)}


ONES = torch.ones(1, 3, 2, 2)


def test_calls_of_a_module_are_told_apart_and_structures_are_copied() -> None:
    points = [output_of("scale", 0), output_of("scale", 1), input_of("scale", 1), output_of("pair")]
    values, output = FeatureRecorder(Twice(), points).record_all(ONES)
    assert [value.unique().item() for value in values[:3]] == [2, 40, 40]
    assert [value.unique().item() for value in values[3]["both"]] == [40, -20]
    assert torch.equal(output, 20 * ONES)


def test_a_transform_gets_the_value_before_it_is_overwritten() -> None:
    points = [output_of("scale", 0), output_of("scale", 1)]
    transforms = [lambda value: value.mean().item(), lambda value: value.shape]
    assert FeatureRecorder(Twice(), points, transforms).record(ONES) == [2, (1, 3, 2, 2)]


def test_a_forward_that_takes_another_way_is_refused() -> None:
    recorder = FeatureRecorder(network := Twice(), [output_of("scale", 1)])
    for record in (recorder.record, recorder.record_all):
        with pytest.raises(PointNotReachedError, match=r"without reaching scale \(call 2\)") as caught:
            record(1000 * ONES)
        assert isinstance(caught.value, InternalError)
    assert num_hooks(network) == 0
    assert recorder.record(ONES)[0].unique().item() == 40  # nothing is left of the calls before


def test_a_recorder_inside_a_network_does_not_end_one_around_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = Twice(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            [value] = FeatureRecorder(self.body, [output_of("scale", 0)]).record(x)
            result: Tensor = self.last(value * 3)
            return result

    outer = Outer()
    [value] = FeatureRecorder(outer, [output_of("last")]).record(ONES)
    assert torch.equal(value, 6 * ONES)


def test_hooks_go_after_errors_of_network_transform_and_observer() -> None:
    network = Twice()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        FeatureRecorder(network, [output_of("scale")], [fail]).record(ONES)
    assert num_hooks(network) == 0
    with pytest.raises(TypeError):
        FeatureRecorder(network, [output_of("pair")]).record("no tensor")  # type: ignore[arg-type]
    assert num_hooks(network) == 0
    with pytest.raises(RuntimeError, match="no memory"), observe_calls({"scale": network.scale}, before=fail):
        network(ONES)
    assert num_hooks(network) == 0


def test_hooks_of_others_stay() -> None:
    network, seen = Twice(), []
    handle = network.scale.register_forward_hook(lambda _, __, output: seen.append(output) or output + 100)
    [value] = FeatureRecorder(network, [output_of("scale")]).record(ONES)
    assert torch.equal(value, 2 * ONES)  # what the module itself returns
    assert num_hooks(network) == 1
    handle.remove()


# --- replacing and observing -----------------------------------------------------------------------


@pytest.mark.parametrize("point", [input_of("pair"), output_of("scale", 1)])
def test_the_forward_continues_with_a_replaced_value(point: FeaturePoint) -> None:
    network = Twice()
    with replace_value(network, point, lambda value: value + 2):
        assert torch.equal(network(ONES), 21 * ONES)
    assert torch.equal(network(ONES), 20 * ONES)
    assert num_hooks(network) == 0


def test_every_call_is_observed() -> None:
    network, seen = Twice(), []
    with observe_calls(
        dict(network.named_modules()),
        before=lambda name, _: seen.append(f"{name}>"),
        after=lambda name, _: seen.append(f">{name}"),
    ):
        network(ONES)
    assert seen == [">", "scale>", ">scale", "scale>", ">scale", "pair>", ">pair", ">"]
