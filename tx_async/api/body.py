"""Request bodies: read with a limit, unpacked with a limit, decoded once.

Large ones are unpacked and decoded in a thread, in their key's turn (`budget.py`), so that heartbeats and long polls do
not wait for them.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import TypeVar

import anyio.to_thread
import msgspec
import zstandard
from starlette.requests import Request

from tx_async.api import measure
from tx_async.api.budget import INLINE_BYTES_MAX, Bodies, Hold
from tx_async.errors import BodyTimeout, BodyTooLarge, InvalidRequest
from tx_async.wire import datums

T = TypeVar("T")

CONTROL_BYTES_MAX = 2**20
"""The size limit of bodies that carry no data; they are decoded on the event loop."""
HEAD_BYTES = 4096
"""How much is kept of a body over the limit: enough for the ids at the start of a protobuf."""
DRAIN_FACTOR = 4
"""A body is read (and forgotten) up to this many times the limit, so that its sender sees the answer."""

PIECE_BYTES_MIN, PIECE_BYTES_MAX = 32, 2048
"""Input unpacked at once: an RLE block of zstd makes 128 KiB from four bytes, so one piece gives at most 64 MiB."""
UNPACKED_BYTES = 2**20
"""Pieces that give more are followed by smaller ones: what is unpacked at once comes in one piece of memory."""


class OversizedBody(BodyTooLarge):
    """The request body is larger than this server accepts."""

    def __init__(self, head: bytes, bytes_max: int):
        super().__init__(
            f"The request body is larger than this server accepts: {bytes_max} bytes, unpacked "
            "(`request_body_bytes_max`, `tenant_bodies_bytes_max`). Send smaller pieces."
        )
        self.head = head


async def read(request: Request, bytes_max: int, hold: Hold) -> bytes:
    """The whole body, unpacked. `OversizedBody` beyond `bytes_max`, `BodyTooLarge` beyond what its key may have,
    `BodyTimeout` when it stops coming; `InvalidRequest` when its compression is broken."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "zstd"):
        raise InvalidRequest(f"Content-Encoding {encoding!r} is not supported: send zstd, or none.")
    bytes_max = min(bytes_max, hold.bodies.body_bytes_max)
    try:
        body = await _receive(request, bytes_max, hold)
    except OversizedBody as error:
        head = _zstd_head(error.head) if encoding == "zstd" else error.head
        raise OversizedBody(head, bytes_max) from None
    return await _unpack(body, bytes_max, hold) if encoding == "zstd" else body


async def _unpack(packed: bytes, bytes_max: int, hold: Hold) -> bytes:
    """Unpack a body; the bytes that it unpacks to are reserved first."""
    size = announced_size(packed, bytes_max)
    if size is None:
        async with hold.bodies.decoding(hold.owner):
            size = await anyio.to_thread.run_sync(count_zstd, packed, bytes_max)
    await hold.take(size, unfolds=True)
    return await hold.compute(unpack_zstd, size, packed, bytes_max, size)


def decode_json(body: bytes, kind: type[T], depth_max: int) -> T:
    """`InvalidRequest` says what is wrong and where; `NestedTooDeep` comes before anything is decoded."""
    measure.check_nesting(body, depth_max)
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The request body is invalid: {datums.explained(error)}.") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None


def announced_size(data: bytes, bytes_max: int) -> int | None:
    """The size that a zstd frame announces; None when it announces none."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"The request body is not valid zstd: {error}.") from None
    if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        return None
    if size > bytes_max:
        raise OversizedBody(_zstd_head(data), bytes_max)
    return size


def count_zstd(data: bytes, bytes_max: int) -> int:
    """How many bytes a frame unpacks to; none of them is kept."""
    return sum(map(len, _unfold(data, bytes_max)))


def unpack_zstd(data: bytes, bytes_max: int, num_bytes: int = 0) -> bytes:
    """Unpack one zstd frame, whether it announces its size or not."""
    body = _room(num_bytes)
    for piece in _unfold(data, bytes_max):
        body.write(piece)
    body.truncate()
    return body.getvalue()


def _unfold(data: bytes, bytes_max: int) -> Iterator[bytes]:
    """Unpack a piece of input at a time: a few bytes can unpack to gigabytes, but one piece only to a bounded
    amount."""
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    head, size = b"", 0
    try:
        start, step = 0, PIECE_BYTES_MIN
        while start < len(data):
            piece = unpacker.decompress(data[start : start + step])
            start += step
            head += piece[: HEAD_BYTES - len(head)]
            size += len(piece)
            if size > bytes_max:
                raise OversizedBody(head, bytes_max)
            yield piece
            if unpacker.eof and (unpacker.unused_data or start < len(data)):
                raise InvalidRequest("The request body has bytes after the end of its zstd frame.")
            step = PIECE_BYTES_MIN if len(piece) > UNPACKED_BYTES else min(2 * step, PIECE_BYTES_MAX)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"The request body is not valid zstd: {error}.") from None
    if not unpacker.eof:
        raise InvalidRequest("The request body is a truncated zstd frame.")


def _zstd_head(data: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            return reader.read(HEAD_BYTES)
    except zstandard.ZstdError:
        return b""


async def _receive(request: Request, bytes_max: int, hold: Hold) -> bytes:
    """Read a body; its bytes are reserved first: all that the head announces, or piece by piece."""
    announced = _content_length(request)
    if announced <= bytes_max:
        await hold.take(announced)
    head, size = b"", 0
    body = _room(announced if announced <= bytes_max else 0)
    async for piece in _pieces(request, hold.bodies):
        size += len(piece)
        if len(head) < HEAD_BYTES:
            head += piece[: HEAD_BYTES - len(head)]
        if size <= bytes_max and announced <= bytes_max:
            if size > hold.num_bytes:
                await hold.take(max(len(piece), INLINE_BYTES_MAX))
            # Each piece is put in its place as it comes: to join megabytes at the end would stop the event loop.
            body.write(piece)
        elif hold.num_bytes:
            body = io.BytesIO()
            hold.release()
        if size > DRAIN_FACTOR * bytes_max:
            break
    if size > bytes_max or announced > bytes_max:
        raise OversizedBody(head, bytes_max)
    body.truncate()
    return body.getvalue()


def _room(num_bytes: int) -> io.BytesIO:
    """A file of `num_bytes` zeros to write over: it never grows, which would copy it, and its memory is first touched
    by what is written to it."""
    return io.BytesIO(bytes(num_bytes))


def _content_length(request: Request) -> int:
    text = request.headers.get("content-length", "0").strip()
    return int(text) if len(text) < 16 and text.isdigit() else 0


async def _pieces(request: Request, bodies: Bodies) -> AsyncIterator[bytes]:
    """Raises `BodyTimeout` when the next piece does not come."""
    stream, size = request.stream(), 0
    while True:
        try:
            async with asyncio.timeout(bodies.timeout_s):
                piece = await anext(stream, None)
        except TimeoutError:
            raise BodyTimeout() from None
        if piece is None:
            return
        size += len(piece)
        if size > INLINE_BYTES_MAX:
            await bodies.turnstile.passed()
        yield piece


@cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)
