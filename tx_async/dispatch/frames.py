"""One message = one header frame, and at most one frame after it.

The header is the msgpack of an envelope: the message, where its tensors' bytes are, and which blocks of the
receiver's own arena its peer has finished reading. A message's tensors form one *block*: each begins at the next
multiple of `ALIGNMENT`, in the order of the message's `tensors`. The block lies in the sender's arena of shared
memory at `Block.offset`, or it is the second frame (`IN_FRAME`): the layout is the same, and nobody above this module
sees the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from tx_async.wire.tensors import TensorSpec
from tx_async.wire.worker import FromWorker, ToWorker

ALIGNMENT = 64
IN_FRAME = -1
SMALL_BLOCK_BYTES = 32 * 1024
"""Smaller blocks travel as a frame even on one host: `bench/dispatch.py` shows where shared memory begins to pay."""
MESSAGE_BYTES_MAX = 1 << 30

DTYPES = frozenset({"float32", "int64", "int32", "uint32", "uint64", "bfloat16", "bool"})


class MalformedMessage(Exception):
    """The bytes are not a message of this protocol."""


class Block(Struct, frozen=True, array_like=True):
    """The bytes of a message's tensors: at `offset` of the sender's arena, or in the next frame."""

    offset: int
    num_bytes: int


class EnvelopeToWorker(Struct, frozen=True, array_like=True):
    message: ToWorker
    block: Block | None = None
    released: tuple[int, ...] = ()
    """Offsets in the worker's own arena (its outbox) that the server has finished reading."""


class EnvelopeFromWorker(Struct, frozen=True, array_like=True):
    message: FromWorker
    block: Block | None = None


_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(EnvelopeToWorker)
_from_worker = msgspec.msgpack.Decoder(EnvelopeFromWorker)


def encode(envelope: EnvelopeToWorker | EnvelopeFromWorker) -> bytes:
    return _encoder.encode(envelope)


def decode_to_worker(header: bytes | memoryview) -> EnvelopeToWorker:
    return _decode(_to_worker, header)


def decode_from_worker(header: bytes | memoryview) -> EnvelopeFromWorker:
    return _decode(_from_worker, header)


def _decode(decoder: msgspec.msgpack.Decoder[Any], header: bytes | memoryview) -> Any:
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise MalformedMessage(str(error)) from error


# ---- blocks


def specs_of(arrays: Sequence[np.ndarray]) -> tuple[TensorSpec, ...]:
    specs = tuple(TensorSpec.of(array) for array in arrays)
    assert all(spec.dtype in DTYPES for spec in specs), f"a dtype of {specs} does not travel"
    return specs


def layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Where each tensor begins in its block, and how long the block is. Raises `MalformedMessage` for impossible
    shapes."""
    offsets: list[int] = []
    end = 0
    for spec in specs:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + _num_bytes(spec)
    return offsets, end


def _num_bytes(spec: TensorSpec) -> int:
    if any(size < 0 for size in spec.shape):
        raise MalformedMessage(f"a tensor of shape {spec.shape}")
    try:
        return spec.num_bytes
    except TypeError as error:
        raise MalformedMessage(str(error)) from error


def write_block(buffer: Any, start: int, arrays: Sequence[np.ndarray], offsets: Sequence[int]) -> None:
    for array, offset in zip(arrays, offsets, strict=True):
        if array.size:
            np.copyto(np.ndarray(array.shape, array.dtype, buffer=buffer, offset=start + offset), array)


def pack_block(arrays: Sequence[np.ndarray], offsets: Sequence[int], num_bytes: int) -> memoryview:
    """Copy the block into bytes of its own, to be sent as a frame."""
    block = np.empty(num_bytes, np.uint8)
    write_block(block, 0, arrays, offsets)
    return block.data


def read_block(buffer: Any, block: Block, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
    """Read-only views of a block's tensors. Raises `MalformedMessage` when block, buffer and shapes do not fit
    together."""
    start = 0 if block.offset == IN_FRAME else block.offset
    offsets, num_bytes = layout(specs)
    available = memoryview(buffer).nbytes
    if start < 0 or start % ALIGNMENT or num_bytes != block.num_bytes or start + num_bytes > available:
        raise MalformedMessage(f"tensors of {num_bytes} bytes at {start}, announced {block.num_bytes}, of {available}")
    views = []
    for spec, offset in zip(specs, offsets, strict=True):
        if 0 in spec.shape:
            view = np.empty(spec.shape, np.dtype(spec.dtype))
        else:
            view = np.ndarray(spec.shape, np.dtype(spec.dtype), buffer=buffer, offset=start + offset)
        view.flags.writeable = False
        views.append(view)
    return views
