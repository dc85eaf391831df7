"""``/v1/datasets`` and ``/v1/uploads``: archives of images, in one request or by the tus protocol 1.0.0."""

from __future__ import annotations

import base64
import binascii
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from finetune.runs.reader import RunReader
from finetune.service.context import Context
from finetune.service.problems import RefusedError
from finetune.service.store.datasets import StoredDataset
from finetune.service.store.jobs import UnknownError
from finetune.system.regular_files import hash_regular

router = APIRouter(prefix="/v1", tags=["data sets"])
TUS = "1.0.0"
_HEADERS = {"Tus-Resumable": TUS, "Cache-Control": "no-store"}
_MOST_BODY = 10_000


def _describe(context: Context, dataset: StoredDataset) -> dict[str, Any]:
    keys = ("id", "name", "num_bytes", "created", "state")
    facts = {key: getattr(dataset, key) for key in keys}
    progress = RunReader(context.folder.job(dataset.check.id).run, tolerant=True).progress
    facts |= {"outcome": dataset.check.outcome, "progress": progress or None}
    return facts | {
        "data": {"path": f"dataset:{dataset.id}"},
        "links": {"check": f"/v1/datasets/{dataset.id}/check"},
    }


@router.post("/datasets", status_code=201, summary="Add a data set")
async def add(
    request: Request,
    response: Response,
    name: Annotated[str, Query(max_length=200)] = "",
    upload: Annotated[str, Query(max_length=64, description="Id of a finished upload.")] = "",
    repr_digest: Annotated[str | None, Header(description="sha-256=:BASE64:, checked if given.")] = None,
) -> dict[str, Any]:
    """Take the archive of the body, or of an upload. The same content is the same data set (200)."""
    context = Context.of(request)
    if not upload:
        upload = await _receive(context, request)
    dataset, is_new = await run_in_threadpool(_add, context, upload, name, repr_digest)
    if not is_new:
        response.status_code = HTTPStatus.OK
    return await run_in_threadpool(_describe, context, dataset)


async def _receive(context: Context, request: Request) -> str:
    """Store the body as an upload; nothing of it stays if it does not arrive whole."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        fix = "Send Content-Length, or use the tus protocol (POST /v1/uploads)."
        raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "the upload", "its length is unknown", fix)
    begun = await run_in_threadpool(context.uploads.create, int(length))
    try:
        await context.uploads.append(begun.id, 0, request.stream())
    except BaseException:
        context.uploads.remove(begun.id)
        raise
    return begun.id


def _add(context: Context, upload: str, name: str, digest: str | None) -> tuple[StoredDataset, bool]:
    facts, done = context.uploads.get(upload)
    if done < facts.length:
        found = f"{done:,} of {facts.length:,} bytes have arrived"
        raise RefusedError(HTTPStatus.CONFLICT, f"upload {upload}", found, "Send the rest first.")
    path = context.uploads.path(upload)
    try:
        if digest is not None:
            _check_digest(path, digest)
        return context.datasets.add(path, name or facts.name)
    finally:
        context.uploads.remove(upload)


def _check_digest(path: Any, digest: str) -> None:
    found = base64.b64encode(bytes.fromhex(hash_regular(path))).decode()
    expected = f"sha-256=:{found}:"
    if digest.strip() != expected:
        fix = "Send it again."
        raise RefusedError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "the upload",
            f"its digest is {expected}, and not the given one",
            fix,
        )


@router.get("/datasets", summary="List data sets")
def list_all(request: Request) -> dict[str, Any]:
    """Return the data sets, the newest first."""
    context = Context.of(request)
    return {"datasets": [_describe(context, one) for one in context.datasets.list_all()]}


@router.get("/datasets/{dataset}", summary="Show a data set")
def show(request: Request, dataset: str) -> dict[str, Any]:
    """Return a data set with the state of its check."""
    context = Context.of(request)
    return _describe(context, context.datasets.get(dataset))


@router.get("/datasets/{dataset}/check", summary="What the check found")
def check(request: Request, dataset: str) -> dict[str, Any]:
    """Return the issues that were found, as ``finetune check`` writes them."""
    context = Context.of(request)
    found = RunReader(context.folder.job(context.datasets.get(dataset).check.id).run, tolerant=True).check
    return dict(found)


@router.get("/datasets/{dataset}/check.png", summary="Pictures of what the check found", response_model=None)
def check_sheet(request: Request, dataset: str) -> Response:
    """Return a sheet with the images of each issue."""
    context = Context.of(request)
    path = context.folder.job(context.datasets.get(dataset).check.id).run.check_sheet
    if not path.is_file():
        raise UnknownError(f"data set {dataset[:64]}", "its check has no pictures", "See /check.")
    return FileResponse(path, media_type="image/png")


@router.delete("/datasets/{dataset}", status_code=204, summary="Remove a data set")
def remove(request: Request, dataset: str) -> Response:
    """Remove a data set; runs that used it stay."""
    Context.of(request).datasets.remove(dataset)
    return Response(status_code=HTTPStatus.NO_CONTENT)


# --- tus -----------------------------------------------------------------------------------------


@router.options("/uploads", summary="What uploads can do")
def options(request: Request) -> Response:
    """Return the version and the extensions of the tus protocol."""
    most = str(Context.of(request).uploads.most_bytes)
    more = {"Tus-Version": TUS, "Tus-Extension": "creation,termination", "Tus-Max-Size": most}
    return Response(status_code=HTTPStatus.NO_CONTENT, headers=_HEADERS | more)


@router.post("/uploads", status_code=201, summary="Begin an upload")
def begin(
    request: Request,
    upload_length: Annotated[int, Header(ge=1)],
    upload_metadata: Annotated[str, Header(max_length=_MOST_BODY)] = "",
) -> Response:
    """Begin an upload of a known length; ``filename`` of the metadata becomes the name of the data set."""
    context = Context.of(request)
    upload = context.uploads.create(upload_length, _read_metadata(upload_metadata).get("filename", ""))
    location = {"Location": f"/v1/uploads/{upload.id}"}
    return Response(status_code=HTTPStatus.CREATED, headers=_HEADERS | location)


@router.head("/uploads/{upload}", summary="How far an upload is")
def ask(request: Request, upload: str) -> Response:
    """Return how many bytes have arrived."""
    facts, done = Context.of(request).uploads.get(upload)
    place = {"Upload-Offset": str(done), "Upload-Length": str(facts.length)}
    return Response(status_code=HTTPStatus.OK, headers=_HEADERS | place)


@router.patch("/uploads/{upload}", status_code=204, summary="Send bytes of an upload")
async def send(request: Request, upload: str, upload_offset: Annotated[int, Header(ge=0)]) -> Response:
    """Add the body at the end; it must begin where the upload is."""
    if request.headers.get("content-type") != "application/offset+octet-stream":
        fix = "Send Content-Type: application/offset+octet-stream."
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body", "its type is another one", fix)
    done = await Context.of(request).uploads.append(upload, upload_offset, request.stream())
    return Response(status_code=HTTPStatus.NO_CONTENT, headers=_HEADERS | {"Upload-Offset": str(done)})


@router.delete("/uploads/{upload}", status_code=204, summary="Drop an upload")
def drop(request: Request, upload: str) -> Response:
    """Remove an upload and what has arrived of it."""
    Context.of(request).uploads.remove(upload)
    return Response(status_code=HTTPStatus.NO_CONTENT, headers=_HEADERS)


def _read_metadata(text: str) -> dict[str, str]:
    """Return the metadata of tus: keys and base64 values, separated by commas, where they are text."""
    found = {}
    for pair in text.split(","):
        key, _, value = pair.strip().partition(" ")
        try:
            found[key] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            continue
    return found
