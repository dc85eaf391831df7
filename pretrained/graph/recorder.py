"""Features of several layers from one forward pass, which ends as soon as the last of them was reached.

A layer's tensor is pooled the moment it is there: a ReLU in place after it would overwrite it.

Shape legend: B batch, D numbers of a layer for one image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import InternalError
from pretrained.graph.flow import tensors_in
from pretrained.graph.layer import Layer
from pretrained.graph.pooling import Pool, pool_tensor


class _Reached(Exception):  # noqa: N818 - it ends a forward, and is no error
    def __init__(self, owner: FeatureRecorder) -> None:
        super().__init__()
        self.owner = owner


class FeatureRecorder:
    """Calls a network, and returns what its layers gave.

    Args:
        network: (B, 3, H, W) -> (B, K).
        layers: at least one.
        pool: of what they give.
        with_logits: go on to the end of the forward, and return the logits (B, K) as well, last.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[Layer], pool: Pool, with_logits: bool = False
    ) -> None:
        self.network, self.layers, self.pool, self.with_logits = network, tuple(layers), pool, with_logits
        self._of_module: dict[str, list[int]] = defaultdict(list)
        for place, layer in enumerate(self.layers):
            self._of_module[layer.module].append(place)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return rows (B, D) float32 of each layer.

        Raises:
            InternalError: the forward took another way than the traced one.
        """
        rows: dict[int, Tensor] = {}
        with self._attached(rows, images.shape[0]):  # len() would fix a traced batch
            try:
                logits = self.network(images)
            except _Reached as reached:
                if reached.owner is not self:  # of taps around this network, which is a StageClassifier
                    raise
            else:
                rows[len(self.layers)] = torch.cat([part.float() for part in tensors_in(logits)[:1]])
        if missing := [layer.name for place, layer in enumerate(self.layers) if place not in rows]:
            found = f"the forward ended without reaching {', '.join(missing)}"
            raise InternalError("taking features", found, "Please report this with the backbone's name.")
        return [rows[place] for place in range(len(self.layers) + self.with_logits)]

    @contextmanager
    def _attached(self, rows: dict[int, Tensor], num_images: int) -> Iterator[None]:
        calls: Counter[tuple[str, bool]] = Counter()
        with ExitStack() as stack:
            for name in self._of_module:
                module = self.network.get_submodule(name)

                def before(_: nn.Module, arguments: Any, name: str = name) -> None:
                    self._take(name, True, calls, arguments[:1], rows, num_images)

                def after(_: nn.Module, __: Any, outputs: Any, name: str = name) -> None:
                    self._take(name, False, calls, outputs, rows, num_images)

                # Before hooks of others: what they change belongs to the network as it is used now.
                stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                stack.callback(module.register_forward_hook(after, prepend=True).remove)
            yield

    def _take(
        self,
        name: str,
        at_input: bool,
        calls: Counter[tuple[str, bool]],
        item: Any,
        rows: dict[int, Tensor],
        num_images: int,
    ) -> None:
        number = calls[name, at_input]
        calls[name, at_input] += 1
        for place in self._of_module[name]:
            layer = self.layers[place]
            if (layer.number, layer.at_input) == (number, at_input):
                rows[place] = self._pool(layer, item, num_images)
        if len(rows) == len(self.layers) and not self.with_logits:
            raise _Reached(self)

    def _pool(self, layer: Layer, item: Any, num_images: int) -> Tensor:
        tensors = [tensor for tensor in tensors_in(item) if tensor.is_floating_point()]
        pool = layer.pool_of(self.pool)
        pooled = [
            pool_tensor(tensor, form, pool, num_images)
            for tensor, form in zip(tensors, layer.forms, strict=True)
        ]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
