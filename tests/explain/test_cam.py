"""Heat maps against CAM, against plain autograd, and over families of networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UsageError
from finetune.explain.attribution.cam import NO_MAP, GradCam
from finetune.explain.attribution.heat_map import CONSTANT, NO_EVIDENCE
from finetune.explain.attribution.layer_cam import LayerCam
from finetune.explain.positions import MapPosition, find_position
from pretrained.catalog import find_card
from pretrained.graph.classifier import classifier_layers
from pretrained.graph.layers import Layers
from pretrained.graph.recorder import FeaturePoint
from pretrained.heads import change_head, init_classifier
from pretrained.network import build_network
from pretrained.stage_classifier import build_stage_classifier
from tests.contracts.families import DEFAULT, SHALLOW, SMALLEST
from tests.sweeps import slow_except


def build(name: str, num_classes: int = 10) -> tuple[nn.Module, tuple[int, int, int]]:
    card = find_card(name)
    torch.manual_seed(0)
    arguments = tuple(SHALLOW.get(card.architecture, {}).items())
    network = build_network(replace(card, num_classes=num_classes, model_args=arguments))
    for layer in classifier_layers(network):
        init_classifier(layer)  # some heads start at zero: there is no gradient
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network.eval(), card.preprocessing.input_size


def noise(size: tuple[int, int, int], count: int = 2) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def normalised(evidence: Tensor) -> Tensor:
    return (evidence / evidence.max()).clamp_min(0)


# --- Parity ---


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["squeezenet1_0", "torchvision/resnet18", "test_resnet"])
def test_grad_cam_is_cam_with_pooling_and_a_linear_head(name: str) -> None:
    """CAM (arXiv:1512.04150) is the sum of the last features, weighted by the head."""
    network, size = build(name)
    change_head(network, 10, "replace")
    network.eval()
    images = noise(size)
    last = {"squeezenet1_0": "features", "torchvision/resnet18": "layer4", "test_resnet": "layer4"}[name]
    kept: list[Tensor] = []
    handle = network.get_submodule(last).register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    [head] = classifier_layers(network)
    evidence = torch.einsum("kc,bchw->bkhw", head.weight, kept[0]).detach()
    cam = GradCam(network, size)
    compared = 0
    for label in range(10):
        [maps] = cam(images, [label, label])
        for number, heat in enumerate(maps):
            expected = evidence[number, label]
            if heat.values is None:
                assert heat.reason == NO_EVIDENCE and expected.max() <= 1e-6 * expected.abs().max()
            else:
                assert torch.allclose(heat.values, normalised(expected), atol=1e-4)
                compared += 1
    assert compared >= 5


def test_a_relu_in_place_after_the_map_changes_nothing() -> None:
    """The map is the output of a batch norm, which the next ReLU overwrites."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 4)).eval()
    network.head = network[5]  # type: ignore[assignment]  # what torchvision calls it

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(network[0], network[1])
            self.fc = network[5]

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(F.relu(self.features(images), inplace=True).mean(dim=(2, 3)))

    model, images = InPlace().eval(), noise((3, 32, 32))
    features = model.features(images).detach().requires_grad_()
    logits = model.fc(F.relu(features).mean(dim=(2, 3)))
    [gradient] = torch.autograd.grad(logits[:, 1].sum(), features)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).detach()
    [maps] = GradCam(model, (3, 32, 32))(images, [1, 1])
    for heat, evidence in zip(maps, expected, strict=True):
        assert heat.values is not None
        assert torch.allclose(heat.values, normalised(evidence), atol=1e-5)


def test_a_head_on_several_stages_gets_the_sum_of_their_maps() -> None:
    network, size = build("test_resnet")
    points = [FeaturePoint("layer3", 0, False), FeaturePoint("layer4", 0, False)]
    solved = build_stage_classifier(network, points, "avg", 3, size).eval()
    init_classifier(solved.classifier)
    images = noise(size)
    with torch.no_grad():
        maps = dict(zip(("layer3", "layer4"), _outputs(network, ("layer3", "layer4"), images), strict=True))
    width = maps["layer3"].shape[1]
    weight = solved.classifier.weight[2].detach()
    early = torch.einsum("c,bchw->bhw", weight[:width], maps["layer3"])
    late = torch.einsum("c,bchw->bhw", weight[width:], maps["layer4"])
    big = tuple(early.shape[1:])
    expected = early + F.interpolate(late[:, None], big, mode="bilinear")[:, 0]
    [found] = GradCam(solved, size)(images, [2, 2])
    for heat, evidence in zip(found, expected, strict=True):
        assert heat.values is not None
        assert torch.allclose(heat.values, normalised(evidence), atol=1e-4)


def _outputs(network: nn.Module, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out.clone()))
        for name in names
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return kept


# --- At a layer that the user names, and LayerCAM ---


def position_of(network: nn.Module, name: str, size: tuple[int, int, int]) -> MapPosition:
    [layer] = Layers(network, (), size).select([name])
    return find_position(network, layer, size)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("torchvision/resnet18", "layer3.0.bn2"),  # a sum and a ReLU in place follow
        ("torchvision/squeezenet1_1", "features.7.expand3x3"),  # a ReLU in place follows
        ("test_resnet", "layer2"),
    ],
)
def test_a_named_layer_has_captums_map(name: str, layer: str) -> None:
    network, _ = build(name)
    size, labels = (3, 64, 64), torch.tensor([1, 4])
    images = noise(size)
    expected = LayerGradCam(network, network.get_submodule(layer)).attribute(images.clone(), labels)
    [maps] = GradCam(network, size, position_of(network, layer, size))(images, labels.tolist())
    compared = 0
    for heat, evidence in zip(maps, expected.detach()[:, 0], strict=True):
        if heat.values is not None:
            torch.testing.assert_close(heat.values, normalised(evidence), rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared


@pytest.mark.parametrize(
    ("name", "layer", "order"),
    [
        ("test_resnet", "layer3", "channels_first"),
        ("swin_tiny_patch4_window7_224", "layers.1", "channels_last"),
        ("test_vit", "blocks.3", "tokens"),
    ],
)
def test_layer_cam_is_its_formula_for_every_order_of_axes(name: str, layer: str, order: str) -> None:
    """The sum over channels of positive gradient times feature; written out, with hooks of its own."""
    torch.manual_seed(0)
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)} if "swin" in name else {}
    more = {"img_size": 64, **small} if order != "channels_first" else {}
    network = timm.create_model(name, num_classes=5, **more).eval()
    size, images = (3, 64, 64), noise((3, 64, 64))
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output.clone()

    handle = network.get_submodule(layer).register_forward_hook(keep)
    network(images)[:, 2].sum().backward()
    handle.remove()
    features, slopes = kept[0].detach(), kept[0].grad
    assert slopes is not None
    if order == "channels_last":
        features, slopes = features.permute(0, 3, 1, 2), slopes.permute(0, 3, 1, 2)
    if order == "tokens":  # one class token, then 4 x 4 patches
        features, slopes = (one[:, 1:].transpose(1, 2).reshape(2, -1, 4, 4) for one in (features, slopes))
    position = position_of(network, layer, size)
    assert position.form.order == order
    [layered] = LayerCam(network, size, position)(images, [2, 2])
    [plain] = GradCam(network, size, position)(images, [2, 2])
    weighed = (slopes.clamp_min(0) * features).sum(dim=1)
    averaged = (slopes.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)
    compared = 0
    for maps, expected in ((layered, weighed), (plain, averaged)):
        for heat, evidence in zip(maps, expected, strict=True):
            if heat.values is not None:
                torch.testing.assert_close(heat.values, normalised(evidence), rtol=1e-3, atol=1e-4)
                compared += 1
    assert compared >= 2


def test_a_layer_that_is_read_at_its_class_token_only_is_refused() -> None:
    network, size = build("test_vit")
    cam = GradCam(network, size, position_of(network, f"blocks.{len(network.blocks) - 1}", size))
    assert "a class token is all that is read" in cam.reason
    [[heat]] = cam(noise(size, 1), [0])
    assert heat.values is None and heat.reason == cam.reason
    assert GradCam(network, size, position_of(network, "blocks.0", size)).reason == ""


@pytest.mark.parametrize(("layer", "said"), [("layers.0.blocks.0.attn", "windows"), ("head.fc", "no map")])
def test_what_is_no_map_is_refused(layer: str, said: str) -> None:
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4}
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=64, **small).eval()
    with pytest.raises(UsageError, match=said):
        position_of(network, layer, (3, 64, 64))


# --- Every family of networks ---

NAMES = [f"timm/{name}" for name in SMALLEST.values()]
NAMES += [name for name in DEFAULT if name.startswith("torchvision/")]
REFUSED = {"timm/crossvit_tiny_240", "timm/efficientvim_m1"}
"""Networks with parallel branches from early on, or with a state beside the map."""


def check(name: str) -> None:
    network, size = build(name)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    cam, images = GradCam(network, size), noise(size)
    first, second = cam(images, [1, 2], [3, 4])
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert torch.is_grad_enabled() and not any(module._forward_hooks for module in network.modules())
    if name in REFUSED:
        assert cam.reason.startswith(NO_MAP)
        assert all(heat.values is None and heat.reason == cam.reason for heat in first + second)
        return
    assert cam.reason == ""
    for heat in first + second:
        if heat.values is None:
            assert heat.reason in (NO_EVIDENCE, CONSTANT)
            continue
        assert heat.values.ndim == 2 and min(heat.values.shape) > 1
        assert heat.values.min() >= 0 and heat.values.max() == pytest.approx(1)
    [alone] = cam(images[1:], [2])
    if (single := alone[0].values) is not None and (batched := first[1].values) is not None:
        assert torch.allclose(
            single, batched, atol=1e-3
        )  # a map does not depend on other images of the batch
    check_positions(cam, network, size)


def check_positions(cam: GradCam, network: nn.Module, size: tuple[int, int, int]) -> None:
    """A change in one quarter of the image changes that quarter of the features most."""
    from finetune.explain.leaves import forward_from
    from finetune.explain.units import read_map

    assert cam.position is not None
    image = noise(size, 1)
    changed = image.repeat(4, 1, 1, 1)
    half_h, half_w = size[1] // 2, size[2] // 2
    other = torch.randn(size, generator=torch.Generator().manual_seed(2))
    corners = [(top, left) for top in (0, half_h) for left in (0, half_w)]
    for number, (top, left) in enumerate(corners):
        window = (slice(None), slice(top, top + half_h), slice(left, left + half_w))
        changed[number][window] = other[window]
    with torch.no_grad():
        [(leaf, form)], _ = forward_from(network, cam.position, torch.cat([image, changed]))
    if form.order == "channels_first":
        return  # the order is fixed, and attention with random weights mixes all positions
    grid = read_map(leaf, form).detach()
    difference = (grid[1:] - grid[:1]).abs().mean(dim=1, keepdim=True)
    quarters = F.adaptive_avg_pool2d(difference, 2).flatten(1)
    for number, quarter in enumerate(quarters):
        if quarter.max() > 1.01 * quarter.min():  # LeViT with random weights gives the same everywhere
            assert quarter.argmax() == number, quarters


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", slow_except(DEFAULT, NAMES))
def test_every_family_gives_maps_or_a_reason(name: str) -> None:
    check(name)


def test_a_vision_transformer_is_explained_before_its_last_block() -> None:
    """Its classifier reads the class token alone, so the position is before the last block."""
    network = torchvision.models.VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=4).eval()
    init_classifier(network.heads[0])  # type: ignore[arg-type]
    cam = GradCam(network, (3, 64, 64))
    assert cam.position is not None and cam.position.form.prefix == 1
    assert cam.position.point.module == "encoder.layers.encoder_layer_1"
    [maps] = cam(noise((3, 64, 64)), [0, 1])
    assert any(heat.values is not None and heat.values.shape == (4, 4) for heat in maps)


def test_a_network_without_a_map_gives_the_reason() -> None:
    network = nn.Sequential(nn.Flatten(1), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    cam = GradCam(network, (3, 8, 8))
    assert cam.reason.startswith(NO_MAP)
    [[heat]] = cam(noise((3, 8, 8), 1), [0])
    assert heat.values is None and heat.reason == cam.reason


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_map_of_one_cell_is_left_out_with_the_reason(name: str) -> None:
    """It would colour the whole image."""
    more = {"img_size": 16} if name.startswith("vit") else {}
    network = timm.create_model(name, num_classes=2, **more).eval()
    [[heat]] = GradCam(network, (3, 16, 16))(noise((3, 16, 16), 1), [0])
    assert heat.values is None and heat.reason.startswith(
        "at 16 x 16 pixels, its last features have a single"
    )


def test_stages_of_one_cell_are_left_out_with_the_reason() -> None:
    network, _ = build("test_resnet")
    size = (3, 16, 16)
    points = [FeaturePoint("layer4", 0, False)]
    solved = build_stage_classifier(network, points, "avg", 3, size).eval()
    assert GradCam(solved, size).reason.startswith("at 16 x 16 pixels, its last features have a single")


def test_a_map_without_evidence_gives_the_reason() -> None:
    class Against(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU())
            self.fc = nn.Linear(4, 2)
            nn.init.constant_(self.fc.weight, -1)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.features(images).mean(dim=(2, 3)))

    torch.manual_seed(0)
    [[heat]] = GradCam(Against().eval(), (3, 16, 16))(noise((3, 16, 16), 1), [0])
    assert (heat.values, heat.reason) == (None, NO_EVIDENCE)
