"""Checkpoint files for programs that only know a URL: the links carry their permission (`links.py`)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import RedirectResponse, Response, StreamingResponse

from tx_async.age import SUFFIX as AGE_SUFFIX
from tx_async.api.context import Call
from tx_async.api.links import LINK_LIFETIME_S, Permission
from tx_async.api.owner import hash_key
from tx_async.api.rest import own_checkpoint, timestamp
from tx_async.errors import CorruptedCheckpoint, NotFound, UnknownCheckpoint
from tx_async.storage.checkpoint_files import METADATA, decode_manifest
from tx_async.wire import tinker
from tx_async.wire.records import CheckpointRecord, SessionRecord

_log = logging.getLogger(__name__)


async def external_weights_urls(call: Call) -> tinker.ExternalWeightsUrlsResponse:
    checkpoint = own_checkpoint(call)
    base, expires_at = link(call, "external_weights", checkpoint)
    urls = {name: f"{base}/{name}" for name in await _files(call, checkpoint)}
    return tinker.ExternalWeightsUrlsResponse(urls=urls, expires=timestamp(expires_at))


async def archive_url(call: Call) -> Response:
    """A redirect to the tar of a checkpoint, as SDKs up to 0.25 expect it."""
    url, expires_at = link(call, "archives", own_checkpoint(call))
    return RedirectResponse(url, 302, {"expires": f"{timestamp(expires_at):%a, %d %b %Y %H:%M:%S GMT}"})


async def external_weights_file(call: Call) -> Response:
    checkpoint = _permitted(call)
    name = call.path("file")
    file = (await _files(call, checkpoint)).get(name)
    if file is None:
        raise NotFound(f"The checkpoint has no file {name[:200]!r}.")
    headers = {"content-length": str(file.num_bytes)}
    pieces = await _begun(_checked(call, checkpoint, name, file))
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


async def archive(call: Call) -> Response:
    checkpoint = _permitted(call)
    files = await _files(call, checkpoint)
    return StreamingResponse(await _begun(_tar(call, checkpoint, files)), media_type="application/x-tar")


def _permitted(call: Call) -> CheckpointRecord:
    permission = permission_of(call)
    checkpoint = call.scheduler.checkpoints.get(permission.path)
    if checkpoint is None or not permission.is_for(checkpoint):
        raise UnknownCheckpoint()
    return checkpoint


def permission_of(call: Call) -> Permission:
    """The permission in this call's link. Raises `NotFound`."""
    permission = call.api.links.permission(call.path("token"), call.api.clock.now())
    digests = call.api.owners.current_digests()
    if digests is not None and permission.key_mark not in map(call.api.links.mark_of, digests):
        raise NotFound("This download link has ended with the API key that asked for it.")
    return permission


def link(call: Call, route: str, record: CheckpointRecord | SessionRecord) -> tuple[str, float]:
    """(URL, when it expires)."""
    expires_at = call.api.clock.now() + LINK_LIFETIME_S
    token = call.api.links.token(record, expires_at, hash_key(call.key or ""))
    return f"{str(call.request.base_url).rstrip('/')}/api/v1/{route}/{token}", expires_at


# ---- files, as they were saved or not at all


@dataclass(frozen=True)
class _File:
    key: str
    num_bytes: int
    sha256: str


async def _files(call: Call, checkpoint: CheckpointRecord) -> dict[str, _File]:
    """The files by name: those that the checkpoint's list names, and the list itself. Raises `CorruptedCheckpoint`."""
    key = checkpoint.storage_key
    stored = {file.key: file.num_bytes for file in await call.api.files.list(key)}
    if f"{key}/{METADATA}" not in stored:
        raise _damaged(checkpoint, METADATA, "is missing")
    content = b"".join([piece async for piece in call.api.files.stream(f"{key}/{METADATA}")])
    manifest = decode_manifest(checkpoint.path, content)
    files = {name: _File(f"{key}/{name}", info.num_bytes, info.sha256) for name, info in manifest.files.items()}
    for name, file in files.items():
        if stored.get(file.key) != file.num_bytes:
            raise _damaged(checkpoint, name, "is missing, or not as long as it was")
    if files and all(name.endswith(AGE_SUFFIX) for name in files):
        return files  # programs that decrypt them take every name for an encrypted file
    return files | {METADATA: _File(f"{key}/{METADATA}", len(content), hashlib.sha256(content).hexdigest())}


async def _checked(call: Call, checkpoint: CheckpointRecord, name: str, file: _File) -> AsyncIterator[bytes]:
    """The file in pieces. The last one waits until all have the recorded hash, so a damaged file never arrives
    whole."""
    state, num_bytes, last = hashlib.sha256(), 0, b""
    async for piece in call.api.files.stream(file.key):
        if last:
            yield last
        await asyncio.to_thread(state.update, piece)
        num_bytes, last = num_bytes + len(piece), piece
    if (num_bytes, state.hexdigest()) != (file.num_bytes, file.sha256):
        error = _damaged(checkpoint, name, "does not match its recorded hash")
        _log.error("A download ends early: %s", error.message)
        raise error
    yield last


async def _begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Return after the first piece: an error until then is still an answer, later only a broken connection."""
    first = await anext(pieces, b"")

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return all_pieces()


async def _tar(call: Call, checkpoint: CheckpointRecord, files: dict[str, _File]) -> AsyncIterator[bytes]:
    for name, file in files.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime = file.num_bytes, int(checkpoint.created_at)
        head = entry.tobuf()
        async for piece in _checked(call, checkpoint, name, file):
            yield head + piece
            head = b""
        yield bytes(-file.num_bytes % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _damaged(checkpoint: CheckpointRecord, name: str, how: str) -> CorruptedCheckpoint:
    return CorruptedCheckpoint(f"{checkpoint.path} is damaged: {name} {how}. Use an earlier checkpoint.")
