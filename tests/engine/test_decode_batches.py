"""Calls that a quantum's prefill is cut into."""

from itertools import pairwise

from tx_async.engine.decode_batches import PREFILL_ROWS, prefill_rows


def test_calls_have_a_row_for_every_tile_and_few_to_spare():
    for num_tiles in range(1, 200):
        calls = list(prefill_rows(num_tiles))
        assert set(calls) <= set(PREFILL_ROWS)
        assert sum(calls[:-1]) < num_tiles <= sum(calls)
        assert sum(calls) <= max(PREFILL_ROWS[0], 2 * num_tiles)
        assert all(larger >= smaller for larger, smaller in pairwise(calls))
