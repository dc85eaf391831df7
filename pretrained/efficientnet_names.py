"""Names of EfficientNet's tensors: those of its first port to PyTorch, and timm's.

Many weights were published with the names of that port (``efficientnet_pytorch``, arXiv:1905.11946). It
numbers all blocks in a row, and timm stage by stage. A block with an expansion has three convolutions, one
without has two, and timm counts the norms of both from 1::

    _conv_stem, _bn0, _conv_head, _bn1, _fc        conv_stem, bn1, conv_head, bn2, classifier
    _blocks.3._expand_conv, _bn0                   blocks.2.0.conv_pw, bn1
    _blocks.3._depthwise_conv, _bn1                blocks.2.0.conv_dw, bn2    (conv_dw, bn1 without expansion)
    _blocks.3._se_reduce, _se_expand               blocks.2.0.se.conv_reduce, se.conv_expand
    _blocks.3._project_conv, _bn2                  blocks.2.0.conv_pwl, bn3   (conv_pw, bn2 without expansion)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_OUTER = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDED = _SQUEEZE | {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_PLAIN = _SQUEEZE | {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def is_first_port(names: Mapping[str, object]) -> bool:
    """Return whether the names of a state dict are those of the first port."""
    return "_conv_stem.weight" in names and "_blocks.0._depthwise_conv.weight" in names


def to_timm_names(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of the first port with timm's names; names without a rule stay as they are.

    Args:
        state: its tensors.
        network: timm's network, whose ``blocks`` are stages of blocks.
    """
    stages = list(network.get_submodule("blocks").children())
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(list(stage.children())))]
    return {_rename(name, state, places): tensor for name, tensor in state.items()}


def _rename(name: str, state: Mapping[str, Tensor], places: list[str]) -> str:
    parts = name.split(".")
    if parts[0] != "_blocks":
        return ".".join([_OUTER.get(parts[0], parts[0]), *parts[1:]])
    if len(parts) < 4 or not parts[1].isdecimal() or int(parts[1]) >= len(places):
        return name
    layers = _EXPANDED if f"_blocks.{parts[1]}._expand_conv.weight" in state else _PLAIN
    return ".".join([places[int(parts[1])], layers.get(parts[2], parts[2]), *parts[3:]])
