import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tx_async.dispatch.frames import (
    ALIGNMENT,
    IN_FRAME,
    Block,
    EnvelopeToWorker,
    MalformedMessage,
    decode_from_worker,
    decode_to_worker,
    encode,
    layout,
    pack_block,
    read_block,
    specs_of,
)
from tx_async.wire.tensors import TensorSpec
from tx_async.wire.worker import Heartbeat

arrays = hnp.arrays(
    dtype=st.sampled_from([np.float32, np.int32, np.int64, np.bool_]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7),
)


@given(st.lists(arrays, max_size=5))
def test_tensors_come_out_as_they_went_in(tensors):
    specs = specs_of(tensors)
    offsets, num_bytes = layout(specs)
    frame = pack_block(tensors, offsets, num_bytes)
    for before, after in zip(tensors, read_block(frame, Block(IN_FRAME, num_bytes), specs), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


def test_a_strided_view_travels_as_its_values():
    view = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::-1]
    offsets, num_bytes = layout(specs_of([view]))
    [copy] = read_block(pack_block([view], offsets, num_bytes), Block(IN_FRAME, num_bytes), specs_of([view]))
    np.testing.assert_array_equal(copy, view)


def test_views_cannot_be_written():
    [view] = read_block(bytearray(64), Block(0, 16), [TensorSpec("int32", (4,))])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (Block(64, 16), (4,)),  # begins at the end of the arena
        (Block(-64, 16), (4,)),
        (Block(8, 16), (4,)),  # not aligned
        (Block(0, 32), (4,)),  # announces another size than its shapes have
        (Block(0, 4 * 10**12), (10**12,)),
        (Block(0, 16), (-2, -2)),
    ],
)
def test_a_block_that_does_not_fit_is_refused(block, shape):
    with pytest.raises(MalformedMessage):
        read_block(bytearray(64), block, [TensorSpec("int32", shape)])


@given(st.binary(max_size=200))
def test_garbage_is_a_malformed_message_and_nothing_else(garbage):
    for decode in (decode_to_worker, decode_from_worker):
        with contextlib.suppress(MalformedMessage):
            decode(garbage)


def test_deeply_nested_garbage_is_refused():
    with pytest.raises(MalformedMessage):
        decode_from_worker(b"\x91" * 100_000)


def test_a_reader_ignores_fields_of_a_newer_writer():
    newer = msgspec.msgpack.encode([{"type": "Heartbeat", "num_compilations": 3, "colour": "red"}, None, [], "more"])
    assert decode_to_worker(newer) == EnvelopeToWorker(Heartbeat(num_compilations=3))
    assert decode_to_worker(encode(EnvelopeToWorker(Heartbeat()))).message == Heartbeat()
