"""Write a traced network as ONNX or ``.pt2``, with ``labels.txt`` and ``preprocessing.json`` beside it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from finetune import __version__
from finetune.evaluation.predictor import resolve_names
from finetune.exporters.deployed import Interface, cannot_export
from finetune.runs.files import write_bytes, write_json, write_text
from pretrained.catalog import Card
from pretrained.preprocessing import Preprocessing

OPSETS = (18, 23)
"""Smallest and largest opset that torch's exporter writes. It writes the smallest without a conversion, and
every onnxruntime since 1.14 reads that one, in the oldest format of the file that knows it."""
ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"
_LARGEST_PROTOBUF = 1_900_000_000
"""Most bytes of weights inside the ONNX file itself; a protobuf may have at most 2 GiB."""


def write_program(program: ExportedProgram, folder: Path) -> Path:
    """Write ``model.pt2``, which ``torch.export.load`` reads."""
    path = folder / PROGRAM_FILE
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_bytes(path, buffer.getvalue())
    return path


def write_onnx(program: ExportedProgram, folder: Path, card: Card, interface: Interface, opset: int) -> Path:
    """Write ``model.onnx`` and check it with onnx; weights over 1.9 GB go to ``model.onnx.data``.

    Raises:
        UsageError: an operation of the network cannot be expressed in ONNX, or not in this opset.
    """
    import onnx

    path = folder / ONNX_FILE
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    try:
        with _silent():
            converted = torch.onnx.export(
                program,
                input_names=[interface.input_name],
                output_names=[interface.output_name],
                dynamic_shapes={
                    interface.input_name: {0: "batch"}
                },  # otherwise the dimension would have a number for a name
                opset_version=opset,
                dynamo=True,
            )
            assert converted is not None
            converted.model.metadata_props.update(_metadata(card, interface))
            # torch writes IR 10, which onnxruntime before 1.18 refuses whatever the opset.
            standard = onnx.helper.make_opsetid("", converted.model.opset_imports[""])
            converted.model.ir_version = onnx.helper.find_min_ir_version_for([standard])
            converted.save(path, external_data=num_bytes > _LARGEST_PROTOBUF)
            onnx.checker.check_model(path, full_check=True)
    except OSError:
        raise
    except Exception as error:  # of any class: the converters have no common one
        raise cannot_export(card, f"it cannot be converted to ONNX opset {opset}", error) from None
    return path


def read_versions(path: Path) -> dict[str, int]:
    """Return the ``opset`` of ONNX's standard operators that a file needs, and the file's ``ir_version``."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    opset = max(int(opset.version) for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    return {"opset": opset, "ir_version": int(model.ir_version)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the exporter's output to stdout, which is reserved for results; its errors are kept."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write_companions(folder: Path, card: Card, interface: Interface) -> None:
    """Write ``labels.txt``, one class per line, and ``preprocessing.json``."""
    write_text(folder / "labels.txt", "".join(f"{name}\n" for name in resolve_names(card)))
    write_json(folder / "preprocessing.json", describe_input(card, interface))


def describe_input(card: Card, interface: Interface) -> dict[str, Any]:
    """Return the content of ``preprocessing.json``: steps before and in the graph, input and output."""
    view = card.preprocessing
    in_graph = interface.layout is not None
    normalise: list[dict[str, Any]] = [{"step": "normalize", "mean": list(view.mean), "std": list(view.std)}]
    if view.is_rgb:
        normalise.insert(0, {"step": "divide", "by": 255})
    if view.kind == "array":
        normalise = []
    return {
        "input": {
            "name": interface.input_name,
            "dtype": interface.input_dtype,
            "layout": (interface.layout or "nchw").upper(),
            "shape": ["batch", *interface.input_shape(view)],
            "colors": "RGB" if view.is_rgb else None,
        },
        "before_the_graph": [*describe_view(view), *([] if in_graph else normalise)],
        "in_the_graph": normalise if in_graph else [],
        "output": {
            "name": interface.output_name,
            "shape": ["batch", card.num_classes],
            "temperature": card.temperature,
            "temperature_applied": interface.is_calibrated,
        },
        "label_names": list(resolve_names(card)),
        "timm": view.to_timm(),
    }


def describe_view(view: Preprocessing) -> list[dict[str, Any]]:
    """Return the steps from a file to the network's input size, as in timm's evaluation transform."""
    if view.kind == "array":
        return [{"step": "load"}]
    height, width = (math.floor(side / view.crop_pct) for side in view.size)
    resize: dict[str, Any] = {"step": "resize", "interpolation": view.interpolation, "library": "Pillow"}
    if view.resize == "squash":
        resize |= {"height": height, "width": width}
    elif view.resize == "pad":
        resize |= {"longer_side": height} if height == width else {"fits_in": [height, width]}
    else:
        resize |= {"shorter_side": height} if height == width else {"covers": [height, width]}
    crop: dict[str, Any] = {"step": "center_crop", "height": view.size[0], "width": view.size[1]}
    if view.resize == "pad":
        crop |= {"pad_with": [round(255 * mean) if view.is_rgb else mean for mean in view.mean]}
    decode: dict[str, Any] = {"step": "decode", "colors": "RGB", "upright": True}
    if view.kind == "bands":
        decode = {"step": "decode", "channels": view.channels, "numbers": "of the file", "upright": True}
        resize |= {"library": "torchvision", "antialias": True}
    if view.value_range is not None:
        decode |= {"range_over_8_bits": list(view.value_range)}
    return [decode, resize, crop]


def _metadata(card: Card, interface: Interface) -> dict[str, str]:
    """Return the metadata of an ONNX file; every value is text."""
    return {
        "label_names": json.dumps(resolve_names(card), ensure_ascii=False),
        "preprocessing": json.dumps(describe_input(card, interface) | {"label_names": None}),
        "temperature": repr(card.temperature),
        "architecture": card.architecture,
        "license": card.license or "unknown",
        "producer": f"finetune {__version__}",
    }
