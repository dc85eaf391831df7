"""The matrix has the same meaning on every backbone, and the plan says what will happen."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from finetune.errors import UsageError
from finetune.recipe import load_recipe
from finetune.strategies import assign_groups
from finetune.training.freeze import build_param_groups, freeze, set_train_mode, takes_decay
from finetune.training.phase_optimizer import PhaseOptimizer
from finetune.training.plan import Plan, build_plan
from pretrained.graph.classifier import head_parameters
from pretrained.graph.stages import Stage, find_stages


def settings(name: str, **keys: object):
    return load_recipe(None, {"strategy.name": name} | {f"strategy.{k}": v for k, v in keys.items()}).strategy


def plan_of(network: nn.Module, strategy: str, rate: float = 0.01, size: int = 64, **keys: object) -> Plan:
    stages = find_stages(network, (3, size, size), head=head_parameters(network))
    return build_plan(network, stages, settings(strategy, **keys), rate, epochs=10)


def rates(plan: Plan) -> list[float]:
    return [row.lr for row in plan.rows]


def test_the_lectures_example() -> None:
    """A base rate of 0.01: 0.01 for the head, 0.001 for the top, 0.0001 below."""
    network = timm.create_model("resnet18", num_classes=2)
    assert rates(plan_of(network, "freeze")) == [0, 0, 0, 0, 0, 0.01]
    assert rates(plan_of(network, "top")) == pytest.approx([0, 0, 0, 0, 0.001, 0.01])
    assert rates(plan_of(network, "full")) == pytest.approx([0.0001, 0.0001, 0.0001, 0.0001, 0.001, 0.01])
    assert rates(plan_of(network, "scratch")) == [0.01] * 6
    assert rates(plan_of(network, "top", top_stages=3)) == pytest.approx([0, 0, 0.001, 0.001, 0.001, 0.01])


def test_the_lowest_rate_is_the_same_on_shallow_and_deep_networks() -> None:
    for name in ("resnet18", "densenet121", "vit_tiny_patch16_224", "mobilenetv3_small_100"):
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=2)
        found = rates(plan_of(network, "full", size=224))
        assert min(found) == pytest.approx(0.0001), name
        assert max(found) == 0.01, name


def test_factors_are_recipe_values() -> None:
    network = timm.create_model("resnet18", num_classes=2)
    chosen = {"head_factor": 2.0, "top_factor": 0.5, "body_factor": 0.25}
    assert rates(plan_of(network, "full", rate=1.0, **chosen)) == [0.25, 0.25, 0.25, 0.25, 0.5, 2.0]
    assert rates(plan_of(network, "scratch", rate=1.0, **chosen)) == [1.0] * 6


def test_more_top_stages_than_stages_is_refused() -> None:
    network = timm.create_model("resnet18", num_classes=2)
    assert rates(plan_of(network, "top", top_stages=5))[0] > 0
    with pytest.raises(UsageError, match="the network has 5 stages under its head"):
        plan_of(network, "top", top_stages=6)


def test_a_plan_without_anything_to_train_is_refused() -> None:
    stages = (Stage("stem", "stem", ("weight", "bias"), ()),)
    with pytest.raises(UsageError, match="no classifier to train"):
        build_plan(nn.Linear(2, 2), stages, settings("freeze"), 0.1, epochs=10)


def test_groups_count_from_the_head_and_the_neck_is_a_stage() -> None:
    stages = [
        Stage(name, role, (), ())
        for name, role in (("a", "stem"), ("b", "body"), ("neck", "neck"), ("head", "head"))
    ]
    assert assign_groups(stages, 1) == ["body", "body", "top", "head"]
    assert assign_groups(stages, 2) == ["body", "top", "top", "head"]


def test_the_plan_names_the_mode_of_norm_layers() -> None:
    resnet = plan_of(timm.create_model("resnet18", num_classes=2), "top")
    assert [row.norm for row in resnet.rows] == ["eval"] * 5 + ["none"]
    learned = plan_of(timm.create_model("resnet18", num_classes=2), "top", norm="train")
    assert [row.norm for row in learned.rows] == ["eval"] * 4 + ["train", "none"]
    random = plan_of(timm.create_model("resnet18", num_classes=2), "scratch")
    assert [row.norm for row in random.rows] == ["train"] * 5 + ["none"]
    vit = plan_of(timm.create_model("test_vit", num_classes=2), "top", size=160)
    assert {row.norm for row in vit.rows} == {"none"}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("strategy", ["freeze", "top", "full", "scratch"])
def test_every_trained_parameter_is_in_one_group_and_no_frozen_one(name: str, strategy: str) -> None:
    network = timm.create_model(name, num_classes=3)
    plan = plan_of(network, strategy, size=160)
    freeze(network, plan)
    groups = build_param_groups(network, plan, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in network.parameters() if p.requires_grad}
    assert sum(p.numel() for g in groups for p in g["params"]) == plan.num_trained
    if strategy == "freeze":
        assert {id(p) for p in network.get_classifier().parameters()} == set(grouped)


def test_biases_norms_and_tokens_take_no_decay() -> None:
    network = timm.create_model("test_vit", num_classes=3)
    plan = plan_of(network, "full", size=160)
    freeze(network, plan)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in build_param_groups(network, plan, weight_decay=0.1):
        for parameter in group["params"]:
            name = names[id(parameter)]
            free = (
                parameter.ndim <= 1
                or name in {"pos_embed", "cls_token", "reg_token"}
                or name.endswith(".bias")
            )
            assert group["weight_decay"] == (0.0 if free else 0.1), name


def test_what_takes_no_decay_can_have_another_rate() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    plan = plan_of(network, "full", size=160)
    freeze(network, plan)
    groups = build_param_groups(network, plan, weight_decay=0.1, bias_lr_factor=2.0)
    rates = {row.stage.name: row.lr for row in plan.rows}
    assert len(groups) == 2 * len(rates)
    for group in groups:
        factor = 1 if group["weight_decay"] else 2
        expected = factor * rates[group["name"].removesuffix(" (no decay)")]
        assert group["lr"] == group["base_lr"] == expected


def test_the_rate_that_is_shown_is_that_of_the_weights_of_the_head() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    plan = plan_of(network, "full", size=160)
    training = load_recipe(None, {"training.bias_lr_factor": 2.0}).training
    optimizer = PhaseOptimizer(network, plan, 0, training, torch.amp.GradScaler("cpu", enabled=False))
    assert optimizer.set_lr(0.5) == 0.5 * plan.rows[-1].lr
    weights, biases = optimizer.optimizer.param_groups[-2:]
    assert biases["lr"] == 2 * weights["lr"] == plan.rows[-1].lr


def test_frozen_modules_stay_in_eval_under_train() -> None:
    network = timm.create_model("test_resnet", num_classes=3, drop_rate=0.5, drop_path_rate=0.2)
    plan = plan_of(network, "top", size=160, norm="train")
    set_train_mode(network, plan)
    frozen = {name for row in plan.frozen for name in row.stage.modules}
    modes = {name: module.training for name, module in network.named_modules()}
    assert not any(modes[name] for name in frozen)
    assert any("bn" in name for name in frozen)
    assert all(modes[name] for row in plan.trained for name in row.stage.modules)
    assert modes[""]


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("conv.weight", (8, 3, 3, 3), True),
        ("fc.weight", (2, 8), True),
        ("conv1x1.weight", (8, 4, 1, 1), True),
        ("fc.bias", (2,), False),
        ("norm.weight", (8,), False),
        ("affine.alpha", (1, 1, 8), False),  # ResMLP
        ("layer_scale", (8, 1, 1), False),  # torchvision's ConvNeXt
        ("cls_token", (1, 1, 8), False),
        ("class_token", (1, 2, 8), False),
        ("encoder.pos_embedding", (1, 50, 8), False),  # torchvision's ViT
        ("attn.relative_position_bias_table", (169, 3), False),  # Swin
        ("logit_scale", (), False),
        ("pos_embed.token_projection.weight", (8, 16, 1, 1), False),  # XCiT exempts pos_embed.*
    ],
)
def test_only_matrices_and_kernels_decay(name: str, shape: tuple[int, ...], decays: bool) -> None:
    assert takes_decay(name, torch.zeros(shape), {"pos_embed.*"}) is decays
