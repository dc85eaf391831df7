"""The head is trained on standardised features, so that one base lr suits every backbone.

Backbones differ in the scale of their pooled features: SqueezeNet's have a norm of 360 on photographs, and an
lr of 0.01 made the training loss jump to 49. So mean and deviation of each feature are measured once on
training images before training (data-dependent initialisation, compare arXiv:1511.06856), the classifier
learns on ``(x - mean) / std``, and at the end both are folded into its weights. The evaluated and exported
network is a plain linear layer on unscaled features that computes the same function. The tests train with one
lr on features scaled by 0.01, 1 and 300.

Shape legend: B batch, C features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.feed import BatchLoader
from finetune.system.device import Precision, seed_everything
from finetune.system.display import Advance
from finetune.system.forward import ChunkedForward, autocast
from finetune.training.step import has_enough_images, learns_batch_statistics, takes_single_images
from pretrained.graph.classifier import classifier_layers
from pretrained.graph.recorder import observe_calls

NUM_MEASURED = 256
"""Images measured; they give a deviation to about 5 %."""
SMALLEST_STD = 0.1
"""Smallest deviation, as a share of the mean one, so that constant features are not amplified."""

MOST_FEATURES = 512
"""Features of deviation 1; more are made shorter, so that together they have the squared length of so many.
A step of gradient descent grows with that length, and with the 1,280 features of EfficientNet-Lite0 an lr of
0.01 was at the edge of divergence: 2 (1 + momentum) / lr is 380, a logistic loss's curvature up to 320."""


class Standardize:
    """A forward pre-hook: (x - mean) / std over the features of a classifier's input.

    Attributes:
        mean: (C,) float32.
        std: (C,) float32, positive.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Standardise (B, C) or (B, C, 1, 1)."""
        features = inputs[0]
        shape = (1, -1, *[1] * (features.ndim - 2))
        # In float32 under autocast too: if the mean is ten deviations, float16 loses too much.
        return ((features.float() - self.mean.view(shape)) / self.std.view(shape),)


def measure_features(
    network: nn.Module,
    loader: BatchLoader,
    precision: Precision,
    seed: int,
    advance: Advance,
    forward: Callable[[Tensor], Tensor] | None = None,
    microbatch: int = 0,
) -> dict[str, Tensor]:
    """Return mean and std of the input of each classifier layer, over at most 256 training images.

    The network runs in its current modes, which should be those of training, since a BatchNorm in train
    mode gives other features than one in eval mode. Its buffers are restored.

    Args:
        network: network with the classifier layers.
        loader: training batches.
        precision: precision of the forward pass.
        seed: seed of dropout.
        advance: called with the number of images of each batch.
        forward: function from a batch to logits; by default the network.
        microbatch: images in one forward pass; 0 is the whole batch.

    Returns:
        ``{"<layer>.mean": (C,), "<layer>.std": (C,)}``, on the network's device.
    """
    names = {layer: name for name, layer in network.named_modules()}
    # A mean cannot be folded into a layer without bias (torchvision's own MaxViT classifier).
    layers = {names[layer]: layer for layer in classifier_layers(network) if layer.bias is not None}
    device, forward = loader.placement.device, forward or network
    chunked: ChunkedForward | None = None
    with (
        _kept_buffers(network),
        _recorded_inputs(layers) as inputs,
        torch.no_grad(),
        autocast(device, precision),
    ):
        batches = loader.batches(stop=math.ceil(NUM_MEASURED / loader.batch_size), whole=True)
        for number, batch in enumerate(batches):
            if chunked is None:
                least = _find_smallest_chunk(network, forward, batch.images[:1], microbatch)
                chunked = ChunkedForward(forward, microbatch, least)
                for rows in inputs.values():
                    rows.clear()  # those of the trial
            # For dropout; decoding in this process draws random views between the passes.
            seed_everything(seed, "measure", number)
            if has_enough_images(network, len(batch.labels), bool(batch.lost)):
                chunked(batch.images)
            advance(len(batch.labels), "")
    moments = {}
    for name, features in inputs.items():
        stacked = torch.cat(features)
        std = stacked.std(dim=0, correction=0)
        moments[f"{name}.mean"] = stacked.mean(dim=0)
        std = std.clamp_min(max(SMALLEST_STD * std.mean().item(), 1e-12))
        moments[f"{name}.std"] = std * max(1.0, len(std) / MOST_FEATURES) ** 0.5
    return moments


def _find_smallest_chunk(
    network: nn.Module, forward: Callable[[Tensor], Tensor], image: Tensor, microbatch: int
) -> int:
    """Return the smallest part of a batch that the network takes: a rest of one image may be too small."""
    if not microbatch or not len(image) or not learns_batch_statistics(network):
        return 1
    return 1 if takes_single_images(forward, image) else 2


@contextmanager
def _kept_buffers(network: nn.Module) -> Iterator[None]:
    """Restore every buffer after the block."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])


@contextmanager
def _recorded_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, arguments: tuple[Any, ...]) -> None:
        inputs[name].append(arguments[0].detach().float().flatten(1))

    with observe_calls(layers, before=record):
        yield inputs


def are_moments(network: nn.Module, moments: Mapping[str, Tensor]) -> bool:
    """Return whether tensors can be a result of :func:`measure_features` for a network."""
    layers = dict(network.named_modules())
    for key, tensor in moments.items():
        name, _, what = key.rpartition(".")
        layer = layers.get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.bias is None:
            return False
        is_whole = f"{name}.mean" in moments and f"{name}.std" in moments
        shape = layer.weight.flatten(1).shape[1:]
        if not is_whole or tensor.shape != shape or tensor.dtype != torch.float32:
            return False
        if not tensor.isfinite().all() or (what == "std" and tensor.min() <= 0):
            return False
    return True


def attach(network: nn.Module, moments: Mapping[str, Tensor], keep: bool = False) -> None:
    """Standardise the input of the classifier layers from now on.

    Args:
        network: network with the layers.
        moments: result of :func:`measure_features`.
        keep: adjust the layers' weights so that they compute the same function as before.
    """
    for name in {key.rpartition(".")[0] for key in moments}:
        layer = network.get_submodule(name)
        hook = Standardize(moments[f"{name}.mean"], moments[f"{name}.std"])
        if keep:
            _unfold_from(layer, hook)
        layer.register_forward_pre_hook(hook)


@torch.no_grad()
def _unfold_from(layer: nn.Module, hook: Standardize) -> None:
    """Wx + b = (W std)((x - mean)/std) + (b + W mean): the inverse of :func:`_fold_into`."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    assert layer.bias is not None
    weight = layer.weight.double().flatten(1)
    layer.bias.copy_(layer.bias.double() + weight @ hook.mean.double())
    layer.weight.copy_((weight * hook.std.double()).view_as(layer.weight))


def fold(network: nn.Module) -> None:
    """Fold standardisation into the weights; the network computes the same function without the hooks."""
    for layer in network.modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, Standardize):
                del layer._forward_pre_hooks[key]
                _fold_into(layer, hook)


@torch.no_grad()
def _fold_into(layer: nn.Module, hook: Standardize) -> None:
    """W(x - mean)/std + b = (W/std)x + (b - (W/std)mean), computed in float64."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weight = layer.weight.double().flatten(1) / hook.std.double()
    shift = weight @ hook.mean.double()
    layer.weight.copy_(weight.view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(layer.bias.double() - shift)
