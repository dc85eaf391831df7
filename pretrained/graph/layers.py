"""The layers of a network by name: stages, modules, and the input of the classifier.

The features of a *stage* are the last tensor that belongs to it: after activation and pooling, and before any
operation of the next stage. On AlexNet these are the layers 1 to 7 of Zeiler and Fergus' table
(arXiv:1311.2901). The features of a *module* are the output of its last call.

::

    all          every stage except the head, and pre_logits if it differs from the last stage
    last         the last stage before the head
    pre_logits   the input of the classifier
    layer4.1     a module, by its name in network.named_modules(); a stage of that name takes precedence
    blocks.*     a pattern over module names; a star matches no dot
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import UsageError, suggest
from pretrained.graph.classifier import classifier_layers
from pretrained.graph.cuts import Call, Cut, find_cuts, trace_calls
from pretrained.graph.pooling import Form, Pool, check_pool, find_form, pool_tensor
from pretrained.graph.recorder import FeaturePoint, FeatureRecorder
from pretrained.graph.stages import Stage
from pretrained.graph.structures import Structure, shapes_in, tensors_in

WORDS = ("all", "last", "pre_logits")
_NO_HEAD = Stage("head", "head", (), ())


@dataclass(frozen=True)
class Layer:
    """A point of a network whose features can be taken, and how to read them.

    Attributes:
        name: in options and tables.
        point: where it is in a forward pass.
        forms: axes of its tensors; there are several in networks with parallel branches.
        share: share of the network's floating-point operations up to this point, in [0, 1].
        has_token: whether the network's classifier reads a class token, which ``auto`` then takes.
    """

    name: str
    point: FeaturePoint
    forms: tuple[Form, ...]
    share: float
    has_token: bool

    def pool_of(self, pool: Pool) -> Pool:
        """Return the pool that ``auto`` stands for at this layer."""
        if pool != "auto":
            return pool
        return "token" if self.has_token and all(form.prefix for form in self.forms) else "avg"

    def num_features(self, pool: Pool) -> int:
        """Return the number of features of one image, D."""
        return sum(form.num_features(self.pool_of(pool)) for form in self.forms)

    def pooled(self, value: Any, pool: Pool, num_images: int) -> Tensor:
        """Return rows (B, D) float32 of the value that was recorded at its point.

        Args:
            value: one tensor, or a nested structure of tensors.
            pool: how a map becomes a row.
            num_images: B.
        """
        tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
        rows = [
            pool_tensor(tensor, form, self.pool_of(pool), num_images)
            for tensor, form in zip(tensors, self.forms, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    @property
    def size(self) -> str:
        """The shape of one image's features for display: ``512x7x7``, ``197x192``, ``512``."""
        return " + ".join(_describe(form) for form in self.forms)


def _describe(form: Form) -> str:
    if form.order == "vector" or form.size is None:
        return str(form.width)
    if form.order == "tokens":
        return f"{form.num_positions + form.prefix}x{form.width}"
    return f"{form.width}x{form.size[0]}x{form.size[1]}"


class FeatureExtractor:
    """The pooled features of several layers from one forward pass.

    A tensor is pooled as soon as it is computed, so that only rows are kept in memory.

    Args:
        network: (B, 3, H, W) -> (B, K).
        layers: at least one, unless only the logits are wanted.
        pool: how a map becomes a row.
        with_logits: run the complete forward pass, and return the logits (B, K) as well, last. Otherwise the
            pass ends at the last of the layers.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[Layer], pool: Pool, with_logits: bool = False
    ) -> None:
        self.network, self.layers, self.pool, self.with_logits = network, tuple(layers), pool, with_logits

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return rows (B, D) float32 of each layer.

        Raises:
            PointNotReachedError: the forward pass does not reach every layer.
        """
        num_images = images.shape[0]  # len() would fix the batch size of a traced network
        points = [layer.point for layer in self.layers]
        pools = [partial(layer.pooled, pool=self.pool, num_images=num_images) for layer in self.layers]
        recorder = FeatureRecorder(self.network, points, pools)
        if not self.with_logits:
            return recorder.record(images)
        rows, output = recorder.record_all(images)
        return [*rows, tensors_in(output)[0].float()]


class Layers:
    """Every layer of a network, by name.

    Args:
        network: in eval mode; it does not change.
        stages: stages of the network, from stem to head.
        input_size: (C, H, W) of the images.

    Attributes:
        stages: one layer for each stage except the head, from the stem on.
        pre_logits: the input of the classifier; None for a network without one.

    Raises:
        UsageError: a forward pass fails at that size.
    """

    def __init__(self, network: nn.Module, stages: Sequence[Stage], input_size: tuple[int, int, int]) -> None:
        self._network, self._input_size = network, input_size
        self._trace = trace_calls(network, input_size)
        self._prefix, self._has_token = count_prefix_tokens(network), reads_token(network)
        below = [stage for stage in stages if stage.role != "head"]
        self._head = next((stage for stage in stages if stage.role == "head"), _NO_HEAD)
        found = (self._find_stage(stage, stages) for stage in below)
        self.stages = tuple(layer for layer in found if layer is not None)
        self.pre_logits = self._find_pre_logits()

    @property
    def last(self) -> Layer:
        """The last stage before the head."""
        return self.stages[-1]

    @cached_property
    def all(self) -> tuple[Layer, ...]:
        """The stages, and ``pre_logits`` if the classifier does not read the pooled last stage.

        It differs in few networks: torchvision's DenseNet applies a ReLU that is no module, and CrossViT has
        two classifiers.
        """
        extra = self.pre_logits
        if extra is None:
            return self.stages
        is_same_size = extra.num_features("auto") == self.last.num_features("auto")
        if is_same_size and self._are_alike(self.last, extra):
            return self.stages
        return (*self.stages, extra)

    @torch.no_grad()
    def _are_alike(self, one: Layer, other: Layer) -> bool:
        """Whether two layers have the same features for a random image."""
        weight = next(self._network.parameters())
        if weight.is_meta:
            return True
        noise = torch.randn(2, *self._input_size, generator=torch.Generator().manual_seed(0))
        extract = FeatureExtractor(self._network, [one, other], "auto")
        first, second = extract(noise.to(weight.device, weight.dtype))
        return torch.allclose(first, second, rtol=1e-3, atol=1e-4 * second.abs().max().item())

    def reads_head(self, layer: Layer) -> bool:
        """Return whether a layer's features depend on the classifier's own weights."""
        owners = {name.rpartition(".")[0] for name in self._head.parameters}
        calls = {(call.name, call.number): call for call in self._trace.calls}
        began = min((call.began for call in calls.values() if call.name in owners), default=None)
        call = calls[layer.point.module, layer.point.number]
        return began is not None and (call.began if layer.point.at_input else call.ended) > began

    def modules(self) -> dict[str, Layer]:
        """Return a layer for each module whose output has rows per image, in the order of execution."""
        calls: dict[str, Layer] = {}
        for call in sorted(self._trace.calls, key=lambda call: call.ended):
            if call.name and (layer := self._layer_of(call.name, call, False, call.outputs)):
                calls.pop(call.name, None)  # a later call replaces an earlier one, also in the order
                calls[call.name] = layer
        return calls

    def at(self, point: FeaturePoint) -> Layer:
        """Return the layer at a point.

        Raises:
            UsageError: the network has no features at that point.
        """
        for call in self._trace.calls:
            if (call.name, call.number) == (point.module, point.number):
                carries = call.argument if point.at_input else call.outputs
                if layer := self._layer_of(point.module, call, point.at_input, carries):
                    return layer
        found = f"{type(self._network).__name__} has no features there"
        raise UsageError(f"features of {point.module!r}", found, "Export the run again.")

    # --- by name ---------------------------------------------------------------------------------

    def select(self, wanted: Sequence[str], pool: Pool = "auto") -> tuple[Layer, ...]:
        """Return layers by names, keywords and patterns, each once, in the order of ``wanted``.

        Raises:
            UsageError: there is no such layer, it has no rows per image, or the pool does not fit.
        """
        modules = self.modules()
        chosen: dict[str, Layer] = {}
        if not wanted:
            raise UsageError("--layers", "no layer was named", "Name one, or take all.")
        for name in wanted:
            for layer in self._find(name, modules):
                if chosen.setdefault(layer.name, layer) != layer:
                    found = f"{layer.name!r} is a stage here and a module there, which give other features"
                    raise UsageError(f"--layers {name}", found, "Ask for the two one after the other.")
        for layer in chosen.values():
            for form in layer.forms:
                check_pool(layer.name, form, layer.pool_of(pool))
        return tuple(chosen.values())

    def _find(self, name: str, modules: Mapping[str, Layer]) -> Sequence[Layer]:
        stages = {layer.name: layer for layer in self.stages}
        if name == "all":
            return self.all
        if name == "last":
            return self.stages[-1:]
        if name == "pre_logits" and self.pre_logits is not None:
            return [self.pre_logits]
        if name in stages or name in modules:
            return [stages.get(name) or modules[name]]
        matching = [layer for other, layer in modules.items() if _matches(other, name)]
        if not matching:
            raise self._refuse(name, [*WORDS, *stages, *modules])
        return matching

    def _refuse(self, name: str, known: Sequence[str]) -> UsageError:
        fix = "`--layers list` shows stages and modules."
        if name == "pre_logits":
            return UsageError("--layers pre_logits", "the network has no classifier", "Take --layers last.")
        if name and name in dict(self._network.named_modules()):
            called = any(call.name == name for call in self._trace.calls)
            found = "it gives no tensor with a row for each image" if called else "the forward never calls it"
            return UsageError(f"--layers {name}", found, f"Take a layer around it; {fix}")
        found = f"there is no stage and no module of that name{suggest(name, known)}"
        return UsageError(f"--layers {name}", found, fix)

    # --- finding ---------------------------------------------------------------------------------

    def _find_stage(self, stage: Stage, stages: Sequence[Stage]) -> Layer | None:
        """The last tensor of a stage that is on every path, else the output of its last module."""
        place = stages.index(stage)
        later = [name for other in stages[place + 1 :] for name in other.parameters]
        before = [name for other in stages[place:] for name in other.parameters]
        cuts = find_cuts(self._trace, later)
        floor = max((cut.depth for cut in find_cuts(self._trace, before)), default=0)
        # Only the deepest cuts: an earlier one of several tensors is, for example, a residual and its branch.
        cuts = [cut for cut in cuts if cut.depth == cuts[0].depth > floor]
        layers = [(cut, self._layer_at(stage.name, cut)) for cut in cuts]
        usable = [(cut, layer) for cut, layer in layers if layer is not None]
        if not usable:
            return self._last_module(stage)
        return max(usable, key=lambda pair: (*_preference(pair[1]), pair[0].time))[1]

    def _layer_at(self, name: str, cut: Cut) -> Layer | None:
        return self._layer_of(name, cut.call, cut.at_input, cut.carries)

    def _last_module(self, stage: Stage) -> Layer | None:
        calls = [call for call in self._trace.calls if call.name in stage.modules]
        for call in sorted(calls, key=lambda call: -call.ended):
            if layer := self._layer_of(stage.name, call, False, call.outputs):
                return layer
        return None

    def _find_pre_logits(self) -> Layer | None:
        names = {module: name for name, module in self._network.named_modules()}
        wanted = {names[layer] for layer in classifier_layers(self._network)}
        for call in self._trace.calls:
            if call.name in wanted and call.argument is not None:
                return self._layer_of("pre_logits", call, True, call.argument)
        return None

    def _layer_of(self, name: str, call: Call, at_input: bool, carries: Structure) -> Layer | None:
        shapes = [shape for shape in shapes_in(carries) if shape.dtype.is_floating_point]
        if not shapes or not all(shape.is_per_image for shape in shapes):
            return None
        forms = [find_form(shape.of(1), self._input_size, self._prefix) for shape in shapes]
        known = tuple(form for form in forms if form is not None)
        if len(known) < len(forms):
            return None
        share = call.flops[0 if at_input else 1] / max(self._trace.flops, 1)
        point = FeaturePoint(call.name, call.number, at_input)
        return Layer(name, point, known, share, self._has_token)


def _preference(layer: Layer) -> tuple[bool, bool, bool]:
    """Sort key: prefer one tensor to several, a map to a pooled one, and the output of a module to an input.

    The input of the next stage may be reshaped already (Swin merges patches before its first weight).
    """
    is_map = all(form.num_positions > 1 for form in layer.forms)
    return len(layer.forms) == 1, is_map, not layer.point.at_input


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def count_prefix_tokens(network: nn.Module) -> int:
    """Return the number of class and register tokens before the tokens of the image."""
    declared = getattr(network, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    return int(isinstance(getattr(network, "class_token", None), nn.Parameter))  # torchvision's ViT


def reads_token(network: nn.Module) -> bool:
    """Return whether the network's own classifier reads a class token."""
    if isinstance(getattr(network, "class_token", None), nn.Parameter):
        return True
    return count_prefix_tokens(network) > 0 and getattr(network, "global_pool", "") in ("token", "")
