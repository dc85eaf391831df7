"""The ``model/`` folder: ``config.json``, ``model.safetensors`` and a model card, in timm's format.

A timm network's folder loads with plain ``timm.create_model("local-dir:PATH", pretrained=True)``. What
timm cannot build (a torchvision network, or a timm network without its fully connected layers) says so
in the root key ``finetune``, which timm ignores, and loads with :func:`pretrained.backbone.load_backbone`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from finetune import __version__
from finetune.runs.files import disk_error, sync_folder, write_bytes, write_json, write_text
from pretrained.backbone import Backbone
from pretrained.catalog import Card, find_card
from pretrained.network import build_network
from pretrained.stage_classifier import StageClassifier
from pretrained.state_dict import check_digest, read_weights


def export_model(backbone: Backbone, network: nn.Module, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write the deployable folder whole: aside first, then under its name.

    Args:
        backbone: card and architecture.
        network: the weights to hand over, on any device, in any layout.
        folder: its final name; an older folder of that name is replaced.
        metrics: for the model card.

    Raises:
        DiskError: it cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        content = safetensors.torch.save(portable_state(network), {"format": "pt"})
        write_bytes(part / "model.safetensors", content)
        digest = hashlib.sha256(content).hexdigest()
        write_json(part / "config.json", build_config(backbone.card, network, digest))
        write_text(part / "README.md", build_readme(backbone.card, metrics, backbone.match.source))
        _put_in_place(part, folder)
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, folder: Path) -> None:
    """Exchange a folder: the old one goes only when the new one stands in its place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def portable_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of contiguous tensors on the CPU, each with memory of its own."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}


def loads_in_timm(card: Card) -> bool:
    """Return whether plain timm builds the same network from its architecture alone."""
    return card.library == "timm" and card.head != "drop_fc" and not card.taps


def build_config(card: Card, network: nn.Module, sha256: str = "") -> dict[str, Any]:
    """Return ``config.json``: timm's for timm networks, the same shape for others."""
    ours = {
        "version": __version__,
        "library": card.library,
        "head": card.head,
        "dropout": card.dropout,
        "sha256": sha256,
        "taps": [list(tap) for tap in card.taps],
        "pool": card.pool,
        "temperature": card.temperature,
    }
    config = _timm_config(card, network) if card.library == "timm" else _own_config(card)
    return config | {"finetune": ours}


def _timm_config(card: Card, network: nn.Module) -> dict[str, Any]:
    labels = {"label_names": list(card.label_names)}
    network = network.network if isinstance(network, StageClassifier) else network
    arguments = dict.fromkeys(getattr(network, "left_out", ()), False)
    with TemporaryDirectory() as folder:  # timm writes its config to a file only
        path = Path(folder) / "config.json"
        save_config_for_hf(
            network,
            str(path),
            model_config=labels,
            model_args=arguments,
            data_config=card.preprocessing.to_timm(),
        )
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    inner = config["pretrained_cfg"]
    for stale in ("label_names", "label_descriptions", "license", "origin_url", "paper_ids", "paper_name"):
        inner.pop(stale, None)  # of the architecture's default weights, perhaps not of these
    inner |= _passport(card)
    return config | {"num_classes": card.num_classes}


def _own_config(card: Card) -> dict[str, Any]:
    return {
        "architecture": card.architecture,
        "num_classes": card.num_classes,
        "label_names": list(card.label_names),
        "pretrained_cfg": card.preprocessing.to_timm() | {"num_classes": card.num_classes} | _passport(card),
    }


def _passport(card: Card) -> dict[str, str]:
    origin = "paper_ids" if card.origin.lower().startswith("arxiv") else "origin_url"
    return {"tag": card.tag, "license": card.license, origin: card.origin}


def load_exported(folder: Path) -> nn.Module:
    """Build the network of an exported folder again, in eval mode, from nothing but its files."""
    card = find_card(str(folder))
    check_digest(folder / "model.safetensors", card.sha256)
    network = build_network(card)
    network.load_state_dict(read_weights(folder / "model.safetensors"))
    return network.eval()


def measure_round_trip(network: nn.Module, folder: Path, images: Tensor) -> float:
    """Return the largest difference between probabilities of a network and of its exported folder.

    Args:
        network: on the device of ``images``.
        folder: written by :func:`export_model`.
        images: (B, 3, H, W) float32, normalised.
    """
    in_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if in_channels_last else torch.contiguous_format
    reloaded = load_exported(folder).to(images.device, memory_format=layout)  # type: ignore[call-overload]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            difference = network(images).softmax(1) - reloaded(images).softmax(1)
    finally:
        for module, training in modes.items():
            module.training = training
    return float(difference.abs().max())


# --- the card for people -------------------------------------------------------------------------


def build_readme(card: Card, metrics: Mapping[str, Any], source: str) -> str:
    """Return the model card: YAML front matter as the Hugging Face hub reads it, then prose.

    Args:
        card: of the trained network.
        metrics: content of ``metrics.json``.
        source: where its weights came from; ``""`` when they started at random.
    """
    base = f"\nbase_model: {json.dumps(card.location.partition('@')[0])}" if card.place == "hub" else ""
    license_name = card.license or "unknown"
    return f"""---
tags: [image-classification, {card.library}, finetune]
pipeline_tag: image-classification
library_name: {"finetune" if card.taps else card.library}
license: {json.dumps(license_name)}{base}
metrics: [accuracy]
---
# Model card

`{card.architecture}` fine-tuned with finetune {__version__} (strategy `{metrics["strategy"]}`) for
{card.num_classes} classes: {_class_list(card)}.

## Figures

| figure | value |
|---|---|
| accuracy | {metrics["accuracy"]:.4f} |
| balanced accuracy | {metrics["balanced_accuracy"]:.4f} |
| macro F1 | {metrics["f1_macro"]:.4f} |
| images | {metrics["num_samples"]} of the `{metrics["split"]}` part |

{_split_sentence(metrics)}

## Usage

```python
{_usage(card)}
```

Input: {_input_sentence(card)}

## Source

{_source_sentence(card) if source else "Everything started from random weights."}
"""


def _source_sentence(card: Card) -> str:
    name = "another run or folder" if card.place == "folder" else f"`{card.name}`"
    terms = f"{card.license or 'unknown licence'}; {card.origin or 'no paper recorded'}"
    return f"Weights started from {name} ({terms}). Their licence applies to these weights as well."


def _class_list(card: Card) -> str:
    names = [_code(name) for name in card.label_names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more (config.json)" if len(names) > 20 else "")


def _code(text: str) -> str:
    """Text as Markdown code on one line, in which nothing is markup: HTML and backticks stay as they are."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _split_sentence(metrics: Mapping[str, Any]) -> str:
    if metrics["split_chose_checkpoint"]:
        return (
            "The same images chose the best epoch, so these figures are a little kind; "
            "a test part that chose nothing would say how kind."
        )
    return "These images chose nothing: neither weights nor the best epoch depend on them."


def _usage(card: Card) -> str:
    if not loads_in_timm(card):
        return (
            "from pretrained.backbone import load_backbone\n"
            "from pretrained.catalog import find_card\n\n"
            'card = find_card("PATH/OF/THIS/FOLDER")\n'
            'network = load_backbone(card, classes=card.label_names, head="keep").network.eval()'
        )
    return 'import timm\n\nmodel = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()'


def _input_sentence(card: Card) -> str:
    view = card.preprocessing
    return (
        f"RGB, {view.img_size} x {view.img_size} pixels (`crop_pct` {view.crop_pct:.4g}, {view.crop_mode}, "
        f"{view.interpolation}), in [0, 1], mean {view.mean}, std {view.std}."
    )
