"""``/v1/models``: promote the model of a job, and predict with it."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from finetune.service.context import Context
from finetune.service.predictions.serving import Picture
from finetune.service.problems import RefusedError
from finetune.service.store.models import ModelVersion
from finetune.targets import rank_classes

router = APIRouter(prefix="/v1/models", tags=["models"])
MOST_IMAGES = 64
"""Images of a request."""


def _describe(model: ModelVersion) -> dict[str, Any]:
    return {key: getattr(model, key) for key in ("name", "version", "job", "sha256", "created")}


@router.get("", summary="List models")
def list_all(request: Request) -> dict[str, Any]:
    """Return the latest version of every model."""
    return {"models": [_describe(one) for one in Context.of(request).models.list_all()]}


@router.get("/{name}", summary="Show a model")
def show(request: Request, name: str) -> dict[str, Any]:
    """Return the latest version of a model."""
    return _describe(Context.of(request).models.get(name))


@router.put("/{name}", summary="Promote a job")
async def promote(request: Request, name: str) -> dict[str, Any]:
    """Make the model of the job ``{"job": ID}`` the next version; requests go on without a gap."""
    context = Context.of(request)
    body = await context.read_json(request, context.settings.limits.recipe_bytes)
    job = body.get("job") if isinstance(body, dict) else None
    if not isinstance(job, str):
        fix = 'Send {"job": ID}.'
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, f"model {name[:64]}", "no job was named", fix)
    return _describe(await run_in_threadpool(context.models.promote, name, job))


@router.post("/{name}/predict", summary="Predict images")
async def predict(
    request: Request,
    name: str,
    top: Annotated[int, Query(ge=1, le=1000, description="Most classes of each image.")] = 5,
    reject_below: Annotated[float, Query(ge=0, le=1, description="Below it, `rejected` is true.")] = 0.0,
    heat_map: Annotated[bool, Query(description="Draw where the evidence for the label is.")] = False,
) -> dict[str, Any]:
    """Return label and calibrated probabilities of images: files of a form, or ``{"images": [BASE64, ...]}``.

    The label of a model of several labels joins those above their thresholds by ``|``; a model of numbers
    gives ``value`` in place of probabilities.

    Heat maps are JPEG in base64; one that fails its checks is left out with the reason.
    """
    context = Context.of(request)
    pictures = await _read_pictures(context, request, heat_map)
    model, host, waiting = await run_in_threadpool(context.hosts.submit, name, pictures)
    answers = await asyncio.gather(*map(asyncio.wrap_future, waiting))
    return {
        "model": _describe(model),
        "predictions": [_describe_answer(one, host.facts, top, reject_below) for one in answers],
    }


def _describe_answer(answer: Any, model: Mapping[str, Any], top: int, reject_below: float) -> dict[str, Any]:
    if "fault" in answer:
        return {"fault": answer["fault"]}
    values, classes, confidence = answer["probabilities"], model["classes"], answer["confidence"]
    maps = {key: answer[key] for key in ("heat_map", "heat_map_missing") if key in answer}
    if not model["has_classes"]:
        return {"label": answer["label"], "value": values[0]} | maps
    best = rank_classes(np.array(values, np.float32), min(top, len(classes)))
    ranked = [{"label": classes[index], "probability": values[index]} for index in best]
    facts = {"label": answer["label"], "confidence": confidence}
    facts |= {"rejected": confidence < reject_below} if confidence is not None else {}
    return facts | {"top": ranked} | maps


async def _read_pictures(context: Context, request: Request, heat_map: bool) -> list[Picture]:
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=MOST_IMAGES, max_fields=8) as form:
            files = [one for _, one in form.multi_items() if isinstance(one, UploadFile)]
            contents = [await file.read() for file in files]
    else:
        body = await context.read_json(request, context.settings.limits.images_bytes)
        images = body.get("images") if isinstance(body, dict) else None
        contents = [_decode(one) for one in images] if isinstance(images, list) else []
    if not 0 < len(contents) <= MOST_IMAGES:
        found = f"it has {len(contents)} images"
        fix = f"Send 1 to {MOST_IMAGES}, as files of a form or as base64 in `images`."
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "the body", found, fix)
    return [Picture(content, wants_map=heat_map) for content in contents]


def _decode(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        fix = "Encode the bytes of a file."
        raise RefusedError(
            HTTPStatus.UNPROCESSABLE_ENTITY, "images", "one of them is no base64", fix
        ) from None
