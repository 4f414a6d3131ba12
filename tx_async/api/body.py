"""Request bodies: read with a limit, unpacked with a limit, decoded once.

Large ones are unpacked and decoded in a thread, so that heartbeats and long polls do not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import anyio.to_thread
import msgspec
import zstandard
from starlette.requests import Request

from tx_async.errors import BodyTooLarge, InvalidRequest

T = TypeVar("T")

INLINE_BYTES_MAX = 64 * 1024
"""Bodies and results up to this size are handled on the event loop: a thread would cost more than it saves."""
HEAD_BYTES = 4096
"""What is kept of a body over the limit: enough for the ids at the start of a protobuf."""
DRAIN_FACTOR = 4
"""A body is read (and forgotten) up to this many times the limit, so that its sender gets to see the answer."""

PIECE_BYTES = 2048
"""Input unpacked at once: an RLE block of zstd makes 128 KiB from four bytes, so one piece gives at most 64 MiB."""


class OversizedBody(BodyTooLarge):
    """The request body is larger than this server accepts."""

    def __init__(self, head: bytes, bytes_max: int):
        super().__init__(
            f"The request body is larger than this server accepts ({bytes_max} bytes unpacked): send smaller pieces."
        )
        self.head = head


async def read(request: Request, bytes_max: int) -> bytes:
    """The whole body, unpacked. `OversizedBody` beyond `bytes_max`; `InvalidRequest` when its packing is broken."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "zstd"):
        raise InvalidRequest(f"Content-Encoding {encoding!r} is not supported: send zstd, or none.")
    try:
        body = await _receive(request, bytes_max)
    except OversizedBody as error:
        head = _zstd_head(error.head) if encoding == "zstd" else error.head
        raise OversizedBody(head, bytes_max) from None
    if encoding == "zstd":
        return await compute(unpack_zstd, len(body), body, bytes_max)
    return body


async def compute(function: Callable[..., T], num_bytes: int, *arguments: Any) -> T:
    """Run a function whose cost grows with `num_bytes`, in a thread when that is much."""
    if num_bytes <= INLINE_BYTES_MAX:
        return function(*arguments)
    return await anyio.to_thread.run_sync(function, *arguments)


def decode_json(body: bytes, kind: type[T]) -> T:
    """`InvalidRequest` says what is wrong and where."""
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        hint = " (the SDK sends NaN and infinity as null)" if "got `null`" in str(error) else ""
        raise InvalidRequest(f"The request body is invalid: {error}{hint}.") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None


def unpack_zstd(data: bytes, bytes_max: int) -> bytes:
    """One zstd frame, whether it announces its size or not."""
    try:
        announced = zstandard.get_frame_parameters(data).content_size
        if announced not in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) and announced > bytes_max:
            raise OversizedBody(_zstd_head(data), bytes_max)
        return _unpack_stream(data, bytes_max)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"The request body is not valid zstd: {error}.") from None


def _unpack_stream(data: bytes, bytes_max: int) -> bytes:
    """A piece of input at a time: a few bytes can unfold to gigabytes, but one piece only to a bounded amount."""
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    pieces, size = [], 0
    for start in range(0, len(data), PIECE_BYTES):
        pieces.append(unpacker.decompress(data[start : start + PIECE_BYTES]))
        size += len(pieces[-1])
        if size > bytes_max:
            raise OversizedBody(b"".join(pieces)[:HEAD_BYTES], bytes_max)
        if unpacker.eof and (unpacker.unused_data or start + PIECE_BYTES < len(data)):
            raise InvalidRequest("The request body has bytes after the end of its zstd frame.")
    if not unpacker.eof:
        raise InvalidRequest("The request body is a truncated zstd frame.")
    return b"".join(pieces)


def _zstd_head(data: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            return reader.read(HEAD_BYTES)
    except zstandard.ZstdError:
        return b""


async def _receive(request: Request, bytes_max: int) -> bytes:
    head, pieces, size = b"", [], 0
    async for piece in request.stream():
        size += len(piece)
        if len(head) < HEAD_BYTES:
            head += piece[: HEAD_BYTES - len(head)]
        if size <= bytes_max:
            pieces.append(piece)
        else:
            pieces.clear()
        if size > DRAIN_FACTOR * bytes_max:
            break
    if size > bytes_max:
        raise OversizedBody(head, bytes_max)
    return b"".join(pieces)


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder:
    return msgspec.json.Decoder(kind)
