"""What the certificates of residual, dense and fractal networks share: seeded networks, weights of another
implementation, and the single steps of a second forward pass that a test writes from a paper's formulas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pretrained.zoo  # noqa: F401  # registers the names

State = Mapping[str, Tensor]
CIFAR = (3, 32, 32)


def build(name: str, **arguments: object) -> nn.Module:
    """A network of the zoo with seeded weights, in training mode."""
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)


def images(count: int = 2, size: tuple[int, int, int] = CIFAR) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def pictures(name: str, count: int = 4) -> Tensor:
    """Fields of random colours, as smooth as photographs, with the size and normalisation of a card."""
    card = timm.get_pretrained_cfg(name)
    channels, *size = card.input_size
    colours = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(4))
    fields = F.interpolate(colours, size, mode="bilinear")
    mean, std = torch.tensor(card.mean), torch.tensor(card.std)
    return (fields - mean[:, None, None]) / std[:, None, None]


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(name: str, **arguments: object) -> nn.Module:
    """A network of the zoo without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def count(name: str) -> int:
    """Parameters of a network as published."""
    return num_parameters(on_meta(name))


def randomise(network: nn.Module) -> nn.Module:
    """Give every batch norm other statistics, scales and shifts than at first; return it in evaluation mode.

    At first they are 0 and 1, with which a batch norm in the wrong place is not seen.
    """
    generator = torch.Generator().manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return network.eval()


# --- another implementation ------------------------------------------------------------------------


def copy_weights(ours: nn.Module, theirs: nn.Module, name_of: Callable[[str], str]) -> None:
    """Copy every tensor of ``ours`` into ``theirs``; ``name_of`` is the written mapping of names."""
    source, target = ours.state_dict(), theirs.state_dict()
    names = {name: name_of(name) for name in source}
    assert sorted(names.values()) == sorted(target), "the mapping leaves tensors out"
    theirs.load_state_dict({names[name]: source[name].reshape(target[names[name]].shape) for name in source})
    theirs.eval()


def pytorchcv_name(name: str) -> str:
    """The name in pytorchcv of a tensor of a post-activation network of the zoo."""
    name = re.sub(r"^stem\.(conv|bn)1\.", r"features.init_block.\1.", name)
    name = re.sub(r"^stages\.(\d+)\.(\d+)\.", _unit, name)
    name = re.sub(r"\.branch\.(conv|bn)(\d)\.", r".body.conv\2.\1.", name)
    name = re.sub(r"\.shortcut\.(conv|bn)1\.", r".identity_conv.\1.", name)
    name = re.sub(r"\.se\.fc(\d)\.", r".se.conv\1.", name)
    return re.sub(r"^head\.fc\.", "output.", name)


def pytorchcv_preact_name(name: str) -> str:
    """The same for a pre-activated network, whose first batch norm of a block may stand before the branch."""
    name = re.sub(r"^stem\.conv1\.", "features.init_block.", name)
    name = re.sub(r"^last\.bn1\.", "features.post_activ.bn.", name)
    name = re.sub(r"\.before\.bn1\.", ".body.conv1.bn.", name)
    name = re.sub(r"\.shortcut\.conv1\.", ".identity_conv.", name)
    return pytorchcv_name(name)


def _unit(match: re.Match[str]) -> str:
    stage, block = match.groups()
    return f"features.stage{int(stage) + 1}.unit{int(block) + 1}."


def assert_same_output(ours: nn.Module, theirs: Callable[[Tensor], Tensor], batch: Tensor) -> None:
    """Equal logits within 1e-4 of their size."""
    with torch.no_grad():
        expected = theirs(batch)
        error = (ours(batch) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"relative difference {error:.1e}"


# --- the steps of a second forward pass ------------------------------------------------------------


def conv(state: State, name: str, features: Tensor, stride: int = 1) -> Tensor:
    """A convolution that keeps the grid at stride 1; its groups are as many as its weights ask for."""
    weight = state[f"{name}.weight"]
    groups = features.shape[1] // weight.shape[1]
    return F.conv2d(features, weight, None, stride, weight.shape[-1] // 2, groups=groups)


def norm(state: State, name: str, features: Tensor) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    columns = [tensor[:, None, None] for tensor in (mean, var, scale, shift)]
    return (features - columns[0]) / torch.sqrt(columns[1] + 1e-5) * columns[2] + columns[3]


def excite(state: State, name: str, features: Tensor) -> Tensor:
    """Squeeze-and-excitation of a block, if it has one: sigmoid(W2 relu(W1 mean)) times the features."""
    if f"{name}.se.fc1.weight" not in state:
        return features
    first, second = (
        (state[f"{name}.se.{layer}.weight"], state[f"{name}.se.{layer}.bias"]) for layer in ("fc1", "fc2")
    )
    hidden = torch.relu(features.mean((2, 3)) @ first[0].T + first[1])
    return features / (1 + torch.exp(-(hidden @ second[0].T + second[1])))[:, :, None, None]


def classify(state: State, features: Tensor) -> Tensor:
    return features.mean((2, 3)) @ state["head.fc.weight"].T + state["head.fc.bias"]


def pad_shortcut(features: Tensor, channels: int, stride: int) -> Tensor:
    """Option A, as zeros that are written into."""
    kept = features[:, :, ::stride, ::stride]
    output = torch.zeros(len(kept), channels, *kept.shape[2:])
    output[:, : kept.shape[1]] = kept
    return output


def blocks_of(state: State) -> Iterator[tuple[str, int]]:
    """Yield the name and the stride of every block, in order."""
    names = sorted(
        {tuple(map(int, m.groups())) for m in map(re.compile(r"stages\.(\d+)\.(\d+)\.").match, state) if m}
    )
    for stage, block in names:
        yield f"stages.{stage}.{block}", 2 if stage and not block else 1


# --- what holds for every network ------------------------------------------------------------------


def assert_deviation(weight: Tensor, expected: float) -> None:
    """Values of mean 0 and the expected deviation, within five standard errors of normal ones."""
    values = weight.detach().double()
    assert values.std().item() == pytest.approx(expected, rel=5 / (2 * values.numel()) ** 0.5)
    assert abs(values.mean().item()) < 5 * expected / values.numel() ** 0.5


def assert_gradient_everywhere(network: nn.Module, batch: Tensor) -> None:
    """A step in training mode gives every parameter a gradient that is not zero."""
    logits = network.train()(batch)
    F.cross_entropy(logits, torch.arange(len(batch)) % logits.shape[1]).backward()
    lost = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert lost == []


def map_sizes(network: nn.Module, size: tuple[int, int, int] = CIFAR) -> list[tuple[int, ...]]:
    """(C, H, W) behind the stem and behind every stage."""
    features = network.stem(torch.empty(1, *size, device=next(network.parameters()).device))
    sizes = [tuple(features.shape[1:])]
    for stage in network.stages:
        features = stage(features)
        sizes.append(tuple(features.shape[1:]))
    return sizes
