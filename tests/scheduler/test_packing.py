"""Every sequence gets its place in a row that the engine has, and rows are no longer than they need be."""

import msgspec
import numpy as np
import pytest

from tests.support.simulated_clients import datum
from tests.support.simulation import INFO
from tx_async.scheduler.training.packing import PackedRow, pack
from tx_async.wire.operations import ForwardBackward

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)


def rows_of(sizes: list[int], rows_per_micro_batch: int = 1) -> tuple[PackedRow, ...]:
    info = msgspec.structs.replace(
        INFO, row_shapes=tuple((rows_per_micro_batch, length) for length in LENGTHS), row_length_preferred=1024
    )
    data = tuple(datum([0] * n) for n in sizes)
    return pack(ForwardBackward(model_id="m", seq_id=1, data=data, loss_fn="cross_entropy"), info).rows


@pytest.mark.parametrize("rows_per_micro_batch", [1, 4])
@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_has_a_place_of_its_own(seed, rows_per_micro_batch):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rng.choice([40, 500, 2049]), rng.integers(1, 40)).tolist()
    rows = rows_of(sizes, rows_per_micro_batch)
    placed = sorted((segment.datum, segment.length) for row in rows for segment in row.segments)
    assert placed == list(enumerate(sizes))
    for row in rows:
        end = 0
        for segment in row.segments:
            assert segment.offset == end
            end += segment.length
        assert row.length == next(length for length in LENGTHS if length >= end)


def test_short_sequences_share_rows_of_the_preferred_length():
    assert [row.length for row in rows_of([256] * 16)] == [1024] * 4
    assert [row.length for row in rows_of([1500, 10, 20])] == [2048]


def test_what_would_fill_a_row_badly_goes_into_shorter_ones():
    assert [row.length for row in rows_of([300, 200, 60])] == [512, 64]
    assert [row.length for row in rows_of([600])] == [1024]


def test_where_rows_share_a_micro_batch_no_further_shapes_are_asked_for():
    assert [row.length for row in rows_of([300, 200, 60], rows_per_micro_batch=4)] == [1024]
