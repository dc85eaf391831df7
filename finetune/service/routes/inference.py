"""``/v2``: the Open Inference Protocol, so that clients of other servers work here.

A model has one input, ``images``: UINT8 pixels (B, H, W, 3), or BYTES (B,), the content of files. It has
two outputs: ``probabilities`` FP32 (B, K), calibrated (or the number, K = 1), and ``labels`` BYTES (B,).
Tensors come as JSON, or as binary data behind it (the extension of Triton's clients).
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request, Response
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from finetune import __version__
from finetune.service.context import Context
from finetune.service.predictions.serving import Picture
from finetune.service.problems import RefusedError

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
INPUT, PROBABILITIES, LABELS = "images", "probabilities", "labels"
MOST_IMAGES = 64
_CHANNELS = 3
_SIZE = struct.Struct("<I")
"""Length of a text in the binary data of a BYTES tensor."""


@router.get("/health/live", summary="Whether the server lives")
def live() -> dict[str, bool]:
    """Return 200 as long as the process answers."""
    return {"live": True}


@router.get("/health/ready", summary="Whether the server is ready")
def ready(request: Request) -> dict[str, bool]:
    """Return 200 if the store answers."""
    Context.of(request).models.list_all()
    return {"ready": True}


@router.get("", summary="The server")
def server() -> dict[str, Any]:
    """Return name, version and extensions of the server."""
    return {"name": "finetune", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/models/{name}", summary="A model")
async def describe(request: Request, name: str) -> dict[str, Any]:
    """Return inputs and outputs of a model."""
    model, host = await run_in_threadpool(Context.of(request).hosts.find, name)
    number = len(host.facts["classes"])
    outputs = [
        {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, number]},
        {"name": LABELS, "datatype": "BYTES", "shape": [-1]},
    ]
    inputs = [{"name": INPUT, "datatype": "UINT8", "shape": [-1, -1, -1, _CHANNELS]}]
    return {
        "name": name,
        "versions": [str(model.version)],
        "platform": "finetune",
        "inputs": inputs,
        "outputs": outputs,
    }


@router.get("/models/{name}/ready", summary="Whether a model is ready")
async def model_ready(request: Request, name: str) -> dict[str, Any]:
    """Return 200 once the model is loaded."""
    await run_in_threadpool(Context.of(request).hosts.find, name)
    return {"name": name, "ready": True}


@router.post("/models/{name}/infer", summary="Infer", response_model=None)
async def infer(
    request: Request,
    name: str,
    inference_header_content_length: Annotated[int | None, Header(ge=2)] = None,
) -> Response:
    """Return probabilities and labels for a batch of images."""
    context = Context.of(request)
    body = await context.read_body(request, context.settings.limits.images_bytes)
    header, binary = _split(body, inference_header_content_length)
    pictures = _read_input(header, binary)
    model, _, waiting = await run_in_threadpool(context.hosts.submit, name, pictures)
    answers = await asyncio.gather(*map(asyncio.wrap_future, waiting))
    for index, answer in enumerate(answers):
        if "fault" in answer:
            found = f"image {index} cannot be read: {answer['fault']}"
            raise _refuse(found, "Leave it out or repair it.")
    values = np.array([answer["probabilities"] for answer in answers], np.float32)
    labels = [answer["label"].encode() for answer in answers]
    facts = {"model_name": name, "model_version": str(model.version)}
    facts |= {"id": header["id"]} if isinstance(header.get("id"), str) else {}
    return _write_outputs(facts, header, values, labels)


def _refuse(found: str, fix: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, "infer", found, fix)


def _split(body: bytes, length: int | None) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of a request, and the binary data behind it."""
    try:
        header = json.loads(body[:length])
    except (ValueError, RecursionError):
        raise _refuse("the body is no JSON", "See the Open Inference Protocol.") from None
    if not isinstance(header, dict):
        raise _refuse("the body is no JSON object", "See the Open Inference Protocol.")
    return header, body[length:] if length is not None else b""


def _read_input(header: dict[str, Any], binary: bytes) -> list[Picture]:
    inputs = header.get("inputs")
    named = [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []
    if len(named) != 1 or named[0].get("name") != INPUT:
        raise _refuse(f"it needs one input, and it must be called {INPUT}", f"Send one tensor, {INPUT}.")
    tensor = named[0]
    shape, parameters = tensor.get("shape"), tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
        raise _refuse("the shape of the input is no list of lengths", "Send (B, H, W, 3), or (B,) of BYTES.")
    if size is not None and size != len(binary):
        raise _refuse(f"{len(binary)} bytes follow, and not {size}", "Correct binary_data_size.")
    if not 0 < shape[0] <= MOST_IMAGES:
        raise _refuse(f"the batch has {shape[0]} images", f"Send 1 to {MOST_IMAGES}.")
    data = tensor.get("data")
    if tensor.get("datatype") == "BYTES" and len(shape) == 1:
        contents = list(_read_texts(binary)) if size is not None else _decode_texts(data)
        if len(contents) != shape[0]:
            raise _refuse(f"{len(contents)} texts came, and not {shape[0]}", "Correct the shape.")
        return [Picture(content) for content in contents]
    if tensor.get("datatype") == "UINT8" and len(shape) == 4 and shape[3] == _CHANNELS:
        content = binary if size is not None else _read_numbers(data)
        each = shape[1] * shape[2] * _CHANNELS
        if len(content) != shape[0] * each:
            raise _refuse(f"{len(content)} values came, and not {shape[0] * each}", "Correct the shape.")
        places = range(0, len(content), each)
        return [Picture(content[start : start + each], (shape[1], shape[2])) for start in places]
    raise _refuse("the input has another type or shape", "Send UINT8 (B, H, W, 3), or BYTES (B,).")


def _read_texts(binary: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(binary):
        if place + _SIZE.size > len(binary):
            raise _refuse("the binary data end in the middle of a length", "Send all of it.")
        (size,) = _SIZE.unpack_from(binary, place)
        place += _SIZE.size + size
        if place > len(binary):
            raise _refuse("the binary data end in the middle of a text", "Send all of it.")
        yield binary[place - size : place]


def _decode_texts(data: Any) -> list[bytes]:
    """Return the files of a JSON tensor, which holds them as base64: JSON has no bytes."""
    try:
        return [base64.b64decode(text, validate=True) for text in data]
    except (TypeError, ValueError):
        raise _refuse("a text of the input is no base64", "Encode the files, or send binary data.") from None


def _read_numbers(data: Any) -> bytes:
    try:
        values = np.array(data)
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
            raise ValueError
    except (ValueError, TypeError):
        raise _refuse("the data are no whole numbers from 0 to 255", "Send RGB pixels.") from None
    return values.astype(np.uint8).tobytes()


def _write_outputs(
    facts: dict[str, Any], header: dict[str, Any], values: NDArray[np.float32], labels: Sequence[bytes]
) -> Response:
    """Return the outputs that were asked for, both without a word, as JSON or as binary data."""
    wanted = header.get("outputs")
    asked = [one for one in wanted if isinstance(one, dict)] if isinstance(wanted, list) else []
    asked = asked or [{"name": PROBABILITIES}, {"name": LABELS}]
    parameters = header.get("parameters")
    all_binary = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    outputs, blocks = [], []
    for one in asked:
        name, own = one.get("name"), one.get("parameters")
        if name not in (PROBABILITIES, LABELS):
            raise _refuse(f"there is no output {str(name)[:64]}", f"Take {PROBABILITIES} or {LABELS}.")
        is_binary = own.get("binary_data", all_binary) if isinstance(own, dict) else all_binary
        described, block = _write_output(name, values, labels, bool(is_binary))
        outputs.append(described)
        blocks += [block] if is_binary else []
    text = json.dumps(facts | {"outputs": outputs}).encode()
    if not blocks:
        return Response(text, media_type="application/json")
    length = {"Inference-Header-Content-Length": str(len(text))}
    return Response(b"".join([text, *blocks]), media_type="application/octet-stream", headers=length)


def _write_output(
    name: str, values: NDArray[np.float32], labels: Sequence[bytes], is_binary: bool
) -> tuple[dict[str, Any], bytes]:
    if name == PROBABILITIES:
        facts: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        block, data = values.astype("<f4").tobytes(), list[Any](values.reshape(-1).tolist())
    else:
        facts = {"name": name, "datatype": "BYTES", "shape": [len(labels)]}
        block = b"".join(_SIZE.pack(len(label)) + label for label in labels)
        data = [label.decode() for label in labels]
    if is_binary:
        return facts | {"parameters": {"binary_data_size": len(block)}}, block
    return facts | {"data": data}, b""
