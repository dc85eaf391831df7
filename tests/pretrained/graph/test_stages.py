"""What stages a network has: known networks by hand, strangers by the order of their forward."""

import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.graph.flow import grid_of, trace_flow
from pretrained.graph.stages import Stage, find_stages

SIZE = (3, 224, 224)


def on_meta(build: Callable[..., nn.Module], *args: object, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **options)


def torchvision_stages(name: str, **options: object) -> tuple[Stage, ...]:
    return find_stages(on_meta(torchvision.models.get_model, name, weights=None, **options), SIZE)


def timm_stages(name: str) -> tuple[Stage, ...]:
    return find_stages(on_meta(timm.create_model, name), SIZE)


def names(stages: tuple[Stage, ...]) -> list[str]:
    return [stage.name for stage in stages]


def stage_of(stages: tuple[Stage, ...], module: str) -> str:
    return next(stage.name for stage in stages if module in stage.modules)


def parameters_of(stages: tuple[Stage, ...], name: str) -> set[str]:
    return next(set(stage.parameters) for stage in stages if stage.name == name)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "conv1 layer1 layer2 layer3 layer4 head"),
        ("alexnet", "features.0 features.3 features.6-10 neck head"),
        ("vgg16", "features.0-2 features.5-7 features.10-14 features.17-21 features.24-28 neck head"),
        ("squeezenet1_0", "features.0 features.3-5 features.7-10 features.12 head"),
        ("mobilenet_v2", "features.0-1 features.2-3 features.4-6 features.7-13 features.14-18 head"),
        ("convnext_tiny", "features.0 features.1 features.2-3 features.4-5 features.6-7 head"),
        (
            "densenet121",
            "features.conv0 features.denseblock1 features.denseblock2 features.denseblock3 "
            "features.denseblock4 head",
        ),
        (
            "vit_b_16",
            "conv_proj encoder.layers.encoder_layer_0-2 encoder.layers.encoder_layer_3-5 "
            "encoder.layers.encoder_layer_6-8 encoder.layers.encoder_layer_9-11 head",
        ),
    ],
)
def test_torchvision_networks(name: str, expected: str) -> None:
    assert names(torchvision_stages(name)) == expected.split()


def test_googlenet() -> None:
    stages = torchvision_stages("googlenet", aux_logits=False, init_weights=False)
    assert names(stages) == ["conv1", "conv2-3", "inception3a-3b", "inception4a-4e", "inception5a-5b", "head"]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "conv1 layer1 layer2 layer3 layer4 head"),
        ("vit_tiny_patch16_224", "patch_embed blocks.0-2 blocks.3-5 blocks.6-8 blocks.9-11 head"),
        ("beit_base_patch16_224", "patch_embed blocks.0-2 blocks.3-5 blocks.6-8 blocks.9-11 head"),
        ("convnext_atto", "stem stages.0 stages.1 stages.2 stages.3 head"),
        (
            "mobilenetv3_small_100",
            "conv_stem blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 neck head",
        ),
        (
            "vgg11",
            "features.0 features.3 features.6 features.8 features.11 features.13 features.16 features.18 "
            "neck head",
        ),
        (
            "vgg19",  # 16 groups of timm fold by grid, as the torchvision network does
            "features.0-2 features.5-7 features.10-16 features.19-25 features.28-34 neck head",
        ),
    ],
)
def test_timm_networks(name: str, expected: str) -> None:
    assert names(timm_stages(name)) == expected.split()


def test_roles() -> None:
    roles = [stage.role for stage in torchvision_stages("vgg16")]
    assert roles == ["stem", "body", "body", "body", "body", "neck", "head"]


def test_the_neck_is_what_stands_between_grid_and_head() -> None:
    assert parameters_of(torchvision_stages("vgg16"), "neck") == {
        "classifier.0.weight",
        "classifier.0.bias",
        "classifier.3.weight",
        "classifier.3.bias",
    }
    assert parameters_of(timm_stages("mobilenetv3_small_100"), "neck") == {
        "conv_head.weight",
        "conv_head.bias",
    }


def test_tokens_go_with_the_stem_and_the_last_norm_with_the_last_blocks() -> None:
    stages = torchvision_stages("vit_b_16")
    assert {"class_token", "encoder.pos_embedding"} < parameters_of(stages, "conv_proj")
    assert "encoder.ln.weight" in stages[-2].parameters
    stages = timm_stages("vit_tiny_patch16_224")
    assert {"cls_token", "pos_embed"} < parameters_of(stages, "patch_embed")
    assert "norm.weight" in stages[-2].parameters


def test_a_norm_that_opens_a_module_stays_in_it() -> None:
    stages = torchvision_stages("convnext_tiny")
    assert stage_of(stages, "features.2") == "features.2-3"
    assert "features.2.0.weight" in parameters_of(stages, "features.2-3")


def test_modules_without_parameters() -> None:
    stages = torchvision_stages("vgg16")
    assert stage_of(stages, "classifier.2") == "neck"  # the dropout between fc6 and fc7
    assert stage_of(stages, "classifier.5") == "head"  # the dropout before the classifier
    assert stage_of(stages, "features.4") == "features.5-7"  # a pool goes with what it feeds
    held = {module for stage in stages for module in stage.modules}
    assert not held & {"", "features", "classifier"}
    assert {"layer2", "layer2.0", "layer2.0.relu"} <= set(torchvision_stages("resnet18")[2].modules)


def test_the_second_classifier_of_volo_is_head() -> None:
    assert {"head.weight", "aux_head.weight"} < parameters_of(timm_stages("volo_d1_224"), "head")


def test_auxiliary_heads_that_eval_does_not_use_are_in_one_stage() -> None:
    stages = torchvision_stages("googlenet", init_weights=False)
    aux = [stage.role for stage in stages for name in stage.parameters if name.startswith("aux1.")]
    assert set(aux) == {"stem"}


def test_a_parameter_that_is_never_used_and_has_no_kin_goes_with_the_stem() -> None:
    network = on_meta(timm.create_model, "test_vit")
    network.mask_token = nn.Parameter(torch.zeros(1, 1, 64, device="meta"))
    assert "mask_token" in find_stages(network, SIZE)[0].parameters


def test_a_network_without_classifier_has_no_head() -> None:
    network = on_meta(timm.create_model, "resnet18", num_classes=0)
    assert names(find_stages(network, SIZE)) == ["conv1", "layer1", "layer2", "layer3", "layer4"]


def test_the_head_may_be_told() -> None:
    network = on_meta(torchvision.models.vgg11)
    head = {"classifier.3.weight", "classifier.3.bias", "classifier.6.weight", "classifier.6.bias"}
    stages = find_stages(network, SIZE, head=head)
    assert set(stages[-1].parameters) == head
    assert parameters_of(stages, "neck") == {"classifier.0.weight", "classifier.0.bias"}


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"'fc\.wieght'.*did you mean 'fc\.weight'"):
        find_stages(on_meta(torchvision.models.resnet18), SIZE, head=["fc.wieght"])


# ------------------------------------------------------------------------------------------- strangers


class Backwards(nn.Module):
    """Registers its layers from last to first, and has a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(32, 5)
        self.c = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu_()
        x = self.c(self.b(x).relu()).relu()
        return self.classify(self.dropout(x.mean((2, 3)))) * self.scale


class Plain(nn.Sequential):
    """Perceptron of ``depth`` hidden layers."""

    def __init__(self, depth: int) -> None:
        hidden = (layer for _ in range(depth) for layer in (nn.Linear(12, 12), nn.ReLU()))
        super().__init__(nn.Flatten(), *hidden, nn.Linear(12, 2))


def test_order_is_that_of_the_forward() -> None:
    stages = find_stages(Backwards(), (3, 32, 32))
    assert names(stages) == ["a", "b", "c", "head"]
    assert parameters_of(stages, "head") == {"classify.weight", "classify.bias", "scale"}
    assert stage_of(stages, "dropout") == "head"


def test_a_perceptron_is_shared_out_by_depth() -> None:
    assert names(find_stages(Plain(9), (3, 2, 2))) == ["1", "3-5", "7-9", "11-13", "15-17", "head"]
    assert names(find_stages(Plain(1), (3, 2, 2))) == ["1", "head"]
    assert names(find_stages(Plain(0), (3, 2, 2))) == ["head"]


def test_shared_weights_are_in_the_stage_that_uses_them_first() -> None:
    network = Plain(3)
    network[5].weight = network[1].weight
    stages = find_stages(network, (3, 2, 2))
    assert sorted(name for stage in stages for name in stage.parameters) == sorted(
        name for name, _ in network.named_parameters()
    )
    assert "1.weight" in stages[0].parameters


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_by_hook_works() -> None:
    network = Plain(2)
    torch.nn.utils.weight_norm(network[1])
    assert {"1.weight_g", "1.weight_v"} < parameters_of(find_stages(network, (3, 2, 2)), "1")


# --------------------------------------------------------------------------------- nothing is touched


class Picky(Backwards):
    """A forward that fails."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("no images of this kind\nand a long explanation")


def state(network: nn.Module) -> list[object]:
    """Whatever a trace might change."""
    hooks = [
        (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            module.training,
        )
        for module in network.modules()
    ]
    weights = [(id(p), p.device, p.requires_grad, p.grad is None, p._version) for p in network.parameters()]
    return [hooks, weights]


def prepared(network: nn.Module) -> Iterator[nn.Module]:
    network.train()
    network.a.requires_grad_(False)
    network.b.eval()
    yield network


@pytest.mark.parametrize("kind", [Backwards, Picky])
def test_the_network_is_left_as_it_was(kind: type[Backwards]) -> None:
    network = next(prepared(kind()))
    seen: list[object] = []
    network.c.register_forward_hook(lambda *call: seen.append(call))
    before, weights = state(network), copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    if kind is Picky:
        with pytest.raises(UsageError):
            find_stages(network, (3, 32, 32))
    else:
        find_stages(network, (3, 32, 32))
    assert state(network) == before
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_a_forward_that_fails() -> None:
    with pytest.raises(UsageError) as refusal:
        find_stages(Picky(), (3, 32, 32))
    assert refusal.value.found == "a trial forward failed with ValueError: no images of this kind"
    assert refusal.value.asked == "the stages of Picky at input size 3x32x32"


def test_a_forward_that_ignores_the_image() -> None:
    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    with pytest.raises(UsageError, match="none of its outputs depends on the image"):
        find_stages(Constant(2, 3), (3, 8, 8))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_modes_do_not_matter(mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        assert names(find_stages(Backwards(), (3, 32, 32))) == ["a", "b", "c", "head"]


def test_real_and_meta_networks_give_the_same() -> None:
    real = find_stages(torchvision.models.resnet18(), (3, 64, 64))
    assert real == find_stages(on_meta(torchvision.models.resnet18), (3, 64, 64))
    assert real == find_stages(torchvision.models.resnet18().half(), (3, 64, 64))


# ------------------------------------------------------------------------------------------- the flow


def test_segments_end_where_every_path_passes() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inside, self.side = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            return self.side(x) + self.inside(x).relu()

    segments = trace_flow(Residual(), (3, 8, 8)).segments
    assert segments["before.weight"] == segments["before.bias"]
    assert segments["before.weight"] < segments["inside.weight"] == segments["side.weight"]


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((2, 64, 7, 7), 49),
        ((2, 7, 7, 64), 49),
        ((2, 197, 192), 197),
        ((2, 16, 49, 128), 784),  # 16 windows of 49 tokens
        ((128, 49, 96), 64 * 49),  # the same with windows in the batch axis
        ((392, 192), 196),  # tokens in the batch axis
        ((2, 512), 0),
        ((2, 512, 1, 1), 1),
        ((), 0),
    ],
)
def test_positions(shape: tuple[int, ...], grid: int) -> None:
    assert grid_of(shape, SIZE) == grid
