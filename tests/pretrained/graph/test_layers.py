"""Layers by name, what they give, and how it is pooled: against hooks and timm's own intermediates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UsageError
from pretrained.graph.classifier import head_parameters
from pretrained.graph.layers import FeatureExtractor, Layers
from pretrained.graph.pooling import Form, Pool, check_pool, find_form, pool_tensor
from pretrained.graph.recorder import FeaturePoint
from pretrained.graph.stages import find_stages

SIZE = (3, 64, 64)


def layers_of(network: nn.Module, size: tuple[int, int, int] = SIZE) -> Layers:
    head = None if hasattr(network, "get_classifier") else head_parameters(network)
    return Layers(network, find_stages(network, size, head), size)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5).eval()


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    torch.manual_seed(0)
    return tv.squeezenet1_0(num_classes=5).eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64).eval()


def images(number: int = 2) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(3))


def take(network: nn.Module, names: list[str], pool: Pool = "auto") -> dict[str, Tensor]:
    layers = layers_of(network).select(names, pool)
    with torch.no_grad():
        rows = FeatureExtractor(network, layers, pool)(images())
    return {layer.name: row for layer, row in zip(layers, rows, strict=True)}


# --- against other implementations ---------------------------------------------------------------


def test_stages_of_a_resnet_are_timms_intermediates(resnet: nn.Module) -> None:
    given = take(resnet, ["all"])
    with torch.no_grad():
        maps = resnet.forward_intermediates(images(), intermediates_only=True)  # type: ignore[operator]
    assert list(given) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for name, found in zip(given, maps, strict=True):
        if name != "conv1":  # timm's is the activation, ours what the max pooling leaves of it
            assert torch.allclose(given[name], found.mean((2, 3)), atol=1e-6)
    pooled = F.max_pool2d(maps[0], 3, 2, 1).mean((2, 3))
    assert torch.allclose(given["conv1"], pooled, atol=1e-6)


def test_blocks_of_a_vit_are_timms_intermediates_with_the_class_token(vit: nn.Module) -> None:
    given = take(vit, ["blocks.0", "blocks.11"], "token")
    with torch.no_grad():
        found = vit.forward_intermediates(  # type: ignore[operator]
            images(), indices=[0, 11], return_prefix_tokens=True, intermediates_only=True, norm=False
        )
    for row, (_, prefix) in zip(given.values(), found, strict=True):
        assert torch.allclose(row, prefix[:, 0], atol=1e-6)


def test_the_mean_of_tokens_leaves_the_class_token_out(vit: nn.Module) -> None:
    given = take(vit, ["blocks.3"], "avg")["blocks.3"]
    with torch.no_grad():
        [grid] = vit.forward_intermediates(images(), indices=[3], intermediates_only=True)  # type: ignore[operator]
    assert torch.allclose(given, grid.mean((2, 3)), atol=1e-5)


def test_alexnets_stages_and_modules_are_the_layers_of_zeiler_and_fergus() -> None:
    torch.manual_seed(0)
    network = tv.alexnet(num_classes=5).eval()
    layers = layers_of(network, (3, 224, 224))
    points = [layer.point.module for layer in layers.stages]
    assert points == ["features.2", "features.5", "avgpool", "classifier.5"]
    assert layers.stages[-1].num_features("avg") == 4096


def test_a_relu_in_place_does_not_change_what_comes_before_it(squeezenet: nn.Module) -> None:
    given = take(squeezenet, ["features.[0]", "features.1"])
    with torch.no_grad():
        convolved = squeezenet.features[0](images())  # type: ignore[index]
    assert (convolved < 0).any()
    assert torch.allclose(given["features.0"], convolved.mean((2, 3)), atol=1e-6)
    assert torch.allclose(given["features.1"], convolved.relu().mean((2, 3)), atol=1e-6)


# --- names ---------------------------------------------------------------------------------------


def test_a_stage_comes_before_a_module_of_its_name(squeezenet: nn.Module) -> None:
    layers = layers_of(squeezenet)
    assert layers.select(["features.0"])[0].point.module == "features.2"
    assert layers.select(["features.[0]"])[0].point.module == "features.0"
    with pytest.raises(UsageError, match="a stage here and a module there"):
        layers.select(["features.0", "features.[0]"])


def test_words_names_and_patterns(resnet: nn.Module) -> None:
    layers = layers_of(resnet)
    assert [layer.name for layer in layers.select(["last"])] == ["layer4"]
    assert [layer.name for layer in layers.select(["layer?.1"])] == [f"layer{i}.1" for i in range(1, 5)]
    assert [layer.name for layer in layers.select(["layer4.*"])] == ["layer4.0", "layer4.1"]
    assert layers.select(["layer3", "all", "layer3"])[0].name == "layer3"
    assert len(layers.select(["all", "layer3"])) == 5
    assert layers.select(["pre_logits"])[0].point.module == "fc"


def test_a_module_that_is_called_again_counts_by_its_last_call() -> None:
    torch.manual_seed(0)
    network = tv.resnet18(num_classes=5).eval()
    given = take(network, ["layer1.0.relu", "layer1.0"])
    assert torch.equal(given["layer1.0.relu"], given["layer1.0"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("layr4", "did you mean 'layer4'"), ("layer9.*", "no stage and no module"), ("", "no stage")],
)
def test_unknown_layers_are_refused_with_the_nearest(resnet: nn.Module, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        layers_of(resnet).select([name])


class Odd(nn.Module):
    """One module that nobody calls, and one that gives no tensor with a row an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.unused = nn.Linear(4, 4)
        self.summed = Summed()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.fc(x) + self.summed(x)


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def test_layers_that_give_no_tensor_are_refused() -> None:
    layers = layers_of(Odd().eval())
    with pytest.raises(UsageError, match="never calls it"):
        layers.select(["unused"])
    with pytest.raises(UsageError, match="no tensor with a row for each image"):
        layers.select(["summed"])


def test_a_network_without_a_classifier_has_no_pre_logits() -> None:
    network = timm.create_model("test_vit", num_classes=0).eval()
    layers = layers_of(network, (3, 160, 160))
    assert layers.pre_logits is None
    with pytest.raises(UsageError, match="no classifier"):
        layers.select(["pre_logits"])


def test_what_depends_on_the_classifier_is_known(resnet: nn.Module) -> None:
    layers = layers_of(resnet)
    modules = layers.modules()
    assert [name for name in modules if layers.reads_head(modules[name])] == ["fc"]
    assert not any(layers.reads_head(layer) for layer in (*layers.all, layers.pre_logits) if layer)


def test_a_place_is_found_again(resnet: nn.Module) -> None:
    layers = layers_of(resnet)
    for layer in layers.all:
        again = layers.at(layer.point)
        assert (again.point, again.forms) == (layer.point, layer.forms)
    with pytest.raises(UsageError, match="no features there"):
        layers.at(FeaturePoint("layer4", 7, False))


# --- pooling -------------------------------------------------------------------------------------


def test_pools_of_a_map(resnet: nn.Module) -> None:
    pools: tuple[Pool, ...] = ("avg", "max", "avgmax", "grid2", "flatten")
    given = {pool: take(resnet, ["layer3"], pool)["layer3"] for pool in pools}
    with torch.no_grad():
        [grid] = resnet.forward_intermediates(images(), indices=[3], intermediates_only=True)  # type: ignore[operator]
    assert torch.allclose(given["avg"], grid.mean((2, 3)))
    assert torch.equal(given["max"], grid.amax((2, 3)))
    assert torch.allclose(given["avgmax"], (grid.mean((2, 3)) + grid.amax((2, 3))) / 2)
    assert torch.allclose(given["grid2"], F.adaptive_avg_pool2d(grid, 2).flatten(1), atol=1e-6)
    assert torch.equal(given["flatten"], grid.flatten(1))


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "grid2"])
def test_channels_last_and_tokens_pool_as_channels_first(pool: Pool) -> None:
    grid = torch.randn(2, 6, 4, 4)
    size = (3, 32, 32)
    first = find_form((1, 6, 4, 4), size, 0)
    last = find_form((1, 4, 4, 6), size, 0)
    tokens = find_form((1, 17, 6), size, 1)
    assert first and last and tokens and tokens.prefix == 1
    wanted = pool_tensor(grid, first, pool, 2)
    nhwc = grid.permute(0, 2, 3, 1)
    assert torch.allclose(pool_tensor(nhwc, last, pool, 2), wanted, atol=1e-6)
    prefixed = torch.cat([torch.full((2, 1, 6), 99.0), nhwc.flatten(1, 2)], 1)
    assert torch.allclose(pool_tensor(prefixed, tokens, pool, 2), wanted, atol=1e-6)


def test_windows_in_the_batch_axis_come_back_to_their_image() -> None:
    tokens = torch.randn(2, 4, 4, 5)  # two images of four windows of four tokens
    form = find_form((4, 4, 5), (3, 16, 16), 0)
    assert form == Form("tokens", 0, (4, 4), 5)
    assert form is not None
    rows = pool_tensor(tokens.flatten(0, 1), form, "avg", 2)
    assert torch.allclose(rows, tokens.mean((1, 2)), atol=1e-6)


def test_pooled_rows_share_no_memory_with_the_network() -> None:
    vector = torch.randn(2, 3)
    form = find_form((1, 3), SIZE, 0)
    assert form is not None
    rows = pool_tensor(vector, form, "flatten", 2)
    before = rows.clone()
    vector.zero_()
    assert torch.equal(rows, before)


def test_pools_that_a_layer_has_nothing_for_are_refused() -> None:
    with pytest.raises(UsageError, match="no class token"):
        check_pool("layer4", Form("channels_first", 0, (7, 7), 8), "token")
    with pytest.raises(UsageError, match="no quarters"):
        check_pool("layer4", Form("channels_first", 0, (1, 1), 8), "grid2")
    check_pool("head", Form("vector", 0, None, 8), "grid2")


# --- extraction ----------------------------------------------------------------------------------------


def test_the_forward_ends_where_the_last_layer_was_reached(resnet: nn.Module) -> None:
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
        for name, module in resnet.named_modules()
    ]
    take(resnet, ["layer1", "layer2"])
    assert "layer2" in called and "layer3" not in called
    for handle in handles:
        handle.remove()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in resnet.modules()]
    assert sum(hooks) == 0


def test_all_layers_come_from_one_forward(resnet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    forward: Callable[..., Tensor] = resnet.forward

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return forward(x)

    extract = FeatureExtractor(resnet, layers_of(resnet).all, "auto", with_logits=True)
    monkeypatch.setattr(resnet, "forward", counted)
    with torch.no_grad():
        *rows, logits = extract(images())
    assert count == 1 and len(rows) == 5
    assert torch.equal(logits, forward(images()))
