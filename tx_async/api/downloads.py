"""Checkpoint files for programs that only know a URL: the links carry their permission (`links.py`)."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator

from starlette.responses import RedirectResponse, Response, StreamingResponse

from tx_async.api.context import Call, StoredFile
from tx_async.api.links import LINK_LIFETIME_S
from tx_async.api.rest import own_checkpoint, timestamp
from tx_async.errors import NotFound, UnknownCheckpoint
from tx_async.wire import tinker
from tx_async.wire.records import CheckpointRecord


async def external_weights_urls(call: Call) -> tinker.ExternalWeightsUrlsResponse:
    checkpoint = own_checkpoint(call)
    base, expires_at = _link(call, "external_weights", checkpoint)
    urls = {name: f"{base}/{name}" for name in await _files(call, checkpoint)}
    return tinker.ExternalWeightsUrlsResponse(urls=urls, expires=timestamp(expires_at))


async def archive_url(call: Call) -> Response:
    """A redirect to the tar of a checkpoint, as SDKs up to 0.25 expect it."""
    url, expires_at = _link(call, "archives", own_checkpoint(call))
    return RedirectResponse(url, 302, {"expires": f"{timestamp(expires_at):%a, %d %b %Y %H:%M:%S GMT}"})


async def external_weights_file(call: Call) -> Response:
    checkpoint = _permitted(call)
    name = call.path("file")
    file = (await _files(call, checkpoint)).get(name)
    if file is None:
        raise NotFound(f"The checkpoint has no file {name[:200]!r}.")
    headers = {"content-length": str(file.num_bytes)}
    return StreamingResponse(call.api.files.stream(file.key), headers=headers, media_type="application/octet-stream")


async def archive(call: Call) -> Response:
    checkpoint = _permitted(call)
    files = await _files(call, checkpoint)
    return StreamingResponse(_tar(call, checkpoint, files), media_type="application/x-tar")


def _permitted(call: Call) -> CheckpointRecord:
    path = call.api.links.checkpoint(call.path("token"), call.api.clock.now())
    checkpoint = call.scheduler.checkpoints.get(path)
    if checkpoint is None:
        raise UnknownCheckpoint()
    return checkpoint


def _link(call: Call, route: str, checkpoint: CheckpointRecord) -> tuple[str, float]:
    """(URL, when it expires)."""
    expires_at = call.api.clock.now() + LINK_LIFETIME_S
    token = call.api.links.token(checkpoint.path, expires_at)
    return f"{str(call.request.base_url).rstrip('/')}/api/v1/{route}/{token}", expires_at


async def _files(call: Call, checkpoint: CheckpointRecord) -> dict[str, StoredFile]:
    """By path relative to the checkpoint."""
    prefix = checkpoint.storage_key
    return {file.key.removeprefix(f"{prefix}/"): file for file in await call.api.files.list(prefix)}


async def _tar(call: Call, checkpoint: CheckpointRecord, files: dict[str, StoredFile]) -> AsyncIterator[bytes]:
    for name, file in files.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime = file.num_bytes, int(checkpoint.created_at)
        yield entry.tobuf()
        async for piece in call.api.files.stream(file.key):
            yield piece
        yield bytes(-file.num_bytes % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
