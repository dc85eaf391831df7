"""What the certificates of the large networks of 2012 to 2015 share: they are built without memory for the
weights of layers that a test does not run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def shapes(network: nn.Module, size: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shape (C, H, W) or (D,) of what every module gives, by name, from a pass without numbers."""
    found: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in network.named_modules()}

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.setdefault(names[module], tuple(output.shape[1:]))

    handles = [module.register_forward_hook(note) for module in names]
    network.eval()(torch.zeros(1, *size, device="meta"))
    for handle in handles:
        handle.remove()
    return found


def fill(modules: Iterable[nn.Module], gain: float = 1.0) -> None:
    """Give modules of an outline memory and seeded weights, of about the size that keeps values alive."""
    generator = torch.Generator().manual_seed(3)
    for module in modules:
        module.to_empty(device="cpu")
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                tensor.zero_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() > 1:
                tensor.normal_(0, gain * (2 / tensor[0].numel()) ** 0.5, generator=generator)
            else:
                tensor.uniform_(0.1, 0.9, generator=generator)


def reaches_every_parameter(network: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether the loss of a network without numbers depends on every parameter."""
    network.train()(torch.zeros(2, *size, device="meta")).sum().backward()
    return all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def normalise(x: Tensor, k: float, alpha: float, beta: float = 0.75, size: int = 5) -> Tensor:
    """The formula of section 3.3 of AlexNet's paper, map by map: alpha is not divided by the size."""
    maps, half = x.shape[1], size // 2
    sums = [
        x[:, max(0, place - half) : min(maps, place + half + 1)].square().sum(dim=1) for place in range(maps)
    ]
    return x / (k + alpha * torch.stack(sums, dim=1)) ** beta


def close(one: Tensor, other: Tensor) -> bool:
    """Equal within 1e-4 of the largest value."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())
