"""Load weights into a network, and report which tensors match."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import _builder as timm_builder
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from finetune.errors import UsageError, count
from pretrained.blocks import find_further_blocks, find_further_layers
from pretrained.catalog import Card
from pretrained.efficientnet_names import is_first_port, to_timm_names
from pretrained.first_convolution import adapt_first_convolution
from pretrained.network import timm_arguments, timm_name
from pretrained.prefixes import describe_names, find_prefixes, strip_prefix
from pretrained.state_dict import read_weights

MIN_MATCHED_SHARE = 0.9
"""Smallest share of the backbone's tensors that must match; otherwise the weights are of another network."""

_BATCH_COUNTER = "num_batches_tracked"
"""A buffer of BatchNorm without learned values; files from before 2018 do not have it."""
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class Match:
    """Which tensors of a network were loaded from a file.

    Attributes:
        source: the file; ``""`` for random weights.
        matched: number of backbone tensors that were loaded.
        total: number of backbone tensors: parameters and buffers, without the classifier and counters.
        missing: backbone tensors that kept their random values.
        head: tensors of the classifier.
        head_replaced: whether a new head replaces them, otherwise all are kept.
        unused: tensors of the file that the network does not have.
        prefix: what stood before the names in the file: a wrapper, a module, or both.
        notes: what the user should know about these weights, one sentence each.
    """

    source: str
    matched: int
    total: int
    missing: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_replaced: bool = False
    unused: tuple[str, ...] = ()
    prefix: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.source:
            return f"random weights: {self.total} tensors, none loaded"
        head = "replaced" if self.head_replaced else "kept"
        missing = (
            f", {len(self.missing)} missing ({_some_of(self.missing)})" if self.missing else ", 0 missing"
        )
        unused = f", {len(self.unused)} unused in the file ({_some_of(self.unused)})" if self.unused else ""
        backbone = f"{self.matched} of {self.total} tensors matched"
        classifier = f"{len(self.head)} {head} (the head: {_some_of(self.head)})"
        prefix = f", without the prefix {self.prefix[:100]!r} of their names" if self.prefix else ""
        return f"{backbone}, {classifier}{missing}{unused}{prefix}; from {self.source}"


def _some_of(names: Collection[str]) -> str:
    shown = ", ".join(name[:100] for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


def load_weights(network: nn.Module, card: Card, path: Path, head: Collection[str], load_head: bool) -> Match:
    """Load a network's backbone, and its classifier if wanted, from a file.

    The tensors may stand under a key of a training script, or behind a prefix of their names; both are left
    out where the names then match.

    Args:
        network: built from ``card``, with the classifier of the weights.
        card: names the library, whose converters for older layouts are applied.
        path: a file of :func:`pretrained.weights.find_weights`.
        head: names of the classifier's parameters.
        load_head: the classifier is kept, so its tensors must match too.

    Raises:
        UsageError: less than 90 % of the backbone's tensors match, some have another shape or are not finite,
            the file has further blocks, or the classifier to keep does not match.
    """
    tensors, own = read_weights(path), network.state_dict()
    convert = _find_converter(card)
    prefixes = find_prefixes(tensors, own, _backbone_names(own, head), MIN_MATCHED_SHARE)
    refusals: list[tuple[int, UsageError]] = []
    for prefix in prefixes:
        state, note = adapt_first_convolution(
            network, _converted(convert, network, strip_prefix(tensors, prefix))
        )
        match = _compare(own, state, head, str(path), load_head, prefix, note)
        problem = _find_problem(match, card, network, state, tensors)
        if problem is None:
            fitting = {
                key: value for key, value in _fitting(own, state).items() if load_head or key not in head
            }
            network.load_state_dict(fitting, strict=False)
            return match
        refusals.append((match.matched, problem))
    raise max(refusals, key=lambda refusal: refusal[0])[1]


def _fitting(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}


def _backbone_names(own: Mapping[str, Tensor], head: Collection[str]) -> dict[str, None]:
    in_head = set(_head_state(own, head))
    return {key: None for key in own if key not in in_head and not key.endswith(_BATCH_COUNTER)}


def _compare(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    head: Collection[str],
    source: str,
    load_head: bool,
    prefix: str,
    note: str,
) -> Match:
    backbone = _backbone_names(own, head)
    fitting = _fitting(own, state)
    return Match(
        source=source,
        matched=sum(key in fitting for key in backbone),
        total=len(backbone),
        missing=tuple(key for key in backbone if key not in fitting),
        head=tuple(key for key in own if key not in backbone and not key.endswith(_BATCH_COUNTER)),
        head_replaced=not load_head,
        unused=tuple(key for key in state if key not in own),
        prefix=prefix,
        notes=(note,) if note else (),
    )


def _head_state(own: Mapping[str, Tensor], head: Collection[str]) -> list[str]:
    """The classifier's parameters, and the buffers of its layers (LeViT has a batch norm in its head)."""
    layers = {name.rpartition(".")[0] for name in head}
    return [key for key in own if key in head or key.rpartition(".")[0] in layers]


# --- what does not fit -----------------------------------------------------------------------------


def _find_problem(
    match: Match, card: Card, network: nn.Module, state: Mapping[str, Tensor], tensors: Collection[str]
) -> UsageError | None:
    """Return why these weights cannot be used, None if they can."""
    own = network.state_dict()
    asked = f"weights {match.source} for {card.name}"
    other_shape = [key for key in match.missing if key in state]
    if match.matched + len(other_shape) < MIN_MATCHED_SHARE * match.total:
        return _too_few(asked, match, own, tensors)
    if other_shape:
        return _wrong_shapes(asked, other_shape, own, state)
    if sibling := _describe_sibling(own, match):
        fix = "They belong to another network of the same family: name that one with --backbone."
        return UsageError(asked, sibling, fix)
    fitting = _fitting(own, state)
    broken = [
        key for key, _ in network.named_parameters() if key in fitting and not fitting[key].isfinite().all()
    ]
    if broken:
        found = f"{len(broken)} of its tensors hold NaN or infinity ({_some_of(broken)})"
        return UsageError(asked, found, "Take other weights.")
    absent = [key for key in match.head if key not in fitting]
    if absent and not match.head_replaced:
        found = f"the classifier does not fit: {_some_of(absent)}"
        return UsageError(f"strategy.head=keep with {match.source}", found, "Take head=replace.")
    return None


def _describe_sibling(own: Collection[str], match: Match) -> str:
    """Return what shows that a file is of a sibling of the network; ``""`` if nothing does."""
    if blocks := find_further_blocks(own, match.unused, match.head):
        return (
            f"the file has {len(blocks)} further blocks that the network does not have ({_some_of(blocks)})"
        )
    if layers := find_further_layers(own, match.unused, match.head):
        return (
            f"the file has {len(layers)} layers inside the network's blocks that the network does not have "
            f"({_some_of(layers)})"
        )
    return ""


def _too_few(asked: str, match: Match, own: Mapping[str, Tensor], tensors: Collection[str]) -> UsageError:
    percent = math.floor(100 * match.matched / max(match.total, 1))
    found = (
        f"only {match.matched} of the backbone's {match.total} tensors match ({percent} %, under 90 %); the "
        f"file holds {len(tensors)} tensors whose names begin with {describe_names(tensors)}, and the "
        f"network's begin with {describe_names(own)}"
    )
    fix = "Name the network that these weights belong to with --backbone, or give weights of this one."
    return UsageError(asked, found, fix)


def _wrong_shapes(
    asked: str, names: Collection[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> UsageError:
    shapes = [
        f"{name[:100]} is {_shape(state[name])} in the file and {_shape(own[name])} in the network"
        for name in list(names)[:2]
    ]
    more = f", and {len(names) - 2} more" if len(names) > 2 else ""
    found = f"{len(names)} of its tensors have another shape: {'; '.join(shapes)}{more}"
    fix = "Name the network that these weights belong to with --backbone (or its image size with --img-size)."
    return UsageError(asked, found, fix)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"


def check_complete(match: Match, frozen: Collection[str], card: Card) -> None:
    """Refuse weights that lack a tensor of a stage that never learns: it would stay random.

    Args:
        match: of :func:`load_weights`.
        frozen: names of tensors and modules that are frozen.
        card: the network.

    Raises:
        UsageError: such a tensor is missing.
    """
    names = set(frozen)
    random = [key for key in match.missing if key in names or key.rpartition(".")[0] in names]
    if match.source and random:
        tensors = count(len(random), "tensor")
        found = f"the file has no {_some_of(random)}; {tensors} would stay random in frozen stages"
        fix = "Take complete weights, or train all stages with --strategy full."
        raise UsageError(f"weights {match.source} for {card.name}", found, fix)


# --- converters of the libraries -------------------------------------------------------------------


_Convert = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]


def _find_converter(card: Card) -> _Convert:
    """Return what converts names of older or original releases, and resizes position embeddings."""
    if card.taps:  # an exported run, with current names
        return lambda state, _: state
    if card.library != "timm":
        return _convert_for_torchvision
    try:
        return _find_timm_filter(card)
    except Exception:  # timm may raise anything for arguments of an untrusted config.json
        return lambda state, _: state


def _converted(convert: _Convert, network: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Convert names; if the converter fails, the check of matching names decides on the names as they are."""
    try:
        if is_first_port(state):
            state = to_timm_names(state, network)
        return convert(dict(state), network)
    except Exception:  # converters do not check their input, and may raise anything
        return state


def _find_timm_filter(card: Card) -> _Convert:
    """Return the function with which timm converts a state dict of this architecture before loading.

    timm passes it only to its internal loader. So the loader is replaced by one that keeps the function,
    while the network is built a second time on the meta device.
    """
    filters: list[_Convert] = []
    overlay = {"state_dict": {"": None}, "source": "", "custom_load": False}
    with _replaced_timm_loader(filters), torch.device("meta"):
        timm.create_model(
            timm_name(card), pretrained=True, pretrained_cfg_overlay=overlay, **timm_arguments(card)
        )
    return filters[0] if filters else lambda state, _: state


@contextmanager
def _replaced_timm_loader(filters: list[_Convert]) -> Iterator[None]:
    def take_filter(*_: object, filter_fn: _Convert | None = None, **__: object) -> None:
        if filter_fn is not None:
            filters.append(filter_fn)

    original = timm_builder.load_pretrained
    timm_builder.load_pretrained = take_filter
    try:
        yield
    finally:
        timm_builder.load_pretrained = original


def _convert_for_torchvision(state: dict[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(network, VisionTransformer):
        resized: dict[str, Tensor] = interpolate_embeddings(network.image_size, network.patch_size, state)
        return resized
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
